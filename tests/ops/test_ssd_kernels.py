"""Mamba-2's whole sequences on CUDA kernels: dt, D and z inside the sweeps, on the emulator, with
all gradients by autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from checks import assert_refused
from emulators import emulator
from families import FAMILIES, Call_, assert_rule, definition, draw, gradients, operator
from impls import Impl
from in_place import in_place_of_cuda, of_cuda, on
from torch import Tensor

from lsm_cuda import ops
from lsm_cuda.ops import ssd

(FAMILY,) = (f for f in FAMILIES if f.name == "ssd")
BF16 = torch.bfloat16
OPERATORS = ("ssd_fwd", "ssd_bwd")


@pytest.fixture
def _kernels() -> Iterator[None]:
    with in_place_of_cuda("_emu", ssd, OPERATORS):
        yield


@pytest.fixture
def _racing_kernels() -> Iterator[None]:
    with in_place_of_cuda("_emu_race", ssd, OPERATORS):
        yield


CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "one token": {"T": 1},
    "no tokens": {"T": 0},
    "tiles of 64 rows": {"T": 70, "K": 128, "V": 64, "B": 1, "wide": ("dt", "D")},
    "tiles of 128 rows": {"T": 45, "K": 64, "V": 128, "B": 1, "H": 1, "HV": 2},
    "two tiles": {"T": 33, "K": 72, "V": 136, "B": 1, "H": 1, "HV": 1},
    "widest": {"T": 19, "K": 256, "V": 200, "B": 1, "H": 1, "HV": 1},
    "packed": {"T": 40, "cu_seqlens": [0, 0, 9, 9, 27, 40]},
    "cut": {"T": 530, "K": 16, "V": 16, "B": 1, "H": 1, "HV": 1, "multiprocessors": 64},
    "packed and cut": {
        **{"T": 300, "K": 16, "V": 16, "H": 1, "HV": 1},
        **{"cu_seqlens": [0, 280, 280, 300], "multiprocessors": 64},
    },
    "no state": {"states": False},
    "D per head": {"per_head": True, "wide": ("D",)},
    "no D": {"without": ("D",)},
    "no z": {"without": ("z",)},
    "neither": {"without": ("D", "z")},
    "weights of either sign": {"softplus": False},
}


def call_of(case: dict[str, Any]) -> tuple[Any, Call_, int]:
    options = dict(case)
    without, wide = options.pop("without", ()), options.pop("wide", ())
    per_head, softplus = options.pop("per_head", False), options.pop("softplus", True)
    multiprocessors = options.pop("multiprocessors", 8)
    x = draw(FAMILY, dtype=BF16, **options)
    if per_head:
        x.tensors["D"] = x.tensors["D"][:, 0].clone()
    for n in wide:
        x.tensors[n] = x.tensors[n].float()
    for n in without:
        del x.tensors[n]
    family = FAMILY
    if not softplus:  # small: where they are negative, states grow
        x.tensors["dt"].mul_(0.125), x.tensors["dt_bias"].zero_()
        x.tensors["dt"][:, ::3] = 0
        options = {"dt_softplus": False, "dt_limit": (-9.0, 9.0)}
        family = dataclasses.replace(
            FAMILY,
            chunk=partial(FAMILY.chunk, **options),
            definition=partial(FAMILY.definition, **options),
        )
    return family, x, multiprocessors


@of_cuda
@pytest.mark.parametrize("name", CASES)
def test_is_its_definition(impl: Impl, name: str) -> None:
    family, x, multiprocessors = call_of(CASES[name])
    results = on(impl, ssd, OPERATORS, family, x, multiprocessors)
    if x.tensors["A"].numel() == 1:  # of one head's sum over time too much may cancel
        del results["dA"], results["ddt_bias"]
    assert_rule(results, definition(family, x), x)


@pytest.mark.usefixtures("_kernels")
def test_hard_decays() -> None:
    """dt·A down to -50, then beyond what fp32 holds."""
    x = draw(FAMILY, gate="-1", dtype=BF16)
    x.tensors["dt"].copy_(torch.linspace(-60, 45, x.tensors["dt"].numel()).view(2, 37, 4))
    run = partial(gradients, operator(FAMILY), FAMILY, x)
    assert_rule(run(), definition(FAMILY, x), x)
    x.tensors["A"].fill_(-1e4)
    assert all(t.isfinite().all() for t in run().values())


@pytest.mark.usefixtures("_kernels")
def test_segments() -> None:
    """A change of seq_idx is a decay of -inf."""
    x = draw(FAMILY, dtype=BF16)
    seq_idx = torch.tensor([[0] * 9 + [1] * 28, [0] * 20 + [2] * 17])

    def cut(scan):  # type: ignore[no-untyped-def]
        return lambda cu_seqlens=None, **rest: scan(**rest, seq_idx=seq_idx)

    family = dataclasses.replace(FAMILY, chunk=cut(FAMILY.chunk), definition=cut(FAMILY.definition))
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


@pytest.mark.usefixtures("_racing_kernels")
@pytest.mark.parametrize("name", ["padded", "packed and cut", "two tiles"])
def test_no_races(name: str) -> None:
    family, x, multiprocessors = call_of(CASES[name] | {"B": 1})
    emu = emulator("_emu_race")
    emu.set_multiprocessors(multiprocessors)
    emu.set_seed(1)
    gradients(operator(family), family, x)


def raw_arguments(**replaced: Any) -> list[Any]:
    torch.manual_seed(0)
    tokens = {"q": (1, 19, 1, 8), "k": (1, 19, 1, 8), "v": (1, 19, 2, 16)}
    named: dict[str, Any] = {n: torch.randn(shape).to(BF16) for n, shape in tokens.items()}
    named |= {"w": torch.rand(1, 19, 2), "g": -torch.rand(1, 19, 2), "D": torch.rand(2, 16)}
    named |= {"z": torch.randn(1, 19, 2, 16).to(BF16), "S": torch.randn(1, 2, 8, 16)}
    named["cu_seqlens"] = None
    return [*(named | replaced).values(), 1.0, True, True]


@pytest.mark.usefixtures("_kernels")
def test_is_a_sound_operator() -> None:
    op = torch.ops.lsm.ssd_fwd.default
    emulator("_emu").set_seed(1)
    for absent in ({}, {"D": None, "S": None}, {"z": None}):
        given = raw_arguments(**absent)
        for t in given:
            if isinstance(t, Tensor):
                t.requires_grad_()
        torch.library.opcheck(op, given)
    *tensors, cu_seqlens, scale, _, _ = raw_arguments()
    S = tensors.pop()
    y = torch.randn(1, 19, 2, 16).to(BF16)
    back = torch.ops.lsm.ssd_bwd.default
    torch.library.opcheck(back, [*tensors, y, S, cu_seqlens, scale, y, S])
    tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(back(*tensors, y, S, cu_seqlens, scale, y, S)[0].sum(), tensors[0])


BAD = {
    "q": (torch.zeros(1, 19, 1, 8), "k must have dtype float32 like q, got bfloat16"),
    "w": (torch.zeros(1, 19, 1), "w must have shape [B, T, HV] = [1, 19, 2], got [1, 19, 1]"),
    "g": (torch.zeros(1, 19, 2).to(BF16), "g must have dtype float32, got bfloat16"),
    "D": (torch.zeros(2, 9), "D must have shape [HV, V] = [2, 16], got [2, 9]"),
    "z": (torch.zeros(1, 19, 2, 16), "z must have dtype bfloat16 like q, got float32"),
}


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("name", BAD)
def test_refuses(name: str) -> None:
    bad, text = BAD[name]
    assert_refused(f"lsm::ssd_fwd: {text}", torch.ops.lsm.ssd_fwd, *raw_arguments(**{name: bad}))


@pytest.mark.usefixtures("_kernels")
def test_goes_to_tensor_cores_alone() -> None:
    given = [t.float() if isinstance(t, Tensor) else t for t in raw_arguments()]
    with pytest.raises(RuntimeError, match=r"ssd_fwd: q must be bfloat16, .*, got float32"):
        torch.ops.lsm.ssd_fwd(*given)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("cuts", [[0, 5, 3, 37], [1, 37], [0, 36]])
def test_bad_boundaries_give_nan_everywhere(cuts: list[int]) -> None:
    emulator("_emu").set_seed(1)
    x = draw(FAMILY, dtype=BF16, B=1, states=False)
    call = Call_(x.tensors, None, torch.tensor(cuts))
    results = gradients(operator(FAMILY), FAMILY, call)
    for n in ("o", "final_state 0", "dx", "ddt", "dB", "dC"):
        assert results[n].isnan().all(), n


@pytest.mark.usefixtures("_kernels")
def test_keeps_what_the_backward_needs_and_no_more() -> None:
    """What z gates is a second output only where there will be a backward."""
    emu = emulator("_emu")
    emu.set_seed(1)
    x = {n: t[:1] if t.dim() > 2 else t for n, t in draw(FAMILY, dtype=BF16).tensors.items()}
    written = []
    for training in (False, True):
        x["z"].requires_grad_(training)
        emu.reset_counters()
        ops.mamba_chunk_scan_combined(**x)
        (launch,) = emu.counters()["launches"]
        written.append(launch["global_write_bytes"])
    assert written[1] == 2 * written[0]
