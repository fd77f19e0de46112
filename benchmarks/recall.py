"""How much of a trained model's attention the blocks hold that a method chooses.

    lsm train --mixer attention --context 1024 --out run
    python benchmarks/recall.py run --tokens 1024 --budget 0.25 --out benchmarks/results

Reads held-out text with a checkpoint of ``lsm train`` (its mixer is softmax attention), and prints
for every method the share of pairs it reads and the share of the causal softmax these have, means
over layers, heads and queries; and that share for its worst layer and head. Random blocks, as many
as the budget, and the best ones there are, chosen from the whole map, stand at either end. With
--out the rows are json, of which report.py makes the table in docs/kernels/sparse.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
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

BLOCK = 16
CAUSAL = AttnMask(causal=True)


def attention_of(folder: Path, tokens: int, data: str | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of every layer on the first held-out tokens, with their positions."""
    model, seen = load_model(folder), list[tuple[Tensor, Tensor]]()
    attend = Attention._attend

    def record(self: Attention, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        seen.append((q, k))
        return attend(self, q, k, *rest)

    Attention._attend = record  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            model(load_corpus(data).held_out[None, :tokens].long())
    finally:
        Attention._attend = attend  # type: ignore[method-assign]
    if not seen:
        raise SystemExit(f"recall: {folder} has no softmax attention; train with --mixer attention")
    yield from seen


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that lsm train wrote")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=0.25, help="blocks of a row, of all")
    parser.add_argument("--out", type=Path, help="folder of recall.json")
    parser.add_argument("--data", help="text; default: what lsm train takes by default")
    arguments = parser.parse_args()
    layers = list(attention_of(arguments.run, arguments.tokens, arguments.data))
    blocks = max(round(arguments.budget * arguments.tokens / BLOCK), 3)
    config = json.loads((arguments.run / "config.json").read_text())
    taken = {"tokens": arguments.tokens, "budget": arguments.budget, "block": BLOCK}
    rows: list[dict[str, Any]] = []
    print(f"{'method':36}{'read':>6}{'have':>8}{'worst':>8}")
    for name, lists_of in methods(blocks).items():
        shares, densities = [], []
        for q, k in layers:
            lists = lists_of(q, k)
            shares.append(sparse.recall(q, k, lists))
            densities.append(lists.density(CAUSAL))
        share = torch.stack(shares)
        density = sum(densities) / len(densities)
        kept = {"mean": share.mean().item(), "worst": share.amin().item()}
        rows.append({"method": name, "pairs": density, **kept})
        print(f"{name:36}{density:6.0%}{kept['mean']:8.1%}{kept['worst']:8.1%}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        record = {"environment": environment("cpu"), "model": config, **taken, "rows": rows}
        (arguments.out / "recall.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
