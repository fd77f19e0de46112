"""Mamba-2's scan under mamba_ssm's conventions: what is its own beyond test_families.py."""

from __future__ import annotations

import dataclasses
import inspect
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GLA
from checks import assert_refused
from families import FAMILIES, SSD, assert_rule, definition, draw, gradients, operator, row, ssd
from impls import Impl, threads
from peers import mamba_ssm_module
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.ops import ssd as ssd_module

STATES = "return_final_states return_varlen_states"
SIGNATURES = {
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D z dt_bias initial_states seq_idx "
    f"cu_seqlens dt_softplus dt_limit {STATES}",
    "selective_state_update": "state x dt A B C D z dt_bias dt_softplus",
    "ssd_minimal_discrete": "X A B C block_len initial_states",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size "
    "initial_states seq_idx dt_limit return_final_states activation rmsnorm_weight rmsnorm_eps "
    "outproj_weight outproj_bias headdim ngroups norm_before_gate",
}
(FAMILY,) = (f for f in FAMILIES if f.name == "ssd")
SEGMENTS = [0] * 9 + [3] * 1 + [1] * 20 + [2] * 7


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_mamba_ssms(name: str) -> None:
    parameters = list(inspect.signature(getattr(ops, name)).parameters)
    assert parameters == SIGNATURES[name].split()


def arguments(**replaced: Any) -> dict[str, Any]:
    x = draw(FAMILY, dtype=torch.float64)
    return x.tensors | {"initial_states": x.states[0], "dt_softplus": True} | replaced


def outputs(call):  # type: ignore[no-untyped-def]
    """Without states."""
    return lambda **x: (call(**x)[0], None)


def peer(name: str):  # type: ignore[no-untyped-def]
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    return getattr(modeling, name).__wrapped__


def test_is_the_scan_of_transformers() -> None:
    """Its chunked form, in fp32 inside, obeys the acceptance rule; so does ours."""
    scan = peer("mamba2_chunk_scan")

    def theirs(x, D, z, initial_state, cu_seqlens=None, **rest):  # type: ignore[no-untyped-def]
        y, state = scan(
            x, **rest, initial_states=initial_state, chunk_size=16, dt_softplus=True,
            return_final_states=True,
        )  # fmt: skip
        return (y + D * x) * F.silu(z), state  # its own D is per head, and it has no z

    x = draw(FAMILY)
    expected = definition(FAMILY, x)
    assert_rule(gradients(theirs, FAMILY, x), expected, x)
    assert_rule(gradients(operator(FAMILY), FAMILY, x), expected, x)


def test_is_the_reference_of_mamba_ssm() -> None:
    """Its PyTorch definition, with D and z, in fp32; outputs, since it has no states."""
    with mamba_ssm_module("ops.triton.ssd_combined") as module:
        scan = module.ssd_chunk_scan_combined_ref

        def theirs(initial_state=None, cu_seqlens=None, **x):  # type: ignore[no-untyped-def]
            return scan(**x, chunk_size=8, dt_softplus=True), None

        family = dataclasses.replace(FAMILY, definition=outputs(FAMILY.definition), state=())
        x = draw(family, T=40, states=False)
        expected = definition(family, x)
        assert_rule(gradients(theirs, family, x), expected, x)
        assert_rule(gradients(operator(family), family, x), expected, x)


