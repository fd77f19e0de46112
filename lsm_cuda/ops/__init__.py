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
from .comba import (
    chunk_comba,
    comba_step,
    fused_recurrent_comba,
)
from .delta_rule import (
    chunk_delta_rule,
    chunk_fwp,
    delta_rule_step,
    fused_chunk_delta_rule,
    fused_recurrent_delta_rule,
    fwp_step,
)
from .dplr import (
    chunk_dplr_delta_rule,
    chunk_iplr_delta_rule,
    chunk_rwkv7,
    dplr_delta_rule_step,
    fused_mul_recurrent_rwkv7,
    fused_recurrent_dplr_delta_rule,
    fused_recurrent_iplr_delta_rule,
    fused_recurrent_rwkv7,
    iplr_delta_rule_step,
    rwkv7_step,
)
from .gated import gateloop, glru, min_gru, min_lstm
from .gated_delta_rule import (
    chunk_gated_delta_product,
    chunk_gated_delta_rule,
    fused_recurrent_gated_delta_rule,
    gated_delta_product_step,
    gated_delta_rule_step,
)
from .gates import (
    fused_gdn_gate,
    fused_kda_gate,
)
from .gsa import chunk_gsa, fused_recurrent_gsa, gsa_step
from .hgrn import chunk_hgrn, fused_recurrent_hgrn, hgrn_step
from .hgrn2 import chunk_hgrn2, chunk_metala, hgrn2_step, metala_step
from .kda import (
    chunk_kda,
    fused_recurrent_kda,
    kda_step,
)
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
from .longhorn import (
    chunk_longhorn,
    longhorn_step,
)
from .lru import lru, lru_step, rg_lru, rg_lru_step
from .mesa_net import (
    chunk_mesa_net,
    mesa_net_decoding_one_step,
    mesa_net_step,
)
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
from .scan_order import scan_order
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
from .verify import (
    DeltaDraft,
    delta_verify,
)
from .wkv4 import aft_full, aft_simple, bi_wkv, wkv4, wkv4_step

__all__ = [
    "DeltaDraft",
    "LogLinearAttentionState",
    "PrefixScanState",
    "abc_step",
    "aft_full",
    "aft_simple",
    "based_step",
    "bi_wkv",
    "bidirectional_linear_attn",
    "chunk_abc",
    "chunk_based",
    "chunk_comba",
    "chunk_delta_rule",
    "chunk_dplr_delta_rule",
    "chunk_fwp",
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gla",
    "chunk_gsa",
    "chunk_hgrn",
    "chunk_hgrn2",
    "chunk_iplr_delta_rule",
    "chunk_kda",
    "chunk_lcsm",
    "chunk_lightnet",
    "chunk_lightning_attn",
    "chunk_linear_attn",
    "chunk_log_linear_attn",
    "chunk_longhorn",
    "chunk_mesa_net",
    "chunk_metala",
    "chunk_mlstm",
    "chunk_rebased",
    "chunk_regla",
    "chunk_retention",
    "chunk_rfa",
    "chunk_rwkv5",
    "chunk_rwkv6",
    "chunk_rwkv7",
    "chunk_simple_gla",
    "comba_step",
    "delta_rule_step",
    "delta_verify",
    "dplr_delta_rule_step",
    "fused_chunk_based",
    "fused_chunk_delta_rule",
    "fused_chunk_gla",
    "fused_chunk_linear_attn",
    "fused_chunk_retention",
    "fused_chunk_simple_gla",
    "fused_gdn_gate",
    "fused_kda_gate",
    "fused_mul_recurrent_rwkv7",
    "fused_recurrent_comba",
    "fused_recurrent_delta_rule",
    "fused_recurrent_dplr_delta_rule",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gla",
    "fused_recurrent_gsa",
    "fused_recurrent_hgrn",
    "fused_recurrent_iplr_delta_rule",
    "fused_recurrent_kda",
    "fused_recurrent_lightnet",
    "fused_recurrent_lightning_attn",
    "fused_recurrent_linear_attn",
    "fused_recurrent_retention",
    "fused_recurrent_rwkv5",
    "fused_recurrent_rwkv6",
    "fused_recurrent_rwkv7",
    "fused_recurrent_simple_gla",
    "fwp_step",
    "gated_delta_product_step",
    "gated_delta_rule_step",
    "gateloop",
    "gla_step",
    "glru",
    "gsa_step",
    "hgrn2_step",
    "hgrn_step",
    "iplr_delta_rule_step",
    "kda_step",
    "lcsm_step",
    "lightnet_step",
    "lightning_attn_step",
    "lightning_slopes",
    "linear_attn_step",
    "log_linear_attn_step",
    "log_refined_gate",
    "longhorn_step",
    "lru",
    "lru_step",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "mesa_net_decoding_one_step",
    "mesa_net_step",
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
    "rwkv7_step",
    "scan",
    "scan_order",
    "scan_step",
    "selective_state_update",
    "simple_gla_step",
    "ssd_minimal_discrete",
    "wkv4",
    "wkv4_step",
]
