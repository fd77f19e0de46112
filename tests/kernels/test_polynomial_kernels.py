"""Polynomial attention's CUDA kernels on the emulator: no features in memory, races, poison."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from emulators import emulator
from torch import Tensor

T, H, K, V = 96, 2, 16, 64
X = T * H * V * 2  # bytes of v in bf16
DOCUMENTED = Path(__file__).resolve().parents[2] / "docs" / "kernels" / "chunk.md"
LAUNCHES = {
    torch.float16: ("forward", "divisors", "dq", "dk_dv"),
    torch.bfloat16: ("bf16 forward", "divisors", "bf16 dq", "bf16 dv", "bf16 dk"),
}


def call(
    lsm: Any, T: int, K: int, V: int, dtype: torch.dtype, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, T, H, K, generator=draw).to(dtype) for _ in range(2))
    v, grad_o = (torch.randn(1, T, H, V, generator=draw).to(dtype) for _ in range(2))
    given = (q, k, v, None, None, cu_seqlens, 0.25, 1e-6, True, True)
    o, *last, tokens = lsm.polynomial_attn_fwd(*given, cu_seqlens is not None)
    *gradients, _, _ = lsm.polynomial_attn_bwd(*given, o, tokens, grad_o, None, None)
    if cu_seqlens is None:
        return o, *gradients
    step = (*(x[:, 0] for x in (q, k, v)), *(s[:1] for s in last), 0.25, 1e-6, True, True)
    return o, *gradients, *last, lsm.polynomial_attn_step(*step)


def documented(name: str) -> tuple[float, float]:
    row = rf"^\| polynomial_attn {name} \| ([\d.]+) \| ([\d.]+) \|"
    found = re.search(row, DOCUMENTED.read_text(), re.MULTILINE)
    assert found is not None, name
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("dtype", LAUNCHES, ids=str)
def test_features_are_written_nowhere(dtype: torch.dtype) -> None:
    """Launch by launch, bytes as documented: of 160 features of q and of k, those written alone
    would be 5 tensors as large as v."""
    emu = emulator("_emu")
    emu.set_multiprocessors(1)
    emu.set_seed(0)
    emu.reset_counters()
    call(torch.ops.lsm_emu, T, K, V, dtype)
    launches = emu.counters()["launches"]
    names = LAUNCHES[dtype]
    assert len(launches) == len(names), [launch["kernel"] for launch in launches]
    for name, launch in zip(names, launches, strict=True):
        reads, writes = documented(name)
        assert launch["global_read_bytes"] / X == pytest.approx(reads, rel=0.02), name
        assert launch["global_write_bytes"] / X == pytest.approx(writes, rel=0.02), name
        assert launch["atomics"] == 0


@pytest.mark.parametrize(
    ("T", "K", "V", "dtype"),
    [
        (70, 5, 9, torch.float32),
        (19, 16, 70, torch.bfloat16),
        (9, 24, 5, torch.float16),
        (150, 16, 72, torch.bfloat16),
    ],
)
def test_no_races(T: int, K: int, V: int, dtype: torch.dtype) -> None:
    emu = emulator("_emu_race")
    emu.set_multiprocessors(8)
    for seed in (1, 2):
        emu.set_seed(seed)
        cu_seqlens = torch.tensor([0, 2, T])
        call(torch.ops.lsm_emu_race, T, K, V, dtype, cu_seqlens)


@pytest.mark.parametrize(("K", "V", "dtype"), [(5, 9, torch.float32), (8, 72, torch.bfloat16)])
@pytest.mark.parametrize("cuts", [[0, 5, 3, 20], [1, 20], [0, 19]])
def test_bad_boundaries_give_nan_everywhere(
    cuts: list[int], K: int, V: int, dtype: torch.dtype
) -> None:
    emu = emulator("_emu")
    emu.set_seed(1)
    results = call(torch.ops.lsm_emu, 20, K, V, dtype, torch.tensor(cuts))
    for t in results[:4]:
        assert t.isnan().all()
    S, z = results[4:6]
    assert S.isnan().all() and z.isnan().all()
