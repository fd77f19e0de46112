"""RWKV-4's running average, the CUDA kernels on the emulator: definition, schedules, traffic,
poison."""

from __future__ import annotations

import pytest
import torch
import wkv4
from checks import assert_accepted, assert_same_bits
from emulators import emulator
from impls import Emulator
from inputs import Inputs, Tensors
from torch import Tensor

from lsm_cuda import reference


def run(emu: Emulator, x: Inputs, scale: Tensor | None) -> Tensors:
    def raw(kind: str):  # type: ignore[no-untyped-def]
        emulator(emu.flavour)
        return getattr(getattr(torch.ops, f"lsm{emu.flavour}"), f"wkv4_{kind}")

    def call() -> Tensors:
        t, r = x.tensors, x.tensors["w"].exp()
        state = wkv4.state_of(t, scale) or (None,) * 3
        common = (r, t["u"], t["k"], t["v"], *state, x.cu_seqlens)
        o, *final, states = raw("fwd")(*common, True, x.output_final_state)
        grads, last = (None, None), None
        if x.grad_final_state is not None:
            last = final[2]
            grads = tuple(x.grad_final_state * last.exp())
        channels, dk, dv, *first = raw("bwd")(*common, states, last, x.grad_o, *grads)
        found = {"o": o, "dk": dk, "dv": dv, "dw": channels[0] * r, "du": channels[1]}
        if scale is not None:
            found |= {"dnumerator": first[0], "ddenominator": first[1]}
        return found | ({"final_state": wkv4.sums(final)} if x.output_final_state else {})

    return emu.under_every_seed(call)


CASES = [
    ((37, 20, 2, 1.0, True, "f32"), 1),
    ((70, 33, "int32", 8.0, True, "bf16"), 1),
    ((100, 16, 1, 27.0, False, "f16"), 1),
    ((300, 16, 1, 1.0, True, "f32"), 64),  # in segments
    ((300, 8, "int64", 27.0, True, "bf16"), 64),
    ((2300, 8, 1, 1.0, True, "f32"), 64),  # more than a group of them
    ((0, 8, 2, 1.0, True, "f32"), 1),
]


@pytest.mark.parametrize(("case", "multiprocessors"), CASES, ids=str)
def test_definition_under_every_schedule(case: tuple, multiprocessors: int) -> None:
    x, scale = wkv4.draw(*case)
    truth, same = (
        wkv4.results(reference.wkv4, x.map(lambda t, d=d: t.to(d)), scale)
        for d in (torch.float64, torch.float32)
    )
    plain = run(Emulator("_emu", "_emu", (0, 1, 2), multiprocessors), x, scale)
    assert_accepted(plain, truth, same, x)
    race = Emulator("_emu_race", "_emu_race", (1,), multiprocessors)
    assert_same_bits(plain, run(race, x, scale))


@pytest.mark.parametrize(
    ("T", "D", "dtype", "multiprocessors"),
    [
        (1, 3, "f32", 1), (65, 70, "bf16", 1), (37, 16, "f16", 1), (0, 8, "f32", 1),
        # in segments that wait for each other, in both passes; columns in turns
        (150, 136, "f32", 4), (300, 200, "bf16", 6), (260, 8, "f16", 16),
        # more of them than can run at once
        (700, 16, "f32", 2), (600, 8, "bf16", 1),
    ],
)  # fmt: skip
def test_both_directions_under_every_schedule(
    T: int, D: int, dtype: str, multiprocessors: int
) -> None:
    x = wkv4.draw_both(T, D, dtype)

    def run(flavour: str, seeds: tuple[int, ...]) -> Tensors:
        emulator(flavour)
        ops = getattr(torch.ops, f"lsm{flavour}")
        w, u, k, v = (x.tensors[n] for n in "wukv")
        u = torch.cat([u, u])[D:]  # at any address
        given = (w / max(T, 1), u, k, v)

        def call() -> Tensors:
            o = ops.bi_wkv_fwd(*given)
            channels, dk, dv = ops.bi_wkv_bwd(*given, x.grad_o)
            return {"o": o, "dk": dk, "dv": dv, "dw": channels[0] / max(T, 1), "du": channels[1]}

        return Emulator(flavour, flavour, seeds, multiprocessors).under_every_seed(call)

    got = run("_emu", (0, 1, 2))
    assert_accepted(got, *wkv4.both_expected(x), x)
    assert_same_bits(got, run("_emu_race", (1,)))


def test_traffic_is_the_floor() -> None:
    """k v -> o; dy k v -> dk dv; and three numbers per channel and 32 tokens. In both directions
    without those."""
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    T, D = 256, 256
    X, saved = T * D * 2, T // 32 * 3 * D * 4
    k, v, dy = torch.randn(3, 1, T, D).bfloat16()
    r, u = torch.rand(2, D)
    ops, none = torch.ops.lsm_emu, (None,) * 4
    emu.reset_counters()
    *_, states = ops.wkv4_fwd(r, u, k, v, *none, True, False)
    ops.wkv4_bwd(r, u, k, v, *none, states, None, dy, None, None)
    forward, backward, *_ = emu.counters()["launches"]
    emu.reset_counters()
    ops.bi_wkv_fwd(r, u, k[:, :48], v[:, :48])
    ops.bi_wkv_bwd(r, u, k[:, :48], v[:, :48], dy[:, :48])
    both_forward, both_backward, *_ = emu.counters()["launches"]
    x, rates = X * 48 // T, 8 * 2 * D * 4  # every warp asks for r and u
    for launch, floor in (
        (forward, 3 * X + saved),
        (backward, 5 * X + saved),
        (both_forward, 3 * x + rates),
        (both_backward, 5 * x + rates + 2 * D * 4),
    ):
        assert launch["global_read_bytes"] + launch["global_write_bytes"] <= 1.05 * floor
        sectors = launch["global_read_sectors"] + launch["global_write_sectors"]
        assert 32 * sectors <= 1.15 * floor


@pytest.mark.parametrize("boundaries", [[0, 9, 4, 40], [1, 5, 9, 40], [0, 5, 9, 39]])
def test_impossible_boundaries_give_nan(boundaries: list[int]) -> None:
    x, _ = wkv4.draw(40, 16, 1, 1.0, False, "f32")
    t, cu = x.tensors, torch.tensor(boundaries)
    state = torch.rand(3, 3, 16).unbind()
    emulator("_emu").set_multiprocessors(8)
    ops, common = torch.ops.lsm_emu, (t["w"].exp(), t["u"], t["k"], t["v"], *state, cu)
    o, *final, states = ops.wkv4_fwd(*common, True, True)
    grads = ops.wkv4_bwd(*common, states, final[2], x.grad_o, *state[:2])
    assert all(t.isnan().all() for t in (o, *final, *grads))
