"""The gate on memory traffic: what the emulator counts for every kernel, held to a baseline.

    python benchmarks/counters.py            # compare; 1 if anything grew by more than a tenth
    python benchmarks/counters.py --update   # the counts of this tree are the baseline from now on

A GPU's profiler in CI, where there is no GPU: bytes, sectors, matrix FLOPs and bank conflicts are
exact and the same on every machine. Calls are chosen so that every kernel is in one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from attention import TENSORS  # noqa: E402
from cases import OPS, Case  # noqa: E402
from emulated import emulator  # noqa: E402
from inputs import make_inputs  # noqa: E402
from scans import SCANS, ScanCase, draw_scan  # noqa: E402

from lsm_cuda.ops import (  # noqa: E402
    AttnMask,
    BlockChoice,
    BlockLists,
    ScoreRule,
    _sparse_attn,
    selection,
)

BASELINE = ROOT / "benchmarks" / "baselines" / "counters.json"
GROWTH = 1.1
COUNTED = (
    "global_read_bytes", "global_write_bytes", "global_read_sectors", "global_write_sectors",
    "mma_flops", "ldmatrix_conflicts", "atomics",
)  # fmt: skip

Counts = dict[str, dict[str, dict[str, int]]]  # call -> launch -> counter -> count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    counted = count(emulator())
    if parser.parse_args().update:
        BASELINE.parent.mkdir(exist_ok=True)
        BASELINE.write_text(json.dumps(counted, indent=1) + "\n")
        return 0
    found = regressions(json.loads(BASELINE.read_text()), counted)
    print("\n".join(found) or f"{sum(map(len, counted.values()))} launches as in the baseline")
    return 1 if found else 0


def count(emu: Any) -> Counts:
    """Every launch of every operator: each dtype's kernels, on a sequence that is whole, cut into
    segments, and packed."""
    emu.set_seed(0)
    counted: Counts = {}
    for name, multiprocessors, run in calls():
        emu.set_multiprocessors(multiprocessors)
        emu.reset_counters()
        run()
        launches = emu.counters()["launches"]
        counted[name] = {
            f"{i} {launch['kernel']}": {c: launch[c] for c in COUNTED if launch[c]}
            for i, launch in enumerate(launches, 1)
        }
    return counted


def calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, multiprocessors of the GPU that the launcher sees, and the call."""
    for op in OPS:
        forward, backward, step = (op.raw(kind, "lsm_emu") for kind in ("fwd", "bwd", "step"))
        for dtype in ("bf16+f32", "f16+f32", "f32"):
            for kind, multiprocessors, sizes in (
                ("whole", 1, {"T": 64, "heads": (2, 2), "dims": (64, 64)}),
                ("cut", 64, {"T": 544, "dims": (64, 64)}),
                ("packed", 1, {"T": 80, "dims": (128, 64), "batch": "int32"}),
            ):
                x = make_inputs(Case(op, dtype=dtype, state="both", **sizes))
                common = (*x.tensors.values(), x.initial_state, x.cu_seqlens, 1.0)
                name = f"{op} {kind} {dtype}"
                yield f"{name} forward", multiprocessors, partial(forward, *common, True)
                gradients = (x.grad_o, x.grad_final_state)
                yield f"{name} backward", multiprocessors, partial(backward, *common, *gradients)
                if kind == "whole":
                    timed = {n for n, dims in op.tensors.items() if "T" in dims.split()}
                    token = [t[:, 0] if n in timed else t for n, t in x.tensors.items()]
                    run = partial(step, *token, x.initial_state.clone(), 1.0)
                    yield f"{name} step", multiprocessors, run
    yield from wide_delta_calls()
    yield from scan_calls()
    yield from conv_calls()
    yield from slstm_calls()
    yield from selective_calls()
    yield from wkv4_calls()
    yield from attention_calls()
    yield from decode_calls()
    yield from selection_calls()
    yield from mlstm_calls()
    yield from ssd_calls()
    yield from polynomial_calls()
    yield from delta_inputs_calls()


