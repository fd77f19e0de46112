"""Public operators, under the names people already use."""

from .abc import abc_step, chunk_abc
from .based import (
    based_step,
    chunk_based,
    chunk_rebased,
    fused_chunk_based,
    parallel_based,
    parallel_rebased,
    rebased_step,
)
from .chunk import chunk_gla, fused_chunk_gla, fused_recurrent_gla, gla_step
from .gated import gateloop, glru, min_gru, min_lstm
from .gsa import chunk_gsa, fused_recurrent_gsa, gsa_step
from .hgrn import chunk_hgrn, fused_recurrent_hgrn, hgrn_step
from .hgrn2 import chunk_hgrn2, chunk_metala, hgrn2_step, metala_step
from .lcsm import chunk_lcsm, lcsm_step
from .lightnet import chunk_lightnet, fused_recurrent_lightnet, lightnet_step
from .linear_attn import (
    bidirectional_linear_attn,
    chunk_linear_attn,
    chunk_rfa,
    fused_chunk_linear_attn,
    fused_recurrent_linear_attn,
    linear_attn_step,
    rfa_step,
)
from .log_linear_attn import (
    LogLinearAttentionState,
    chunk_log_linear_attn,
    log_linear_attn_step,
)
from .lru import lru, lru_step, rg_lru, rg_lru_step
from .mlstm import (
    chunk_mlstm,
    mlstm_chunkwise,
    mlstm_recurrent_step,
    mlstm_siging_chunkwise,
    mlstm_step,
)
from .prefix_scan import PrefixScanState, prefix_scan
from .regla import chunk_regla, log_refined_gate, regla_step
from .retention import (
    chunk_lightning_attn,
    chunk_retention,
    fused_chunk_retention,
    fused_recurrent_lightning_attn,
    fused_recurrent_retention,
    lightning_attn_step,
    lightning_slopes,
    minimax_slopes,
    parallel_retention,
    retention_log_decay,
    retention_step,
)
from .rwkv import (
    chunk_rwkv5,
    chunk_rwkv6,
    fused_recurrent_rwkv5,
    fused_recurrent_rwkv6,
    rwkv5_step,
    rwkv6_step,
)
from .scan import scan, scan_step
from .simple_gla import (
    chunk_simple_gla,
    fused_chunk_simple_gla,
    fused_recurrent_simple_gla,
    parallel_simple_gla,
    simple_gla_step,
)
from .ssd import (
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    selective_state_update,
    ssd_minimal_discrete,
)

__all__ = [
    "LogLinearAttentionState",
    "PrefixScanState",
    "abc_step",
    "based_step",
    "bidirectional_linear_attn",
    "chunk_abc",
    "chunk_based",
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn",
    "chunk_hgrn2",
    "chunk_lcsm",
    "chunk_lightnet",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_log_linear_attn",
    "chunk_metala",
    "chunk_mlstm",
    "chunk_rebased",
    "chunk_regla",
    "chunk_retention",
    "chunk_rfa",
    "chunk_rwkv5",
    "chunk_rwkv6",
    "chunk_simple_gla",
    "fused_chunk_based",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_lightnet",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv5",
    "fused_recurrent_rwkv6",
    "fused_recurrent_simple_gla",
    "gateloop",
    "gla_step",
    "glru",
    "gsa_step",
    "hgrn2_step",
    "hgrn_step",
    "lcsm_step",
    "lightnet_step",
    "lightning_attn_step",
    "lightning_slopes",
    "linear_attn_step",
    "log_linear_attn_step",
    "log_refined_gate",
    "lru",
    "lru_step",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "metala_step",
    "min_gru",
    "min_lstm",
    "minimax_slopes",
    "mlstm_chunkwise",
    "mlstm_recurrent_step",
    "mlstm_siging_chunkwise",
    "mlstm_step",
    "parallel_based",
    "parallel_rebased",
    "parallel_retention",
    "parallel_simple_gla",
    "prefix_scan",
    "rebased_step",
    "regla_step",
    "retention_log_decay",
    "retention_step",
    "rfa_step",
    "rg_lru",
    "rg_lru_step",
    "rwkv5_step",
    "rwkv6_step",
    "scan",
    "scan_step",
    "selective_state_update",
    "simple_gla_step",
    "ssd_minimal_discrete",
]
