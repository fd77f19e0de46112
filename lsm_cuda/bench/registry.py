"""What is measured: an operator is one row of ROWS, a set of shapes one row of SETS (shapes.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, Coded, Dense, Nsa, Selection, drawn_lists, token_lists
from .operators import MODES, STRIDE, WINDOW, Inputs, Op, Shape
from .shapes import SETS, WHOLE, Set, cells, sets

__all__ = [
    "DTYPES",
    "MODES",
    "OPS",
    "ROWS",
    "SETS",
    "WHOLE",
    "Inputs",
    "Op",
    "Set",
    "Shape",
    "cells",
    "sets",
]

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16,),
    "emulator": (torch.bfloat16,),
}
QKV = {"q": "B T H K", "k": "B T H K", "v": "B T HV V"}
RWKV = {"r": "B T H K", "k": "B T H K", "v": "B T HV V", "w": "B T HV K gate", "u": "HV K"}
SLOTS = {**QKV, "v": "B T H V", "s": "B T H M unit", "g": "B T H M gate"}
POSITIVE = {"q": "B T H K positive", "k": "B T H K positive", "v": "B T HV V"}
DELTA = {"q": "B T H K direction", "k": "B T H K direction", "v": "B T HV V"}
STRENGTH = {"beta": "B T HV unit"}
ATTENTION = {"q": "B T H K", "k": "B T HKV K", "v": "B T HKV V"}
SSD = {"x": "B T HV V", "dt": "B T HV step", "A": "HV rate", "B": "B T H K", "C": "B T H K"}


def retained(simple_gla: Callable[..., Any]) -> Callable[..., Any]:
    """Retention: one decay per head, 1 − 2^(−5−h)."""

    def definition(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Any:
        heads = torch.arange(v.shape[2], device=v.device, dtype=v.dtype)
        decay = torch.log1p(-torch.exp2(-5 - heads))
        return simple_gla(q, k, v, decay.expand(v.shape[:3]), **rest)

    return definition


def channels_first(selective_scan: Callable[..., Any]) -> Callable[..., Any]:
    """mamba_ssm's layout, and its names."""

    def definition(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any
    ) -> Tensor:
        B, C = (t.transpose(1, 2)[:, :, None] for t in (B, C))
        y, _ = selective_scan(u.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, **rest)
        turned: Tensor = y.transpose(1, 2)
        return turned

    return definition


def tokens_side_by_side(conv: Callable[..., Any]) -> Callable[..., Any]:
    """Dao-AILab's layout."""

    def definition(x: Tensor, **rest: Any) -> Tensor:
        y, _ = conv(x.transpose(1, 2), activation="silu", **rest)
        turned: Tensor = y.transpose(1, 2)
        return turned

    return definition


def griffin(rg_lru: Callable[..., Any]) -> Callable[..., Any]:
    """The rate of RG-LRU is a parameter's."""

    def definition(
        x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, param: Tensor, **rest: Any
    ) -> Any:
        return rg_lru(x, input_gate, recurrence_gate, -8 * F.softplus(param), **rest)

    return definition


def from_logits(kda: Callable[..., Any]) -> Callable[..., Any]:
    """KDA as a layer calls it."""

    def definition(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, **rest: Any
    ) -> Any:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        g = -A_log.exp().unsqueeze(-1) * F.softplus(g, threshold=50)
        return kda(q, k, v, g, beta.sigmoid(), **rest)

    return definition


IN_KERNEL = {f"use_{what}_in_kernel": True for what in ("qk_l2norm", "gate", "beta_sigmoid")}
POOL = {"length": WINDOW, "stride": STRIDE, "partial": False}

