"""Operators in the race build under AddressSanitizer's library, in a process of its own: bounds of
global memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from emulators import checking_bounds, missing

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import OPS, Case
from emulators import emulator
from impls import Emulator
from inputs import make_inputs

assert emulator("_emu_race").checks_bounds()
emu = Emulator("bounds", "_emu_race", seeds=(0,))
for op in OPS:
    for T, dims, dtype in ((75, (64, 64), "bf16"), (20, (40, 24), "f16"), (9, (24, 24), "f32")):
        x = make_inputs(Case(op, T=T, dims=dims, dtype=dtype, state="both"))
        emu.run(op, x)
        emu.step(op, {name: t[:, 0] for name, t in x.tensors.items()}, x.initial_state)
        print(op, dtype, "done")

import torch

lsm = torch.ops.lsm_emu_race
for T, K, V, dtype in (
    (75, 5, 7, torch.float32), (37, 8, 72, torch.bfloat16), (9, 24, 70, torch.float16)
):
    q, k, v = (torch.randn(1, T, 2, D).to(dtype) for D in (K, K, V))
    cu_seqlens = torch.tensor([0, 2, 2, T])
    options = 0.3, 1e-6, True, True
    o, S, z, tokens = lsm.polynomial_attn_fwd(q, k, v, None, None, cu_seqlens, *options, True)
    given = (q, k, v, S, z, cu_seqlens, *options, o, tokens, v, S, z)
    lsm.polynomial_attn_bwd(*given)
    lsm.polynomial_attn_step(q[:, 0], k[:, 0], v[:, 0], S[:1].clone(), z[:1].clone(), *options)
    print("polynomial_attn", dtype, "done")
for T, K, V, bounds in ((75, 64, 128, None), (37, 10, 12, [0, 2, 2, 37]), (9, 256, 200, None)):
    q, k = torch.randn(2, 1, T, 1, K).bfloat16()
    v, z, grad = torch.randn(3, 1, T, 2, V).bfloat16()
    w, D, cu_seqlens = torch.rand(1, T, 2), torch.rand(2, V), bounds and torch.tensor(bounds)
    S, given = torch.randn(3 if bounds else 1, 2, K, V), (q, k, v, w, -w, D, z)
    o, _, ungated = lsm.ssd_fwd(*given, S, cu_seqlens, 1.0, True, True)
    lsm.ssd_bwd(*given, ungated, S, cu_seqlens, 1.0, grad, S)
    print("ssd", V, "done")
    i, f, n, options = w.log(), 3 * w, S[..., 0].abs(), (0.3, 1e-6, True)
    given, ends = (q, k, v, i, f, S, n, n[..., 0], cu_seqlens, *options), (True, True)
    h, *_, tokens = lsm.mlstm_fwd(*given, *ends)
    lsm.mlstm_bwd(q, k, v, S, n, cu_seqlens, *options, h, tokens, grad, S, n)
    print("mlstm", V, "done")
for T, D, W, dtype, norm in (
    (75, 64, 4, torch.bfloat16, 32), (37, 7, 3, torch.float16, 0), (9, 24, 8, torch.float32, 4),
    (1027, 3, 4, torch.float16, 0),
):
    for first in (False, True):
        x, grad = torch.randn(2, 2, T, D).to(dtype)
        if first:
            x, grad = (t.mT.contiguous().mT for t in (x, grad))
        weight, bias, state = (torch.randn(*s).to(dtype) for s in ((D, W), (D,), (2, D, W)))
        rows = (x, weight, bias, state, None, None, True)
        y, final = lsm.causal_conv1d_fwd(*rows, W, norm)
        lsm.causal_conv1d_bwd(*rows, grad, final, True, norm)
        lsm.causal_conv1d_step(x[:, :1], state, weight, bias, None, None, True)
        print("causal_conv1d", dtype, "done")
for T, D, S, dtype in (
    (37, 7, 5, torch.float32), (300, 64, 16, torch.bfloat16), (21, 600, 16, torch.bfloat16)
):
    u, dt, z, grad = torch.randn(4, 1, T, D).to(dtype)
    B, C = torch.randn(2, 1, T, 1, S).to(dtype)
    A, skip, bias, h = -torch.rand(D, S), torch.rand(D), torch.rand(D), torch.zeros(1, D, S)
    for first in (False, True):
        tokens = (u, dt, z, grad, B, C)
        if first:
            tokens = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in tokens)
        u, dt, z, grad, B, C = tokens
        for gate in (z, None):
            rows = (u, dt, A, B, C, skip, gate, bias, h, None, None, True)
            y, final, states = lsm.selective_scan_fwd(*rows, True, True)
            lsm.selective_scan_bwd(*rows, states, grad, final)
    lsm.selective_scan_step(u[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], skip, z[:, 0], bias, h, True)
    print("selective_scan", dtype, "done")
for T, D, dtype in ((9, 64, torch.bfloat16), (5, 7, torch.float32)):
    x, R = torch.randn(2, T, 4, 2, D).to(dtype), torch.randn(2, D, 4, D)
    state, transposed = torch.ones(2, 4, 2, D), R.permute(0, 2, 3, 1).contiguous()
    y, cells, final = lsm.slstm_fwd(x, R, state, None, True, True)
    lsm.slstm_bwd(x.float(), transposed, cells, state, None, y.float(), final)
    lsm.slstm_step(x[:, 0], R, state)
    print("slstm", dtype, "done")

from attention import Attn, make, run

for attn in (
    Attn(Tq=70, Tk=75, heads=(4, 2, 2), dims=(128, 72), blocks=(64, 32), dtype="bf16"),
    Attn(Tq=37, Tk=45, heads=(4, 2, 1), extras=("bias", "ramp"), dtype="f16"),
    Attn(Tq=30, Tk=90, heads=(4, 1, 1), blocks=(1, 16), dtype="bf16", lists="capacity"),
    Attn(Tq=60, Tk=45, heads=(2, 1, 1), batch="int64", mask={"causal": True}, dtype="bf16"),
    Attn(Tq=21, Tk=33, heads=(2, 1, 1), dims=(256, 200), extras=("bias", "sinks"), dtype="bf16"),
    Attn(Tq=21, Tk=33, heads=(2, 1, 2), extras=("bias", "ramp", "softcap"), dims=(24, 8)),
    Attn(Tq=21, Tk=33, heads=(2, 1, 1), dims=(576, 512), extras=("bias", "ramp"), dtype="bf16"),
    Attn(Tq=21, Tk=33, heads=(2, 1, 1), dims=(300, 512), extras=("bias", "ramp")),
):
    run(emu, make(attn))
    print("attention", attn, "done")

from lsm_cuda.ops import AttnMask, BlockChoice, ScoreRule, _sparse_attn, selection

causal = AttnMask(causal=True)
for dtype in (torch.bfloat16, torch.float32):
    q, k, v = (torch.randn(s).to(dtype) for s in ((1, 2, 6, 40), (5, 16, 2, 40), (5, 16, 2, 24)))
    table, length = (torch.tensor(n, dtype=torch.int32) for n in ([[4, 0, 2, 3, 1]], [71]))
    given = _sparse_attn._arguments("", q, None, causal, None, 0.0, None, None, None, 0.0)
    o, lse = lsm.sparse_attn_decode(q, k, v, length, table, *given)
    lsm.merge_attn_states_bwd(o[None], lse[None], o, lse, o, lse)
    for packed in (1, 2):
        codes = [torch.ones(5, 16, 2, n // packed, dtype=torch.uint8) for n in (48, 32)]
        rows = [torch.randn(5, 16, 2, 2) for _ in codes]
        coded = torch.randn(1, 2, 6, 48).to(dtype)
        lsm.sparse_attn_decode_codes(coded, *codes, *rows, length, table, *given)
    lsm.kv_cache_update(k, v, k[:1, :2], v[:1, :2], length, table)
    q, k = torch.randn(1, 20, 8, 40).to(dtype), torch.randn(1, 130, 2, 40).to(dtype)
    rule, choice = ScoreRule.compressed(8, 4, 16), BlockChoice(top_k=3, top_p=0.9, first=1)
    pooled = lsm.block_pool(k, None, None, None, 8, 4, 0, False)
    for kind in (0, 3):
        pool = (k, None, None, None, 8, 4, kind, True)
        lsm.block_pool_bwd(*pool, y := lsm.block_pool(*pool), y)
    given = selection._arguments(q, pooled, rule, None, None, None, None, None, 9)
    lsm.block_select(*given, *choice._arguments(rule, 9))
    scores = lsm.block_scores(*given)
    lsm.block_topk(scores, None, None, None, 20, given[-1], *choice._arguments(rule, 9))
    print("decode and selection", dtype, "done")

for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for K in (33, 64):
        q, k, g = (torch.randn(2, 11, 3, K).to(dtype) for _ in range(3))
        beta, A_log, bias = torch.randn(2, 11, 3).to(dtype), torch.randn(3), torch.randn(3 * K)
        given = (q, k, g, beta, A_log, bias, True, None, 1.0, 1e-6)
        lsm.delta_inputs_bwd(*given, *lsm.delta_inputs_fwd(*given))
        print("inputs of delta rules", dtype, K, "done")
"""


def test_no_access_outside_a_tensor() -> None:
    if why := missing("_emu_race"):
        pytest.skip(why)
    environment = checking_bounds()
    run = [sys.executable, "-c", SCRIPT, str(Path(__file__).resolve().parents[1])]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
