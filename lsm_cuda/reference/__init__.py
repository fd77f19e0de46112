"""Executable definitions: each operator as its paper writes it, one token at a time, in plain
PyTorch.

Slow on purpose. They run in any floating dtype (fp64 is the truth the tests compare with), on any
device, and are differentiable to any order. Read this file first.
"""

from __future__ import annotations

from .around_chunk import (
    abc,
    based,
    bidirectional_linear_attention,
    finch,
    gsa,
    hgrn2,
    lightnet,
    log_linear_attention,
    mamba2,
    metala,
    mlstm,
    normalized_linear_attention,
    rebased,
    regla,
)
from .block_select import block_choice, block_pool, block_scores
from .chunk import (
    gated_linear_attention,
    lcsm,
    linear_attention,
    rwkv6,
    simple_gated_linear_attention,
    two_sided_gated_linear_attention,
    value_gated_linear_attention,
)
from .delta import (
    comba,
    delta_rule,
    dplr,
    gated_delta_rule,
    kda,
    longhorn,
    mesa_net,
)
from .kv_cache import attention_decode, kv_cache_update
from .scan import (
    bi_wkv,
    causal_conv1d,
    rg_lru,
    scan,
    selective_scan,
    slstm,
    wkv4,
)
from .sparse_attn import block_sparse_attention, merge_attention_states

__all__ = [
    "abc",
    "attention_decode",
    "based",
    "bi_wkv",
    "bidirectional_linear_attention",
    "block_choice",
    "block_pool",
    "block_scores",
    "block_sparse_attention",
    "causal_conv1d",
    "comba",
    "delta_rule",
    "dplr",
    "finch",
    "gated_delta_rule",
    "gated_linear_attention",
    "gsa",
    "hgrn2",
    "kda",
    "kv_cache_update",
    "lcsm",
    "lightnet",
    "linear_attention",
    "log_linear_attention",
    "longhorn",
    "mamba2",
    "merge_attention_states",
    "mesa_net",
    "metala",
    "mlstm",
    "normalized_linear_attention",
    "rebased",
    "regla",
    "rg_lru",
    "rwkv6",
    "scan",
    "selective_scan",
    "simple_gated_linear_attention",
    "slstm",
    "two_sided_gated_linear_attention",
    "value_gated_linear_attention",
    "wkv4",
]