def wide_delta_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Of keys whose state two warps share."""
    for op in (op for op in OPS if op.name in ("gated_delta_rule", "comba")):
        sizes = {"T": 64, "heads": (1, 1), "dims": (256, 64)}
        x = make_inputs(Case(op, dtype="bf16+f32", state="both", **sizes))
        common = (*x.tensors.values(), x.initial_state, x.cu_seqlens, 1.0)
        yield f"{op} wide bf16+f32 forward", 1, partial(op.raw("fwd", "lsm_emu"), *common, True)
        gradients = (x.grad_o, x.grad_final_state)
        backward = partial(op.raw("bwd", "lsm_emu"), *common, *gradients)
        yield f"{op} wide bf16+f32 backward", 1, backward


def mlstm_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, generator=draw).bfloat16() for _ in range(3))
    i, f, m = (torch.randn(2, 2, generator=draw) for _ in range(3))
    C, n = torch.randn(2, 2, 64, 64, generator=draw), torch.randn(2, 2, 64, generator=draw)
    given = (q, k, v, i, f, C, n, m, 0.1, 1e-6, True, True)
    yield "mlstm step bfloat16", 1, partial(torch.ops.lsm_emu.mlstm_step, *given)
    for kind, multiprocessors, T, V in (
        ("whole", 1, 64, 64),
        ("wide", 1, 64, 128),
        ("cut", 64, 544, 64),
    ):
        q, k = (torch.randn(1, T, 1, 64, generator=draw).bfloat16() for _ in range(2))
        v, grad = (torch.randn(1, T, 2, V, generator=draw).bfloat16() for _ in range(2))
        i, f = (torch.randn(1, T, 2, generator=draw) for _ in range(2))
        C, n = torch.randn(1, 2, 64, V, generator=draw), torch.rand(1, 2, 64, generator=draw)
        given, options = (q, k, v, i, f, C, n, m[:1], None), (0.1, 1e-6, True)
        forward = partial(torch.ops.lsm_emu.mlstm_fwd, *given, *options, True, True)
        yield f"mlstm {kind} forward", multiprocessors, forward
        tokens = (
            torch.rand(4, 1, 2, T, generator=draw)
            * torch.tensor([-1.0, 1, 1, 1])[:, None, None, None]
        )
        given = (q, k, v, C, n, None, *options, grad, tokens, grad, C, n)
        backward = partial(torch.ops.lsm_emu.mlstm_bwd, *given)
        yield f"mlstm {kind} backward", multiprocessors, backward


def ssd_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    draw = torch.Generator().manual_seed(0)
    x, z = (torch.randn(2, 2, 64, generator=draw).bfloat16() for _ in range(2))
    B, C = (torch.randn(2, 1, 64, generator=draw).bfloat16() for _ in range(2))
    dt, state = torch.randn(2, 2, generator=draw), torch.randn(2, 2, 64, 64, generator=draw)
    A, D, bias = (torch.randn(2, generator=draw) for _ in range(3))
    given = (x, dt, -A.exp(), B, C, state, D, z, bias, True)
    yield "ssd step bfloat16", 1, partial(torch.ops.lsm_emu.ssd_step, *given)
    for kind, multiprocessors, T, V in (
        ("whole", 1, 64, 64),
        ("wide", 1, 64, 128),
        ("cut", 64, 544, 64),
    ):
        q, k = (torch.randn(1, T, 1, 64, generator=draw).bfloat16() for _ in range(2))
        v, z, grad = (torch.randn(1, T, 2, V, generator=draw).bfloat16() for _ in range(3))
        w, S = torch.rand(1, T, 2, generator=draw), torch.randn(1, 2, 64, V, generator=draw)
        given = (q, k, v, w, -w, D, z)
        forward = partial(torch.ops.lsm_emu.ssd_fwd, *given, S, None, 1.0, True, True)
        yield f"ssd {kind} forward", multiprocessors, forward
        backward = partial(torch.ops.lsm_emu.ssd_bwd, *given, grad, S, None, 1.0, grad, S)
        yield f"ssd {kind} backward", multiprocessors, backward


def polynomial_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Based's: on tensor cores, whole and cut with shares of columns; in fp32 its features in one
    block, whole and cut, then with shares of slices and columns."""
    ops = torch.ops.lsm_emu
    for kind, multiprocessors, T, K, V, dtype in (
        ("tensor", 1, 64, 16, 64, torch.bfloat16),
        ("tensor cut", 8, 288, 16, 96, torch.bfloat16),
        ("whole", 1, 64, 16, 64, torch.float16),
        ("cut", 64, 160, 16, 64, torch.float32),
        ("small", 1, 24, 8, 64, torch.float32),
        ("shared", 1, 24, 24, 96, torch.float32),
    ):
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, T, 1, K, generator=draw).to(dtype) for _ in range(2))
        v, grad = (torch.randn(1, T, 1, V, generator=draw).to(dtype) for _ in range(2))
        common = (q, k, v, None, None, None, K**-0.5, 1e-6, True, True)
        forward = partial(ops.polynomial_attn_fwd, *common)
        yield f"polynomial_attn {kind} forward", multiprocessors, partial(forward, True)
        o, S, z, tokens = forward(True)
        given = (o, tokens, grad, S, z)
        backward = partial(ops.polynomial_attn_bwd, *common, *given)
        yield f"polynomial_attn {kind} backward", multiprocessors, backward
        token = (*(x[:, 0] for x in (q, k, v)), S, z, K**-0.5, 1e-6, True, True)
        step = partial(ops.polynomial_attn_step, *token)
        yield f"polynomial_attn {kind} step", multiprocessors, step


