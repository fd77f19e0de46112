"""How much of a trained model's attention the blocks hold that a method chooses.

    lsm train --mixer attention --context 1024 --out run
    python benchmarks/recall.py run --tokens 1024 --budget 0.25 --out benchmarks/results

Reads held-out text with a checkpoint of ``lsm train`` (its mixer is softmax attention), and prints
for every method the share of pairs it reads and the share of the causal softmax these have, means
over layers, heads and queries; and that share for its worst layer and head. Random blocks, as many
as the budget, and the best ones there are, chosen from the whole map, stand at either end.
SeerAttention's gates learn the layers' maps of as many tokens of the training text. Cache policies
have as many tokens as the budget, for the last 64 tokens behind a prompt of the others. With --out
the rows are json, of which report.py makes the tables in docs/kernels/sparse.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lsm_cuda import sparse
from lsm_cuda.bench.measure import environment
from lsm_cuda.data import load_corpus
from lsm_cuda.layers import Attention
from lsm_cuda.models.checkpoint import load_model
from lsm_cuda.ops import (
    AttnMask,
    BlockChoice,
    BlockLists,
    ScoreRule,
    block_pool,
    block_scores,
    block_select,
    block_topk,
)
from lsm_cuda.sparse import KVCache, Policy, SeerAttentionGate

BLOCK = 16
STEPS = 64  # of cache policies
CAUSAL = AttnMask(causal=True)


Layers = list[tuple[Tensor, Tensor]]


def attention_of(folder: Path, text: Tensor) -> Layers:
    """Queries and keys of every layer on a text's bytes, with their positions."""
    model, seen = load_model(folder), Layers()
    attend = Attention._attend

    def record(self: Attention, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        seen.append((q, k))
        return attend(self, q, k, *rest)

    Attention._attend = record  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model(text[None].long())
    finally:
        Attention._attend = attend  # type: ignore[method-assign]
    if not seen:
        raise SystemExit(f"recall: {folder} has no softmax attention; train with --mixer attention")
    return seen


def methods(blocks: int) -> dict[str, Callable[[Tensor, Tensor], BlockLists]]:
    """Ways to choose about ``blocks`` blocks for every row, or query."""
    rows = BlockChoice(top_k=blocks, first=1, local=1)
    tokens = blocks * BLOCK

    def random(q: Tensor, k: Tensor) -> BlockLists:
        rule = replace(ScoreRule.pooled(BLOCK, BLOCK), causal=False)
        scores = block_scores(q, block_pool(k, BLOCK), rule)
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
        return choose(noise.to(scores), rule, q)

    def best(q: Tensor, k: Tensor) -> BlockLists:
        rule = ScoreRule(softmax=True, block_q=BLOCK, block_k=BLOCK, taps=BLOCK, tap_step=BLOCK)
        return block_select(q, k, rule, rows, tokens=k.shape[1])

    def choose(scores: Tensor, rule: ScoreRule, q: Tensor) -> BlockLists:
        return block_topk(scores, replace(rule, causal=True), rows, q.shape[1], tokens=q.shape[1])

    def moba(q: Tensor, k: Tensor) -> BlockLists:
        choice = BlockChoice(top_k=blocks, local=1)
        return block_select(q, block_pool(k, BLOCK), ScoreRule.pooled(BLOCK), choice)

    def nsa(q: Tensor, k: Tensor) -> BlockLists:
        pooled = block_pool(k, 8, 4, partial=False)
        rule, choice = ScoreRule.compressed(8, 4, BLOCK), replace(rows, local=2)
        return block_select(q, pooled, rule, choice, tokens=k.shape[1])

    def quest(q: Tensor, k: Tensor) -> BlockLists:
        signs = torch.cat([q.relu(), -(-q).relu()], -1)
        bounds = block_pool(k, BLOCK, pool="bounds")
        choice = BlockChoice(top_k=blocks, local=1)
        return block_select(signs, bounds, ScoreRule.pooled(BLOCK), choice)

    return {
        "random blocks": random,
        "first and last (A-shape)": lambda q, k: sparse.a_shape_lists(
            q, k, BLOCK, tokens - BLOCK, BLOCK
        ),
        "columns and diagonals (MInference)": lambda q, k: sparse.vertical_slash_lists(
            q, k, tokens // 8, blocks // 2, 64, BLOCK
        ),
        "means of rows (MInference)": lambda q, k: sparse.pooled_lists(q, k, blocks, BLOCK),
        "pattern by head (MInference)": lambda q, k: sparse.minference_lists(q, k, block=BLOCK),
        "FlexPrefill, 0.9": lambda q, k: sparse.flex_prefill_lists(
            q, k, 0.9, 0.1, 2 * BLOCK, BLOCK
        ),
        "SpargeAttn, 0.9": lambda q, k: sparse.sparge_lists(q, k, 0.9, 0.3, BLOCK),
        "XAttention, 0.9": lambda q, k: sparse.xattention_lists(q, k, 4, 0.9, BLOCK),
        "MoBA": moba,
        "InfLLM-v2": lambda q, k: sparse.infllm_v2_lists(q, k, blocks, BLOCK, 8, 4, local=2),
        "NSA": nsa,
        "Quest": quest,
        "best blocks of rows": best,
    }


def learned(layers: Layers) -> list[SeerAttentionGate]:
    """A gate for every layer, trained to predict its map."""
    gates = []
    for q, k in layers:
        torch.manual_seed(0)
        K, Hq, Hkv = q.shape[3], q.shape[2], k.shape[2]
        gate = SeerAttentionGate(K, Hq, Hkv, BLOCK, K, rope_theta=None)
        target = sparse.pooled_attention_map(q, k, BLOCK)
        optimizer = torch.optim.Adam(gate.parameters(), 0.01)
        for _ in range(200):
            optimizer.zero_grad()
            gate.loss(q, k, target).backward()
            optimizer.step()
        gates.append(gate)
    return gates


def policies(tokens: int) -> dict[str, Callable[[Tensor, Tensor], Policy]]:
    """Cache policies that keep or read about ``tokens`` tokens, for a layer's queries and keys."""
    few = min(16, tokens // 8)

    def double_sparsity(q: Tensor, k: Tensor) -> Policy:
        channels = sparse.DoubleSparsity.calibrate(q, k, q.shape[3] // 4)
        return sparse.DoubleSparsity(channels, tokens - few, recent=few)

    def shadow_kv(q: Tensor, k: Tensor) -> Policy:
        # what came behind the prompt is read as well
        return sparse.ShadowKV(k[0, 0].numel() // 2, max(tokens - STEPS, 8), 8, outliers=1)

    return {
        "StreamingLLM": lambda q, k: sparse.StreamingLLM(tokens - 4, 4),
        "H2O": lambda q, k: sparse.H2O(tokens - few, few),
        "TOVA": lambda q, k: sparse.TOVA(tokens),
        "SnapKV": lambda q, k: sparse.SnapKV(max(tokens - STEPS, few + 8), few),
        "LongHeads": lambda q, k: sparse.LongHeads(max(tokens // BLOCK, 2), BLOCK),
        "Quest (by query)": lambda q, k: sparse.Quest(tokens, BLOCK),
        "ShadowKV": shadow_kv,
        "ClusterKV": lambda q, k: sparse.ClusterKV(
            max(tokens // 8, 1), tokens - few, few, STEPS + 1
        ),
        "DoubleSparsity": double_sparsity,
        "PQCache": lambda q, k: sparse.PQCache(tokens - few, 0, few, 2, 32),
        "MagicPIG": lambda q, k: sparse.MagicPIG(6, 40, few, few, torch.Generator().manual_seed(0)),
        "best tokens (RetrievalAttention)": lambda q, k: sparse.RetrievalAttention(
            tokens - few, few // 2, few // 2
        ),
    }


def kept_by(policy: Policy, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the softmax that the last queries' tokens have, ``[B, Hq]``, and of tokens read.

    Values name their token, so that an output is the weights of what was read.
    """
    T = k.shape[1]
    v = torch.eye(T)[None, :, None].expand(1, T, k.shape[2], T)
    cache = KVCache(policy)
    cache.prefill(q[:, : T - STEPS], k[:, : T - STEPS], v[:, : T - STEPS])
    shares, reads = [], []
    for n in range(T - STEPS, T):
        o = cache.step(*(x[:, n : n + 1] for x in (q, k, v)))[:, 0]  # [B, Hq, T]
        keys = k[:, : n + 1].repeat_interleave(q.shape[2] // k.shape[2], 2)
        score = torch.einsum("bhd,bshd->bhs", q[:, n], keys) * q.shape[3] ** -0.5
        read = o[..., : n + 1] > 0
        shares.append((score.softmax(-1) * read).sum(-1))
        reads.append(read.double().mean())
    return torch.stack(shares).mean(0), torch.stack(reads).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that lsm train wrote")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.25, help="blocks of a row, of all")
    parser.add_argument("--out", type=Path, help="folder of recall.json")
    parser.add_argument("--data", help="text; default: what lsm train takes by default")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.data)
    layers = attention_of(arguments.run, corpus.held_out[: arguments.tokens])
    blocks = max(round(arguments.budget * arguments.tokens / BLOCK), 3)
    config = json.loads((arguments.run / "config.json").read_text())
    taken = {"tokens": arguments.tokens, "budget": arguments.budget, "block": BLOCK}
    rows: list[dict[str, Any]] = []
    print(f"{'method':36}{'read':>6}{'have':>8}{'worst':>8}")

    def add(name: str, shares: list[Tensor], read: list[float], kind: str) -> None:
        share, pairs = torch.stack(shares), sum(read) / len(read)
        kept = {"mean": share.mean().item(), "worst": share.amin().item()}
        rows.append({"method": name, "kind": kind, "pairs": pairs, **kept})
        print(f"{name:36}{pairs:6.0%}{kept['mean']:8.1%}{kept['worst']:8.1%}")

    def add_lists(name: str, lists: list[BlockLists]) -> None:
        shares = [sparse.recall(*layer, own) for layer, own in zip(layers, lists, strict=True)]
        add(name, shares, [own.density(CAUSAL) for own in lists], "lists")

    for name, lists_of in methods(blocks).items():
        add_lists(name, [lists_of(q, k) for q, k in layers])
    gates = learned(attention_of(arguments.run, corpus.train[: arguments.tokens]))
    add_lists(
        "SeerAttention (learned)",
        [g.lists(q, k, topk=blocks) for g, (q, k) in zip(gates, layers, strict=True)],
    )
    for name, make in policies(blocks * BLOCK).items():
        shares, reads = zip(*(kept_by(make(q, k), q, k) for q, k in layers), strict=True)
        add(name, [*shares], [r.item() for r in reads], "cache")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment("cpu"), "model": config, **taken, "rows": rows}
        (arguments.out / "recall.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