ROWS = (
    Op(
        name="linear_attn",
        chunk="chunk_linear_attn",
        step="linear_attn_step",
        reference="linear_attention",
        inputs=QKV,
        options={"normalize": False},
    ),
    Op(
        name="retention",
        chunk="chunk_retention",
        step="retention_step",
        reference="simple_gated_linear_attention",
        inputs=QKV,
        adapt=retained,
    ),
    Op(
        name="simple_gla",
        chunk="chunk_simple_gla",
        step="simple_gla_step",
        reference="simple_gated_linear_attention",
        inputs={**QKV, "g": "B T HV gate"},
    ),
    Op(
        name="gla",
        chunk="chunk_gla",
        step="gla_step",
        reference="gated_linear_attention",
        inputs={**QKV, "g": "B T HV K gate"},
    ),
    Op(
        name="gla_both",
        chunk="chunk_gla",
        step="gla_step",
        reference="two_sided_gated_linear_attention",
        inputs={**QKV, "g": "B T HV K gate", "gv": "B T HV V gate"},
    ),
    Op(
        name="rwkv6",
        chunk="chunk_rwkv6",
        step="rwkv6_step",
        reference="finch",
        inputs=RWKV,
        qkv=("r", "k", "v"),
    ),
    Op(
        name="gsa",
        chunk="chunk_gsa",
        step="gsa_step",
        reference="gsa",
        inputs=SLOTS,
        output="B T H V",
        state=("N H K M", "N H M V"),
    ),
    Op(
        name="mlstm",
        chunk="chunk_mlstm",
        step="mlstm_step",
        reference="mlstm",
        inputs={**POSITIVE, "i": "B T HV logits", "f": "B T HV logits"},
        state=("N HV K V", "N HV K", "N HV"),
    ),
    Op(
        name="ssd",
        chunk="mamba_chunk_scan_combined",
        step="selective_state_update",
        reference="mamba2",
        inputs=SSD,
        qkv=("C", "B", "x"),
        state=("N HV V K",),
        engine="ssd",
    ),
    Op(
        name="based",
        chunk="chunk_based",
        step="based_step",
        reference="based",
        inputs=QKV,
        state=("N HV F V", "N HV F"),
        engine="features",
    ),
    Op(
        name="delta_rule",
        chunk="chunk_delta_rule",
        step="delta_rule_step",
        reference="delta_rule",
        inputs={**DELTA, **STRENGTH},
        engine="delta",
    ),
    Op(
        name="gated_delta_rule",
        chunk="chunk_gated_delta_rule",
        step="gated_delta_rule_step",
        reference="gated_delta_rule",
        inputs={**DELTA, "g": "B T HV gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="kda",
        chunk="chunk_kda",
        step="kda_step",
        reference="kda",
        inputs={**DELTA, "g": "B T HV K gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="kda_logits",
        chunk="chunk_kda",
        step="kda_step",
        reference="kda",
        inputs={
            **QKV,
            "g": "B T HV K shut",
            "beta": "B T HV",
            "A_log": "HV",
        },
        options=IN_KERNEL,
        step_options=IN_KERNEL,
        adapt=from_logits,
        engine="delta",
    ),
    Op(
        name="comba",
        chunk="chunk_comba",
        step="comba_step",
        reference="comba",
        inputs={**DELTA, "p": "B T H K direction", "g": "B T HV gate", **STRENGTH},
        engine="delta",
    ),
    Op(
        name="dplr",
        chunk="chunk_dplr_delta_rule",
        step="dplr_delta_rule_step",
        reference="dplr",
        inputs={
            **DELTA,
            "a": "B T H K direction",
            "b": "B T H K direction",
            "gk": "B T HV K gate",
        },
        engine="delta",
        adapt=lambda dplr: lambda gk, **x: dplr(g=gk, **x),
    ),
    Op(
        name="hgrn",
        chunk="chunk_hgrn",
        step="hgrn_step",
        reference="scan",
        inputs={"x": "B T D", "g": "B T D gate"},
        qkv=(),
        output="B T D",
        state=("N D",),
        engine="scan",
        adapt=lambda scan: lambda x, g, **rest: scan(x, g, log=True, **rest),
    ),
    Op(
        name="wkv4",
        chunk="wkv4",
        step="wkv4_step",
        reference="wkv4",
        inputs={"w": "D", "u": "D", "k": "B T D", "v": "B T D"},
        qkv=(),
        output="B T D",
        state=("N D",) * 3,
        engine="scan",
    ),
    Op(
        name="bi_wkv",
        chunk="bi_wkv",
        step="",  # a token needs what follows it
        reference="bi_wkv",
        inputs={"w": "D", "u": "D", "k": "B T D", "v": "B T D"},
        qkv=(),
        output="B T D",
        state=("N D",) * 6,  # from either side
        engine="scan",
        packs=False,
    ),
    Op(
        name="selective_scan",
        chunk="selective_scan_fn",
        step="selective_state_update",
        reference="selective_scan",
        inputs={
            "u": "B D T",
            "delta": "B D T step",
            "A": "D S rate",
            "B": "B S T",
            "C": "B S T",
            "D": "D",
        },
        qkv=(),
        output="B D T",
        state=("N D S",),
        step_names={"u": "x", "delta": "dt"},
        engine="scan",
        adapt=channels_first,
    ),
    Op(
        name="rg_lru",
        chunk="rg_lru",
        step="rg_lru_step",
        reference="rg_lru",
        # without a state the first token would be another case, which a step never is
        inputs={
            "x": "B T D",
            "input_gate": "B T D",
            "recurrence_gate": "B T D",
            "param": "D",
            "initial_state": "N D zero",
        },
        qkv=(),
        output="B T D",
        state=("N D",),
        engine="scan",
        adapt=griffin,
    ),
    Op(
        name="causal_conv1d",
        chunk="causal_conv1d",
        step="causal_conv1d_step",
        reference="causal_conv1d",
        inputs={"x": "B T D", "weight": "D W", "bias": "D"},
        qkv=(),
        output="B T D",
        state=("N D W",),
        state_like="x",
        options={"activation": "silu"},
        step_options={"activation": "silu"},
        engine="scan",
        adapt=lambda conv: functools.partial(conv, activation="silu"),
    ),
    Op(
        name="causal_conv1d_fn",
        chunk="causal_conv1d_fn",
        step="",  # states have one layout
        reference="causal_conv1d",
        inputs={"x": "B D T", "weight": "D W", "bias": "D"},
        qkv=(),
        output="B D T",
        state=("N D W",),
        options={"activation": "silu"},
        engine="scan",
        adapt=tokens_side_by_side,
    ),
    Op(
        name="slstm",
        chunk="slstm",
        step="slstm_step",
        reference="slstm",
        inputs={"x": "B T G H K", "R": "H K G K matrix"},
        qkv=(),
        output="B T H K",
        state=("N G H K",),
        engine="slstm",
        matrix="H K G K",
    ),
    Dense(
        name="attn",
        chunk="block_sparse_attn",
        step="flash_attn_with_kvcache",
        reference="block_sparse_attention",
        inputs=ATTENTION,
    ),
    Attention(
        name="attn_window",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        window=1024,
    ),
    Attention(
        name="attn_blocks",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        lists=drawn_lists,
    ),
    Attention(
        name="attn_topk",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
        lists=token_lists,
    ),
    Coded(
        name="attn_codes",
        chunk="block_sparse_attn",
        step="sparse_attn_decode",
        reference="block_sparse_attention",
        inputs=ATTENTION,
    ),
    Nsa(
        name="nsa",
        chunk="parallel_nsa",
        step="parallel_nsa",
        reference="block_sparse_attention",
        inputs=ATTENTION | dict.fromkeys(("g_cmp", "g_slc", "g_swa"), "B T H unit"),
    ),
    Selection(
        name="block_select",
        chunk="block_select",
        step="",
        reference="block_scores",
        inputs={"q": "B T H K", "k": "B R HKV K"},
        qkv=(),
    ),
    Op(
        name="block_pool",
        chunk="block_pool",
        step="",
        reference="block_pool",
        inputs={"x": "B T HKV K"},
        qkv=(),
        output="B R HKV K",
        state=(),
        options=POOL,
        engine="attention",
        adapt=lambda pool: functools.partial(pool, **POOL),
        per_element=(1, 1),
    ),
    Op(
        name="merge_attn_states",
        chunk="merge_attn_states",
        step="",
        reference="merge_attention_states",
        inputs={"o": "P B T H V", "lse": "P B H T score"},
        qkv=(),
        output="B T H V",
        state=(),
        engine="attention",
        per_element=(2, 3),
    ),
)
OPS = {op.name: op for op in ROWS if op.available}