def delta_inputs_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """KDA's: unit rows, decays of channels and strengths."""
    ops = torch.ops.lsm_emu
    for dtype in (torch.bfloat16, torch.float32):
        draw = torch.Generator().manual_seed(0)
        q, k, g = (torch.randn(2, 40, 2, 64, generator=draw).to(dtype) for _ in range(3))
        beta = torch.randn(2, 40, 2, generator=draw).to(dtype)
        A_log, bias = torch.randn(2, generator=draw), torch.randn(128, generator=draw)
        common = (q, k, g, beta, A_log, bias, True, None, 1.0, 1e-6)
        forward = partial(ops.delta_inputs_fwd, *common)
        name = f"delta_inputs {str(dtype)[6:]}"
        yield f"{name} forward", 1, forward
        yield f"{name} backward", 1, partial(ops.delta_inputs_bwd, *common, *forward())


def decode_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """A cache in pages: tokens are written, read in parts, and the parts merged."""
    ops, draw = torch.ops.lsm_emu, torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 1, 4, 64, generator=draw).to(dtype)
        k, v = (torch.randn(10, 64, 1, 64, generator=draw).to(dtype) for _ in range(2))
        table = torch.arange(10, dtype=torch.int32)[None]
        mask = AttnMask(causal=True)
        given = _sparse_attn._arguments("", q, None, mask, None, 0.0, None, None, None, 0.0)
        name = str(dtype)[6:]
        run = partial(ops.sparse_attn_decode, q, k, v, None, table, *given)
        yield f"sparse_attn_decode {name}", 1, run
        affine = [torch.ones(10, 64, 1, 2) for _ in range(2)]
        for bits in (8, 4):
            codes = [torch.zeros(10, 64, 1, bits * 8, dtype=torch.uint8) for _ in range(2)]
            coded = partial(ops.sparse_attn_decode_codes, q, *codes, *affine, None, table, *given)
            yield f"sparse_attn_decode_codes {bits} bits {name}", 1, coded
        lengths = torch.tensor([300], dtype=torch.int32)
        update = partial(ops.kv_cache_update, k, v, k[:1, :2], v[:1, :2], lengths, table)
        yield f"kv_cache_update {name}", 1, update
        o, lse = run()
        merge = partial(ops.merge_attn_states, torch.stack([o, o]), torch.stack([lse, lse]))
        yield f"merge_attn_states {name}", 1, merge
        back = partial(ops.merge_attn_states_bwd, o[None], lse[None], o, lse, o, lse)
        yield f"merge_attn_states {name} backward", 1, back


