"""Memory traffic and matrix work of the chunk and delta engines, counted by the emulator and held
to docs/kernels/chunk.md and docs/kernels/delta.md.

What replaces a profiler where there is no GPU: a pass over memory more than documented fails here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from emulators import emulator

T, H, D = 512, 2, 128
X = T * H * D * 2  # bytes of one bf16 tensor
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels"
TOLERANCE = 0.05


LAUNCHES = {
    "linear_attn": ["forward", "dq", "dk", "dv"],
    "simple_gla": ["forward", "dq", "dk", "dv", "dg"],
    "gla": ["forward", "dq", "dk", "dv", "dg"],
    "gla_value": ["forward", "o", "dv", "dq", "dk", "dg"],
    "rwkv6": ["forward", "first", "dq", "dk", "dv", "first_again", "dg"],
    "ssd": ["forward", "finish", "dq", "dk", "dv", "dg"],
    "mlstm": ["gates", "forward", "divisor", "dq", "dk", "dv", "dg"],
}
ALL = [(op, name) for op, names in LAUNCHES.items() for name in names]
OF_ONE_TOKEN = ("first", "first_again")
each_launch = pytest.mark.parametrize(("op", "name"), ALL)


def documented_traffic(engine: str = "chunk") -> dict[tuple[str, str], tuple[float, float]]:
    row = r"^\| (\w+) (\w+) \| ([\d.]+) \| ([\d.]+) \|"
    rows = re.findall(row, (DOCUMENTED / f"{engine}.md").read_text(), re.MULTILINE)
    return {(op, name): (float(reads), float(writes)) for op, name, reads, writes in rows}


@functools.cache
def launches(op: str, need_dg: bool = True) -> dict[str, dict]:
    """Counters of each launch of a forward and a backward that are not cut into segments."""
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_o = (torch.randn(1, T, H, D, generator=generator).bfloat16() for _ in range(4))
    if op == "ssd":
        dt = torch.rand(1, T, H, generator=generator)
        given = (q, k, v, dt, -dt / 10, dt[0, :H, 0], grad_o)
        emu.reset_counters()
        *_, ungated = torch.ops.lsm_emu.ssd_fwd(*given, None, None, 1.0, False, True)
        torch.ops.lsm_emu.ssd_bwd(*given, ungated, None, None, 1.0, grad_o, None)
        return dict(zip(LAUNCHES[op], emu.counters()["launches"], strict=True))
    if op == "mlstm":
        i, f = (torch.randn(1, T, H, generator=generator) for _ in range(2))
        scale = (1.0, 1e-6)
        emu.reset_counters()
        h, *_, tokens = torch.ops.lsm_emu.mlstm_fwd(
            q, k, v, i, f, None, None, None, None, *scale, True, True, False
        )
        given = (None, None, None, *scale, True, h, tokens, grad_o, None, None)
        torch.ops.lsm_emu.mlstm_bwd(q, k, v, *given)
        return dict(zip(LAUNCHES[op], emu.counters()["launches"], strict=True))
    shape = {"linear_attn": None, "simple_gla": (1, T, H)}.get(op, (1, T, H, D))
    gate = () if shape is None else (-torch.rand(shape, generator=generator) / 10,)
    forward, backward = (getattr(torch.ops.lsm_emu, f"{op}_{kind}") for kind in ("fwd", "bwd"))
    emu.reset_counters()
    forward(q, k, v, *gate, None, None, 1.0, False)
    backward(q, k, v, *gate, None, None, 1.0, grad_o, None, *((need_dg,) if gate else ()))
    counted = emu.counters()["launches"]
    if not need_dg:
        return {str(i): launch for i, launch in enumerate(counted)}
    names = LAUNCHES[op]
    assert len(counted) == len(names), [launch["kernel"] for launch in counted]
    return dict(zip(names, counted, strict=True))


@each_launch
def test_traffic_is_as_documented(op, name):
    reads, writes = documented_traffic()[op, name]
    launch = launches(op)[name]
    assert launch["global_read_bytes"] / X == pytest.approx(reads, rel=TOLERANCE, abs=1e-9)
    assert launch["global_write_bytes"] / X == pytest.approx(writes, rel=TOLERANCE)


@pytest.mark.parametrize(("op", "total"), [("simple_gla", 12.2), ("gla", 18), ("gla_value", 18)])
def test_a_gate_without_gradient_costs_no_more_than_none(op, total):
    moved = sum(
        launch["global_read_bytes"] + launch["global_write_bytes"]
        for name, launch in launches(op, need_dg=False).items()
        if name != "0"  # the forward
    )
    assert moved / X == pytest.approx(total, rel=TOLERANCE)


# One token is less than what sectors are counted in; gates and dots per head lie H apart, and their
# sectors are shared by the blocks of the heads.
OF_WHOLE_SECTORS = [
    (op, name)
    for op, name in ALL
    if name not in OF_ONE_TOKEN and (op not in ("simple_gla", "ssd", "mlstm") or name == "forward")
]


@pytest.mark.parametrize(("op", "name"), OF_WHOLE_SECTORS)
def test_every_sector_is_used(op, name):
    launch = launches(op)[name]
    asked = launch["global_read_bytes"] + launch["global_write_bytes"]
    moved = 32 * (launch["global_read_sectors"] + launch["global_write_sectors"])
    assert moved <= (1 + TOLERANCE) * asked


@pytest.mark.parametrize(
    ("op", "name"),
    [pair for pair in ALL if pair[1] not in ("dg", "finish", "gates", "divisor", *OF_ONE_TOKEN)],
)
def test_matrix_work(op, name):
    """84 HMMA per warp and block; the strict sweeps by channels 88, dq with dg per head 90. Sums
    are 16 more along the contraction, one per row tile on rows."""
    strict = {
        *(("gla", "dq"), ("gla", "dk"), ("gla_value", "o"), ("gla_value", "dv")),
        *(("rwkv6", "dq"), ("rwkv6", "dk")),
    }
    pairs = name == "dq" and op in ("simple_gla", "ssd", "mlstm")
    hmma = 90 if pairs else 88 if (op, name) in strict else 84
    if op == "mlstm":
        hmma += {"forward": 16, "dq": 2, "dk": 2, "dv": 0}[name]
    warps, blocks = 4 * H, T // 16
    launch = launches(op)[name]
    assert launch["mma_instructions"] == hmma * warps * blocks
    assert launch["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("op", [*(op for op in LAUNCHES if op not in ("ssd", "mlstm")), "gla_both"])
def test_traffic_of_the_exact_recurrence(op):
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    draw = torch.Generator().manual_seed(0)
    shape = 1, 256, 1, 64
    q, k, v, grad_o = (torch.randn(shape, generator=draw) for _ in range(4))
    gates = {"linear_attn": (), "simple_gla": (shape[:3],), "gla_both": (shape, shape)}
    own = [-torch.rand(g, generator=draw) / 10 for g in gates.get(op, (shape,))]
    forward, backward = (getattr(torch.ops.lsm_emu, f"{op}_{kind}") for kind in ("fwd", "bwd"))
    for name, call, grads in (
        ("forward", forward, (False,)),
        ("backward", backward, (grad_o, None)),
    ):
        emu.reset_counters()
        call(q, k, v, *own, None, None, 1.0, *grads)
        counted = emu.counters()["launches"]
        moved = [
            sum(launch[f"global_{kind}_bytes"] for launch in counted) / (4 * q.numel())
            for kind in ("read", "write")
        ]
        assert moved == pytest.approx(documented_traffic("recurrence")[op, name], rel=TOLERANCE), (
            name
        )


EXACT = {  # of the delta engine, on CUDA cores
    "gated_delta_rule": ["forward", "states", "reverse", "rows", "dg", "dbeta"],
    "kda": ["forward", "states", "reverse", "rows", "dbeta"],
    "dplr": ["forward", "states", "reverse", "rows"],
}


def delta_launches(op: str, dtype: torch.dtype, names: list[str]) -> dict[str, dict]:
    """Counters of each launch of a forward and a backward of the delta engine."""
    emu = emulator("_emu")
    emu.set_seed(0)
    draw = torch.Generator().manual_seed(0)
    heads, keys = (1, T, 1), (1, T, 1, D)
    q, k, v, grad_o, a, b = (
        (torch.randn(keys, generator=draw) / D**0.5).to(dtype) for _ in range(6)
    )
    gate = -torch.rand(heads if op == "gated_delta_rule" else keys, generator=draw).to(dtype) / 10
    own = (a, b, gate) if op == "dplr" else (gate, torch.rand(heads, generator=draw))
    forward, backward = (getattr(torch.ops.lsm_emu, f"{op}_{kind}") for kind in ("fwd", "bwd"))
    emu.reset_counters()
    forward(q, k, v, *own, None, None, 1.0, False)
    backward(q, k, v, *own, None, None, 1.0, grad_o, None)
    counted = emu.counters()["launches"]
    assert len(counted) == len(names), [launch["kernel"] for launch in counted]
    return dict(zip(names, counted, strict=True))


@pytest.mark.parametrize("op", EXACT)
def test_traffic_of_the_exact_delta_recurrence(op):
    documented = documented_traffic("delta")
    for name, launch in delta_launches(op, torch.float32, EXACT[op]).items():
        moved = [launch[f"global_{kind}_bytes"] / (T * D * 4) for kind in ("read", "write")]
        assert moved == pytest.approx(documented[op, name], rel=TOLERANCE, abs=0.005), name


CHUNKED = ["prepare", "chain", "prepare_again", "chain_states", "chain_reverse", "gradients"]


@pytest.mark.parametrize("op", ["gated_delta_rule", "kda", "dplr"])
def test_traffic_of_the_delta_rule_in_chunks(op):
    documented = documented_traffic("delta")
    for name, launch in delta_launches(op, torch.bfloat16, CHUNKED).items():
        moved = [launch[f"global_{kind}_bytes"] / (T * D * 2) for kind in ("read", "write")]
        assert moved == pytest.approx(documented[op, name], rel=TOLERANCE, abs=0.02), name
        if name.startswith("chain"):
            assert launch["ldmatrix_conflicts"] == 0


@pytest.mark.parametrize("op", ["simple_gla", "ssd", "kda"])
def test_a_step_moves_the_state_once(op):
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, D, generator=draw).bfloat16() for _ in range(3))
    heads, state = torch.rand(2, 2), torch.randn(2, 2, D, D, generator=draw)
    given = {
        "simple_gla": (q, k, v, -heads, state, 1.0),
        "ssd": (v, heads, -heads[0], k, q, state.mT, heads[0], v, heads[0], True),
        "kda": (q, k, v, -torch.rand(2, 2, D), heads, state, 1.0),
    }
    emu.reset_counters()
    getattr(torch.ops.lsm_emu, f"{op}_step")(*given[op])
    (launch,) = emu.counters()["launches"]
    states = state.numel() * 4
    for kind in ("read", "write"):  # sectors: numbers of a head are one request of a warp
        assert 1 <= 32 * launch[f"global_{kind}_sectors"] / states < 1.15, kind