def test_listing_is_that_of_mamba_ssm() -> None:
    x = draw(FAMILY, T=32, dtype=torch.float64, HV=2).tensors
    arguments = x["x"], -x["dt"].abs(), x["B"], x["C"], 8
    with mamba_ssm_module("modules.ssd_minimal") as module:
        expected = module.ssd_minimal_discrete(*arguments)
    for got, want in zip(ops.ssd_minimal_discrete(*arguments), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("turned", [False, True])
def test_step_is_the_step_of_transformers(turned: bool) -> None:
    """Called as mamba_ssm's own layer calls it, everything expanded; the state in either layout."""
    update = peer("mamba2_selective_state_update")
    x = {n: t[:, 0] if t.dim() > 2 else t for n, t in draw(FAMILY).tensors.items()}
    x |= {
        "dt": x["dt"][:, :, None].expand(-1, -1, 10),
        "A": x["A"][:, None, None].expand(-1, 10, 12),
        "dt_bias": x["dt_bias"][:, None].expand(-1, 10),
    }
    state = torch.randn(2, 4, 10, 12)
    other = state.clone()
    if turned:
        state = state.mT.contiguous().mT
    y = ops.selective_state_update(state, **x, dt_softplus=True)
    torch.testing.assert_close(y, update(other, x.pop("x"), **x, dt_softplus=True))
    torch.testing.assert_close(state, other)


STEPS = {
    "f32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 with fp32 parameters": {"dtype": torch.bfloat16, "wide": ("dt", "A", "D", "dt_bias")},
    "f16": {"dtype": torch.float16},
    "f64": {"dtype": torch.float64},
    "D per head": {"per_head": True},
    "nothing around it": {"without": ("D", "z", "dt_bias")},
    "without softplus": {"softplus": False},
    "wide": {"K": 160, "V": 70, "B": 1, "HV": 2},
    "wider than the stack": {"K": 300, "V": 260, "B": 1, "H": 1, "HV": 1},
    "hard decays": {"hard": True},
}


def raw_step(impl: Impl) -> Any:
    if impl.name != "emulator":
        return torch.ops.lsm.ssd_step.default
    impl.raw(GLA, "step")  # loads it
    return torch.ops.lsm_emu.ssd_step.default


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_the_operator(impl: Impl, name: str, turned: bool) -> None:
    """Tokens one by one, with all that is around them, on a state in either layout."""
    options = dict(STEPS[name])
    without, wide = options.pop("without", ()), options.pop("wide", ())
    per_head, hard = options.pop("per_head", False), options.pop("hard", False)
    softplus = options.pop("softplus", True)
    x = draw(FAMILY, T=5, **options)
    if per_head:
        x.tensors["D"] = x.tensors["D"][:, 0].clone()
    if hard:  # dt·A down to -90, where nothing is left, and next to none
        x.tensors["A"].fill_(-1)
        x.tensors["dt"].copy_(torch.linspace(-60, 90, x.tensors["dt"].numel()).view(2, 5, 4))
    for n in wide:
        x.tensors[n] = x.tensors[n].float()
    if not softplus:
        x.tensors["dt"].abs_(), x.tensors["dt_bias"].abs_()
    for n in without:
        del x.tensors[n]
    state = x.states[0].to(impl.device, copy=True)
    if turned:
        state = state.mT.contiguous().mT
    step, tokens = raw_step(impl), []
    names = ("x", "dt", "A", "B", "C", "state", "D", "z", "dt_bias")
    for t in range(5):
        token = {n: y if n in ("A", "D", "dt_bias") else y[:, t] for n, y in x.tensors.items()}
        token = {n: y.to(impl.device) for n, y in token.items()} | {"state": state}
        before = state.clone()

        def call(token=token, before=before) -> dict[str, Tensor]:
            state.copy_(before)
            y = step(*(token.get(n) for n in names), softplus)
            return {"y": y, "state": state.clone()}

        run = impl.under_every_seed if impl.name == "emulator" else lambda call: call()
        tokens.append(run(call)["y"].cpu())
    family = dataclasses.replace(
        FAMILY, definition=partial(FAMILY.definition, dt_softplus=softplus)
    )
    results = {"o": torch.stack(tokens, 1), "final_state 0": state.cpu()}
    assert_rule(results, definition(family, x), x)


test_steps_of_the_operator.applies = lambda impl, name: not impl.tensor_cores or (
    name != "f64" and STEPS[name].get("K", 0) <= 256
)


def step_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.ssd_step."""
    x = {n: t if n in ("A", "D", "dt_bias") else t[:, 0] for n, t in draw(FAMILY).tensors.items()}
    named = {n: x[n] for n in ("x", "dt", "A", "B", "C")} | {"state": torch.randn(2, 4, 10, 12)}
    named |= {n: x[n] for n in ("D", "z", "dt_bias")}
    return [*(named | replaced).values(), True]


def test_step_is_a_sound_operator() -> None:
    op = torch.ops.lsm.ssd_step.default
    torch.library.opcheck(op, step_arguments())
    torch.library.opcheck(op, step_arguments(D=None, z=None, dt_bias=None))
    assert [a.name for a in op._schema.arguments if a.is_write] == ["state"]


BAD_STEPS = {
    "B": (torch.zeros(2, 3, 12), "x must have a multiple of the G = 3 groups of B, got H = 4"),
    "C": (torch.zeros(2, 2, 11), "C must have shape [B, G, N] = [2, 2, 12], got [2, 2, 11]"),
    "dt": (torch.zeros(2, 3), "dt must have shape [B, H] = [2, 4], got [2, 3]"),
    "A": (torch.zeros(4).double(), "A must have dtype float32 like x, or float32, got float64"),
    "D": (torch.zeros(4, 9), "D must have shape [H, P] = [4, 10], got [4, 9]"),
    "z": (torch.zeros(2, 4, 10).half(), "z must have dtype float32 like x, got float16"),
    "dt_bias": (torch.zeros(3), "dt_bias must have shape [H] = [4], got [3]"),
    "state": (
        torch.zeros(2, 4, 12, 10),
        "state must have shape [B, H, P, N] = [2, 4, 10, 12], got [2, 4, 12, 10]",
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_step_refuses(impl: Impl, name: str) -> None:
    bad, text = BAD_STEPS[name]
    arguments = step_arguments(**{name: bad})
    given = [t.to(impl.device) if isinstance(t, Tensor) else t for t in arguments]
    assert_refused(f"lsm::ssd_step: {text}", raw_step(impl), *given)


def test_step_takes_parameters_of_other_dtypes() -> None:
    x, dt, A, B, C, state, D, z, dt_bias, _ = step_arguments()
    run = partial(ops.selective_state_update, dt_softplus=True)
    y = run(state.clone(), x, dt, A, B, C, D, z, dt_bias)
    wide = run(state.clone(), x, dt, A.double(), B, C, D.double(), z.double(), dt_bias.double())
    assert torch.equal(y, wide)


def test_final_states_are_as_the_step_likes_them() -> None:
    """Its engine then works on the state itself."""
    x = arguments()
    _, state = ops.mamba_chunk_scan_combined(**x, return_final_states=True)
    assert state.shape == (2, 4, 10, 12) and state.mT.is_contiguous()
    assert state.dtype == torch.float64


VARIANTS = {
    "D per head": {"D": torch.randn(4).double()},
    "no D": {"D": None},
    "no z": {"z": None},
    "no softplus": {"dt_softplus": False, "dt_limit": (0.01, 0.2)},
    "softplus within limits": {"dt_limit": (0.3, 0.9)},
    "no bias": {"dt_bias": None},
    "no state": {"initial_states": None},
    "segments": {"seq_idx": torch.tensor([SEGMENTS, SEGMENTS[::-1]])},
}


CASES = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16, "T": 70},
    "fp16": {"dtype": torch.float16},
    "packed": {"T": 40, "cu_seqlens": [0, 0, 9, 9, 27, 40]},
}


@pytest.mark.parametrize("case", CASES)
def test_composed_as_on_cuda(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """What takes the place of one pass where kernels do not weigh values."""
    monkeypatch.setattr(ssd_module, "FUSED", set())
    x = draw(FAMILY, **CASES[case])
    assert_rule(gradients(operator(FAMILY), FAMILY, x), definition(FAMILY, x), x)


@pytest.mark.parametrize("V", [16, 64])
def test_work_that_is_cut_for_threads(V: int) -> None:
    """Into segments of time, or columns. Of A and dt_bias one number each is left, the sum of what
    dt's gradient has, with whatever cancels there."""
    x = draw(FAMILY, T=600, B=1, H=1, HV=1, K=256, V=V)
    with threads(2):
        results = gradients(operator(FAMILY), FAMILY, x)
    del results["dA"], results["ddt_bias"]
    assert_rule(results, definition(FAMILY, x), x)


def test_step_sizes_of_zero() -> None:
    """Nothing is written nor decays, and dt has the gradient of what would be."""
    x = draw(FAMILY)
    x.tensors["dt"].fill_(-1), x.tensors["dt_bias"].fill_(1)
    x.tensors["dt"][:, ::3] += 0.5
    scan, definition_ = (
        partial(f, dt_softplus=False, dt_limit=(-1.0, 1.0))
        for f in (FAMILY.chunk, FAMILY.definition)
    )
    family = dataclasses.replace(FAMILY, chunk=scan, definition=definition_)
    results = gradients(operator(family), family, x)
    assert results["ddt"][:, 1::3].any()
    assert_rule(results, definition(family, x), x)


def weighted_arguments(**replaced: Any) -> list[Any]:
    """Of torch.ops.lsm.weighted_gla_fwd."""
    torch.manual_seed(0)
    named: dict[str, Any] = {n: torch.randn(2, 19, 2, 5).double() for n in "qk"}
    named |= {"v": torch.randn(2, 19, 4, 6).double(), "w": torch.randn(2, 19, 4).double()}
    named |= {"g": -torch.rand(2, 19, 4).double(), "S": torch.randn(2, 4, 5, 6).double()}
    named["cu_seqlens"] = None
    return [*(named | replaced).values(), 0.3, True]


def test_whole_sequences_are_a_sound_operator() -> None:
    op = torch.ops.lsm.weighted_gla_fwd.default
    given = weighted_arguments()
    leaves = [t.requires_grad_() if isinstance(t, Tensor) else t for t in given]
    torch.library.opcheck(op, leaves)
    torch.library.opcheck(op, weighted_arguments(S=None))
    assert torch.autograd.gradcheck(lambda *x: op(*x, *given[6:]), leaves[:6], fast_mode=True)
    back = torch.ops.lsm.weighted_gla_bwd.default
    q, k, v, w, g, S, cu_seqlens, *_ = weighted_arguments()
    arguments = [q, k, v, w, g, S, cu_seqlens, 0.3, torch.randn_like(v), torch.randn_like(S)]
    torch.library.opcheck(back, arguments)
    torch.library.opcheck(back, [*arguments[:5], None, None, 0.3, torch.randn_like(v), None, False])
    arguments[0].requires_grad_()
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(back(*arguments)[0].sum(), arguments[0])


BAD_WEIGHTS = {
    "w": (torch.zeros(2, 19, 2), "w must have shape [B, T, HV] = [2, 19, 4], got [2, 19, 2]"),
    "g": (torch.zeros(2, 19, 4), "g must have dtype float64, got float32"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_whole_sequences_refuse(name: str) -> None:
    bad, text = BAD_WEIGHTS[name]
    assert_refused(
        f"lsm::weighted_gla_fwd: {text}",
        torch.ops.lsm.weighted_gla_fwd,
        *weighted_arguments(**{name: bad}),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str) -> None:
    x = arguments(**VARIANTS[variant])
    y, state = ops.mamba_chunk_scan_combined(**x, return_final_states=True)
    expected, last = reference.mamba2(**x)
    torch.testing.assert_close((y, state), (expected, last))
    only = ops.mamba_chunk_scan_combined(**x, chunk_size=256)
    assert torch.equal(only, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_across_segments(dtype: torch.dtype) -> None:
    """No gradient crosses a change of seq_idx; the rest is exact."""

    def segmented(scan):  # type: ignore[no-untyped-def]
        def call(cu_seqlens=None, **rest):  # type: ignore[no-untyped-def]
            seq_idx = torch.tensor([SEGMENTS, SEGMENTS[::-1]])
            return ssd(scan)(**rest, seq_idx=seq_idx)

        return call

    family = row(
        "ssd segments", SSD, chunk=segmented(ops.mamba_chunk_scan_combined), step=lambda: None,
        definition=segmented(reference.mamba2), state=FAMILY.state, sizes=FAMILY.sizes,
    )  # fmt: skip
    x = draw(family, dtype=dtype)
    assert_rule(gradients(operator(family), family, x), definition(family, x), x)


def test_packed_sequences() -> None:
    """mamba_ssm's call for packed sequences, and its three results."""
    x = arguments(initial_states=None)
    per_head = ("A", "D", "dt_bias")
    x |= {n: t[:1] for n, t in x.items() if isinstance(t, Tensor) and n not in per_head}
    bounds = torch.tensor([0, 9, 10, 30, 37])
    y, last, states = ops.mamba_chunk_scan_combined(
        **x, seq_idx=torch.tensor([SEGMENTS]), cu_seqlens=bounds, return_final_states=True,
        return_varlen_states=True,
    )  # fmt: skip
    assert torch.equal(last, states[-1:])
    pair = ops.mamba_chunk_scan_combined(**x, cu_seqlens=bounds, return_varlen_states=True)
    assert torch.equal(pair[0], y) and torch.equal(pair[1], states)
    expected, finals = reference.mamba2(**x, cu_seqlens=bounds)
    torch.testing.assert_close((y, states), (expected, finals))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_decays(dtype: torch.dtype) -> None:
    """dt·A from -50 to 0: finite, and within the rule."""
    x = draw(FAMILY, gate="-1", dtype=dtype)
    x.tensors["dt"].copy_(torch.linspace(-60, 45, x.tensors["dt"].numel()).view(2, 37, 4))
    assert_rule(gradients(operator(FAMILY), FAMILY, x), definition(FAMILY, x), x)
    x.tensors["A"].fill_(-1e4)
    results = gradients(operator(FAMILY), FAMILY, x)
    assert all(t.isfinite().all() for t in results.values())


def test_listing_of_the_paper() -> None:
    """Its quadratic form, from sums over windows."""
    X, B, C = (torch.randn(2, 30, 4, n, dtype=torch.float64) for n in (6, 5, 5))
    A = -torch.rand(2, 30, 4, dtype=torch.float64)
    h0 = torch.randn(2, 1, 4, 6, 5, dtype=torch.float64)
    Y, state = ops.ssd_minimal_discrete(X, A, B, C, 64, h0)
    window = A.mT[..., None].expand(-1, -1, -1, 31).tril(0).cumsum(2)  # token t from before s
    decay = F.pad(window[..., 1:30], (0, 1)).masked_fill(
        ~torch.ones(30, 30).tril().bool(), -torch.inf
    )
    expected = torch.einsum("blhn,bshn,bhls,bshp->blhp", C, B, decay.exp(), X)
    start = window[..., 0].exp()
    expected = expected + torch.einsum("blhn,bhpn,bhl->blhp", C, h0[:, 0], start)
    torch.testing.assert_close(Y, expected)
    scanned = ops.mamba_chunk_scan_combined(
        X, torch.ones(2, 30, 4), torch.zeros(4), B, C, initial_states=h0[:, 0]
    )
    free, _ = ops.ssd_minimal_discrete(X, 0 * A, B, C, initial_states=h0)
    torch.testing.assert_close(free, scanned)
    assert state.shape == (2, 4, 6, 5)


def mixer():  # type: ignore[no-untyped-def]
    """transformers' whole layer with random parameters, to be run in fp64 where it lets one."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = modeling.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=2, num_hidden_layers=1,
        chunk_size=16, use_conv_bias=True, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    layer = modeling.Mamba2Mixer(config, 0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def fused(layer: Any, x: Tensor, **rest: Any) -> Any:
    return ops.mamba_split_conv1d_scan_combined(
        layer.in_proj(x), layer.conv1d.weight.squeeze(1), layer.conv1d.bias, layer.dt_bias,
        -layer.A_log.exp(), layer.D, layer.chunk_size, rmsnorm_weight=layer.norm.weight,
        rmsnorm_eps=layer.norm.variance_epsilon, outproj_weight=layer.out_proj.weight,
        outproj_bias=layer.out_proj.bias, headdim=8, ngroups=2, norm_before_gate=False, **rest,
    )  # fmt: skip


def test_block_is_the_layer_of_transformers() -> None:
    """Convolution, scan, gated norm and projection; with the gradients of every parameter."""
    layer = mixer()
    x = torch.randn(2, 37, 16)
    results = []
    for run in (layer, lambda x: fused(layer, x)):
        y = run(x)
        grads = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        results.append((y, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_block_does_not_look_across_segments() -> None:
    layer = mixer()
    x = torch.randn(1, 37, 16)
    y, state = fused(layer, x, seq_idx=torch.tensor([SEGMENTS]), return_final_states=True)
    bounds = [0, 9, 10, 30, 37]
    parts = [fused(layer, x[:, a:b]) for a, b in pairwise(bounds)]
    torch.testing.assert_close(y, torch.cat(parts, 1))
    torch.testing.assert_close(state, fused(layer, x[:, 30:], return_final_states=True)[1])


def test_block_without_norm_and_projection() -> None:
    """norm_before_gate, and the gate alone."""
    H, P, N = 4, 8, 6
    zxbcdt = torch.randn(2, 20, 2 * H * P + 2 * N + H, dtype=torch.float64)
    weight = torch.randn(H * P + 2 * N, 4, dtype=torch.float64)
    dt_bias, A, D = (torch.rand(H, dtype=torch.float64) for _ in range(3))
    run = lambda **rest: ops.mamba_split_conv1d_scan_combined(  # noqa: E731
        zxbcdt, weight, None, dt_bias, -A, D, headdim=P, activation=None, **rest
    )
    z, xBC, dt = torch.split(zxbcdt, [H * P, H * P + 2 * N, H], -1)
    padded = F.pad(xBC, (0, 0, 3, 0))
    taps = sum(padded[:, w : w + 20] * weight[:, w] for w in range(4))
    x, B, C = torch.split(taps, [H * P, N, N], -1)
    x = x.unflatten(-1, (H, P))
    y, _ = reference.mamba2(
        x, dt, -A, B[:, :, None], C[:, :, None], D, dt_bias=dt_bias, dt_softplus=True
    )
    y = y.flatten(2)
    torch.testing.assert_close(run(), y * F.silu(z))
    norm = torch.rand(H * P, dtype=torch.float64)
    expected = F.rms_norm(y, (H * P,), norm, 1e-3) * F.silu(z)
    torch.testing.assert_close(run(rmsnorm_weight=norm, rmsnorm_eps=1e-3), expected)


def test_errors() -> None:
    x = arguments()
    scan = ops.mamba_chunk_scan_combined
    bad = {
        "dt must have shape [B, T, H] = [2, 37, 4], got [2, 37, 2]": {"dt": x["dt"][..., :2]},
        "A must have shape [H] = [4], got [4, 1]": {"A": x["A"][:, None]},
        "dt_bias must have shape [H] = [4], got [3]": {"dt_bias": x["dt_bias"][:3]},
        "seq_idx must have shape [B, T] = [2, 37], got [37]": {"seq_idx": torch.zeros(37)},
        "D must have shape [H] = [4] or [H, P] = [4, 10], got [10]": {"D": torch.ones(10)},
        "z must have shape [..., H, P] = [2, 37, 4, 10], got [2, 37, 40]": {"z": x["z"].flatten(2)},
    }
    for text, change in bad.items():
        with pytest.raises(RuntimeError) as error:
            scan(**x | change)
        assert str(error.value) == f"lsm::mamba_chunk_scan_combined: {text}"
    with pytest.raises(ValueError, match="return_varlen_states needs cu_seqlens, got None"):
        scan(**x, return_varlen_states=True)
    token = {n: t[:, 0] for n, t in x.items() if n in ("x", "dt", "B", "C")}
    with pytest.raises(ValueError) as error:
        A = torch.zeros(4, 10, 12)
        ops.selective_state_update(torch.zeros(2, 4, 10, 12), **token, A=A)
    assert str(error.value) == (
        "lsm::selective_state_update: A must be one value per head, [H] expanded where it has more "
        "dimensions, got shape [4, 10, 12] with strides [120, 12, 1]"
    )
    split = ops.mamba_split_conv1d_scan_combined
    with pytest.raises(ValueError, match=r"D of shape \[H\] = \[4\] needs headdim, got None"):
        split(torch.zeros(1, 3, 80), None, None, None, None, torch.zeros(4))
    with pytest.raises(ValueError, match="zxbcdt must have 2·32 \\+ 2·1·N \\+ 4 columns, got 79"):
        split(torch.zeros(1, 3, 79), None, None, None, None, torch.zeros(4), headdim=8)
    with pytest.raises(ValueError, match="activation must be silu, swish or None, got 'relu'"):
        split(torch.zeros(1, 3, 80), None, None, None, None, torch.zeros(4), activation="relu")