def selection_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Keys pooled, scored and chosen, at once and one by one."""
    ops, draw = torch.ops.lsm_emu, torch.Generator().manual_seed(0)
    rule = ScoreRule.compressed(8, 4, 16)
    chosen = BlockChoice(top_k=3, first=1, local=1)._arguments(rule, 9)
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 20, 8, 64, generator=draw).to(dtype)
        k = torch.randn(1, 130, 2, 64, generator=draw).to(dtype)
        name = str(dtype)[6:]
        pool = partial(ops.block_pool, k, None, None, None, 8, 4, 3, False)
        yield f"block_pool {name}", 1, pool
        back = partial(ops.block_pool_bwd, k, None, None, None, 8, 4, 3, False, y := pool(), y)
        yield f"block_pool {name} backward", 1, back
        given = selection._arguments(q, pool()[..., :64], rule, None, None, None, None, None, 9)
        yield f"block_select {name}", 1, partial(ops.block_select, *given, *chosen)
        score = partial(ops.block_scores, *given)
        yield f"block_scores {name}", 1, score
        scored = (score(), None, None, None, 20, given[-1], *chosen)
        yield f"block_topk {name}", 1, partial(ops.block_topk, *scored)
        cu = torch.tensor([0, 8, 20])
        keys = torch.randn(1, 4, 2, 64, generator=draw).to(dtype)  # 8 tokens and 12: 1 and 2 keys
        packed = selection._arguments(q, keys[:, :3], rule, None, None, None, cu, None, 9)
        yield f"block_select packed {name}", 1, partial(ops.block_select, *packed, *chosen)


def on_hopper(run: Callable[[], object]) -> None:
    emulator().set_architecture(90)
    try:
        run()
    finally:
        emulator().set_architecture(80)


def attention_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Lists for rows and for tokens, and a mask alone; widths of every kernel on tensor cores."""
    for kind, D, block_q, block_k, mask in (
        ("rows", 64, 64, 64, AttnMask()),
        ("wide rows", 128, 32, 16, AttnMask(causal=True)),
        ("widest rows", 256, 128, 128, AttnMask()),
        ("latent heads", 576, 64, 64, AttnMask()),
        ("tokens", 64, 1, 32, AttnMask()),
        ("window", 64, 64, 64, AttnMask(causal=True, left=63)),
    ):
        draw = torch.Generator().manual_seed(0)
        T, Hq, Hkv = 200, 4, 2
        K, V = D, min(D, 512)
        q, grad = (torch.randn(1, T, Hq, n, generator=draw).bfloat16() for n in (K, V))
        k, v = (torch.randn(1, T, Hkv, n, generator=draw).bfloat16() for n in (K, V))
        bitmap = torch.rand(1, Hkv, -(-T // block_q), -(-T // block_k), generator=draw) < 0.5
        lists = BlockLists.from_bitmap(bitmap, T, T, block_q, block_k)
        listed = (None, None) if kind == "window" else (lists.index, lists.row_ptr)
        numbers = ([0.1, 0.0, 0.0, 0.0], mask.numbers(), [Hkv, block_q, block_k])
        common = (q, k, v, None, None, *listed, *(None,) * 5, *numbers)
        forward = partial(torch.ops.lsm_emu.block_sparse_attn_fwd, *common)
        name = f"block_sparse_attn {kind} bfloat16"
        yield f"{name} forward", 1, forward
        backward = partial(torch.ops.lsm_emu.block_sparse_attn_bwd, *common, *forward(), grad, None)
        yield f"{name} backward", 1, backward
        if D <= 128 and block_q > 1:
            yield f"{name} forward on Hopper", 1, partial(on_hopper, forward)
            yield f"{name} backward on Hopper", 1, partial(on_hopper, backward)
    # Sums over queries, packed sequences, and fp32.
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        q, grad = (torch.randn(1, 200, 4, 64, generator=draw).to(dtype) for _ in range(2))
        k, v = (torch.randn(1, 200, 2, 64, generator=draw).to(dtype) for _ in range(2))
        cu = torch.tensor([0, 72, 200], dtype=torch.int32)
        ramp, sinks = torch.full((4,), 20.0), torch.randn(4, generator=draw)
        bitmap = torch.rand(1, 2, 4, 2, generator=draw) < 0.7  # 2 and 2 rows
        bias = torch.randn(bitmap.shape, generator=draw)
        lists = BlockLists.from_bitmap(bitmap, 200, 200, 64, 64, bias=bias)
        tensors = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "ramp": ramp, "sink_logits": sinks}
        tensors |= {"block_index": lists.index, "block_ptr": lists.row_ptr}
        tensors |= {"block_bias": lists.bias, "q": q, "k": k, "v": v}
        numbers = ([0.1, 0.0, 30.0, 0.0], AttnMask(causal=True).numbers(), [2, 64, 64])
        common = (*(tensors.get(name) for name in TENSORS), *numbers)
        forward = partial(torch.ops.lsm_emu.block_sparse_attn_fwd, *common)
        name = f"block_sparse_attn packed {str(dtype)[6:]}"
        yield f"{name} forward", 1, forward
        backward = partial(torch.ops.lsm_emu.block_sparse_attn_bwd, *common)
        yield f"{name} backward", 1, partial(backward, *forward(), grad, None)


def wkv4_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    ops, no_state = torch.ops.lsm_emu, (None,) * 4
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        draw = torch.Generator().manual_seed(0)
        k, v, grad = (torch.randn(2, 80, 64, generator=draw).to(dtype) for _ in range(3))
        r, u = (torch.rand(64, generator=draw) for _ in range(2))
        forward = partial(ops.wkv4_fwd, r, u, k, v, *no_state, True, False)
        *_, states = forward()
        yield f"wkv4 {str(dtype)[6:]} forward", 1, forward
        given = (r, u, k, v, *no_state, states, None, grad, None, None)
        yield f"wkv4 {str(dtype)[6:]} backward", 1, partial(ops.wkv4_bwd, *given)
        # One block a column, and segments that wait for each other.
        for kind, multiprocessors in (("whole", 1), ("cut", 16)):
            name = f"bi_wkv {kind} {str(dtype)[6:]}"
            yield f"{name} forward", multiprocessors, partial(ops.bi_wkv_fwd, r, u, k, v)
            yield f"{name} backward", multiprocessors, partial(ops.bi_wkv_bwd, r, u, k, v, grad)


def selective_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kind, multiprocessors, (N, T) in (("whole", 1, (2, 80)), ("cut", 64, (1, 300))):
            draw = torch.Generator().manual_seed(0)
            u, dt, z, grad = (torch.randn(N, T, 64, generator=draw).to(dtype) for _ in range(4))
            B, C = (torch.randn(N, T, 1, 16, generator=draw).to(dtype) for _ in range(2))
            A, skip, bias = (torch.randn(*d, generator=draw) for d in ((64, 16), (64,), (64,)))
            common = (u, dt, -A.exp(), B, C, skip, z, bias, None, None, None, True)
            name, ops = f"selective_scan {kind} {str(dtype)[6:]}", torch.ops.lsm_emu
            forward = partial(ops.selective_scan_fwd, *common, True, True)
            yield f"{name} forward", multiprocessors, forward
            *_, states = forward()
            backward = partial(ops.selective_scan_bwd, *common, states, grad, None)
            yield f"{name} backward", multiprocessors, backward
    # Many channels without a gate, and tokens side by side in rows of an odd length.
    for kind, T, D, lay_out in (("wide", 40, 640, torch.clone), ("lines", 41, 64, tokens_first)):
        draw = torch.Generator().manual_seed(0)
        u, dt, grad = (lay_out(torch.randn(1, T, D, generator=draw).bfloat16()) for _ in range(3))
        B, C = (torch.randn(1, T, 1, 16, generator=draw).bfloat16() for _ in range(2))
        A = -torch.rand(D, 16, generator=draw)
        common = (u, dt, A, B, C, None, None, None, None, None, None, True)
        forward = partial(torch.ops.lsm_emu.selective_scan_fwd, *common, True, True)
        yield f"selective_scan {kind} forward", 1, forward
        *_, states = forward()
        backward = partial(torch.ops.lsm_emu.selective_scan_bwd, *common, states, grad, None)
        yield f"selective_scan {kind} backward", 1, backward


def tokens_first(x: torch.Tensor) -> torch.Tensor:
    """The same with tokens side by side in memory."""
    return x.mT.contiguous().mT


def conv_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        draw = torch.Generator().manual_seed(0)
        x, grad = (torch.randn(2, 200, 64, generator=draw).to(dtype) for _ in range(2))
        weight, bias = (torch.randn(*d, generator=draw).to(dtype) for d in ((64, 4), (64,)))
        common = (x, weight, bias, None, None, None, True)
        name, ops = f"causal_conv1d {str(dtype)[6:]}", torch.ops.lsm_emu
        yield f"{name} forward", 1, partial(ops.causal_conv1d_fwd, *common, 0)
        yield f"{name} backward", 1, partial(ops.causal_conv1d_bwd, *common, grad, None)
        x, grad = (tokens_first(t[:, :199]) for t in (x, grad))
        common = (x, *common[1:])
        yield f"{name} lines forward", 1, partial(ops.causal_conv1d_fwd, *common, 0)
        yield f"{name} lines backward", 1, partial(ops.causal_conv1d_bwd, *common, grad, None)


def slstm_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    draw = torch.Generator().manual_seed(0)
    x, R = (torch.randn(*d, generator=draw) for d in ((2, 20, 4, 2, 16), (2, 16, 4, 16)))
    forward = partial(torch.ops.lsm_emu.slstm_fwd, x, R, None, None, True, True)
    yield "slstm float32 forward", 1, forward
    y, cells, _ = forward()
    given = x, R.permute(0, 2, 3, 1).contiguous(), cells, None, None, torch.ones_like(y), None
    yield "slstm float32 backward", 1, partial(torch.ops.lsm_emu.slstm_bwd, *given)


def scan_calls() -> Iterator[tuple[str, int, Callable[[], object]]]:
    for op in SCANS:
        forward, backward = (op.raw(kind, "lsm_emu") for kind in ("fwd", "bwd"))
        for dtype in ("bf16", "f16", "f32", *(["c64"] if op.complex_too else [])):
            for kind, multiprocessors, sizes in (
                ("whole", 1, {"T": 64, "D": 64, "batch": 2}),
                ("cut", 64, {"T": 544, "D": 64}),
                ("packed", 1, {"T": 80, "D": 64, "batch": "int32"}),
            ):
                case = ScanCase(op, dtype=dtype, gate="-1", state="both", **sizes)
                x, options = draw_scan(case)
                flags = [options[name] for name in op.options]
                common = (*x.tensors.values(), x.initial_state, x.cu_seqlens, None, *flags)
                name = f"{op} {kind} {dtype}"
                yield f"{name} forward", multiprocessors, partial(forward, *common, True)
                gradients = (torch.zeros_like(x.grad_o), x.grad_o, x.grad_final_state)
                yield f"{name} backward", multiprocessors, partial(backward, *common, *gradients)


def regressions(baseline: Counts, counted: Counts) -> list[str]:
    """One line per call, launch and counter that is new, gone or grew by more than a tenth."""
    found = []
    for call in sorted(baseline.keys() | counted.keys()):
        before, now = baseline.get(call, {}), counted.get(call, {})
        if before.keys() != now.keys():
            found.append(f"{call}: launches {list(now)}, baseline {list(before)}")
        for launch in before.keys() & now.keys():
            for name in COUNTED:
                was, is_now = (counts[launch].get(name, 0) for counts in (before, now))
                if is_now > GROWTH * was:
                    found.append(f"{call}, launch {launch}: {name} {is_now}, baseline {was}")
    if found:
        found.append("if this is meant: python benchmarks/counters.py --update")
    return found


if __name__ == "__main__":
    sys.exit(main())
