"""Other people's code for the same work, used where it is installed and skipped by name where not.

A peer is one row of PEERS: which operators it serves, by which function, and how our arguments
become its own (before the clock starts, so that layouts cost nobody anything).
"""

from __future__ import annotations

from .arguments import (
    as_ssd,
    channels_second,
    fla,
    fla_token,
    flash,
    flash_token,
    flex,
    flex_masked,
    hf_conv_token,
    hf_delta,
    hf_delta_token,
    hf_selective,
    hf_selective_token,
    hf_ssd,
    hf_ssd_token,
    hf_wkv4,
    hf_wkv4_token,
    masked,
    masked_token,
    mlstm_token,
    one_row,
    one_row_token,
    one_token,
    selection,
    softmax,
    softmax_token,
)
from .attention import Attention, Coded, Dense, Nsa
from .calls import Call, Peer, absent, heads_second, ours, version
from .compositions import as_bitmap
from .operators import BLOCK, CHOSEN, first
from .registry import OPS, ROWS, Shape

__all__ = ["PEERS", "Call", "Peer", "absent", "ours", "version"]


def of_attention(sequence: Call, step: Call | None = None) -> dict[tuple[str, str], Call]:
    """For the patterns that are one softmax under a mask; causality alone needs none."""
    other = (Coded, Dense, Nsa)
    names = [r.name for r in ROWS if isinstance(r, Attention) and not isinstance(r, other)]
    found = {(name, "sequence"): sequence for name in names}
    return found if step is None else found | {(name, "step"): step for name in names}


def of_every_op(sequence: Call, step: Call | None = None) -> dict[tuple[str, str], Call]:
    """Softmax attention stands beside every operator with queries, keys and values."""
    every = [op for op in OPS.values() if op.qkv]
    found = {(op.name, "sequence"): sequence for op in every if "forward" in op.modes}
    return found if step is None else found | {(op.name, "step"): step for op in every}


def in_chunks(shape: Shape) -> bool:
    return shape["T"] % 64 == 0 and not shape.packed


SSD = "transformers.models.mamba2.modeling_mamba2"
GDN = "transformers.models.qwen3_next.modeling_qwen3_next"
KIMI = "transformers.models.kimi_linear.modeling_kimi_linear"
MAMBA = "transformers.models.mamba.modeling_mamba"
RWKV = "transformers.models.rwkv.modeling_rwkv"
GRIFFIN = "transformers.models.recurrent_gemma.modeling_recurrent_gemma"
VANILLA = "xlstm.blocks.slstm.src.vanilla"
DPLR = {"a": "alpha", "b": "beta"}

PEERS = [
    Peer(
        "FLA (Triton)",
        "fla-core",
        ("cuda",),
        {
            ("gla", "sequence"): Call("fla.ops.gla:chunk_gla", fla()),
            ("gla", "step"): Call("fla.ops.gla:fused_recurrent_gla", fla_token({"g": "gk"})),
            ("linear_attn", "sequence"): Call(
                "fla.ops.linear_attn:chunk_linear_attn", fla(normalize=False)
            ),
            ("linear_attn", "step"): Call(
                "fla.ops.linear_attn:fused_recurrent_linear_attn", fla_token()
            ),
            ("retention", "sequence"): Call("fla.ops.retention:chunk_retention", fla()),
            ("retention", "step"): Call("fla.ops.retention:fused_recurrent_retention", fla_token()),
            ("simple_gla", "sequence"): Call("fla.ops.simple_gla:chunk_simple_gla", fla()),
            ("simple_gla", "step"): Call(
                "fla.ops.simple_gla:fused_recurrent_simple_gla", fla_token()
            ),
            ("rwkv6", "sequence"): Call("fla.ops.rwkv6:chunk_rwkv6", fla()),
            ("rwkv6", "step"): Call("fla.ops.rwkv6:fused_recurrent_rwkv6", fla_token()),
            ("gsa", "sequence"): Call("fla.ops.gsa:chunk_gsa", fla()),
            ("gsa", "step"): Call("fla.ops.gsa:fused_recurrent_gsa", fla_token()),
            ("delta_rule", "sequence"): Call("fla.ops.delta_rule:chunk_delta_rule", fla()),
            ("delta_rule", "step"): Call(
                "fla.ops.delta_rule:fused_recurrent_delta_rule", fla_token()
            ),
            ("gated_delta_rule", "sequence"): Call(
                "fla.ops.gated_delta_rule:chunk_gated_delta_rule", fla()
            ),
            ("gated_delta_rule", "step"): Call(
                "fla.ops.gated_delta_rule:fused_recurrent_gated_delta_rule", fla_token()
            ),
            ("kda", "sequence"): Call("fla.ops.kda:chunk_kda", fla()),
            ("kda", "step"): Call("fla.ops.kda:fused_recurrent_kda", fla_token()),
            ("comba", "sequence"): Call("fla.ops.comba:chunk_comba", fla()),
            ("comba", "step"): Call("fla.ops.comba:fused_recurrent_comba", fla_token()),
            ("dplr", "sequence"): Call(
                "fla.ops.generalized_delta_rule.dplr:chunk_dplr_delta_rule", fla()
            ),
            ("dplr", "step"): Call(
                "fla.ops.generalized_delta_rule.dplr:fused_recurrent_dplr_delta_rule", fla_token()
            ),
            ("hgrn", "sequence"): Call("fla.ops.hgrn:fused_recurrent_hgrn", fla()),
            ("hgrn", "step"): Call("fla.ops.hgrn:fused_recurrent_hgrn", fla_token()),
            ("causal_conv1d", "sequence"): Call(
                "fla.modules.causal_conv1d:causal_conv1d", fla(activation="silu")
            ),
            ("nsa", "sequence"): Call(
                "fla.ops.nsa.parallel:parallel_nsa",
                fla(block_counts=CHOSEN, block_size=BLOCK, window_size=512),
            ),
        },
        fits=lambda shape: True,
    ),
    Peer(
        "FlashQLA",
        "flash-qla",
        ("cuda",),
        {("gated_delta_rule", "sequence"): Call("flash_qla:chunk_gated_delta_rule", fla())},
        fits=lambda shape: True,
    ),
    Peer(
        "causal-conv1d",
        "causal-conv1d",
        ("cuda",),
        {
            ("causal_conv1d", "sequence"): Call(
                "causal_conv1d:causal_conv1d_fn",
                lambda op, x, shape: channels_second(op, x, shape) | {"activation": "silu"},
                heads_second,
            ),
            ("causal_conv1d_fn", "sequence"): Call(
                "causal_conv1d:causal_conv1d_fn", lambda op, x, shape: {**x, "activation": "silu"}
            ),
        },
    ),
    Peer(
        "FLA naive",
        "fla-core",
        ("cpu",),
        {
            ("linear_attn", "sequence"): Call(
                "ops/linear_attn/naive.py:naive_chunk_linear_attn", fla()
            ),
            ("linear_attn", "step"): Call(
                "ops/linear_attn/naive.py:naive_recurrent_linear_attn", fla_token()
            ),
            ("retention", "sequence"): Call(
                "ops/retention/naive.py:naive_retention", fla(head_first=True), heads_second
            ),
            ("simple_gla", "sequence"): Call(
                "ops/simple_gla/naive.py:naive_chunk_simple_gla", fla()
            ),
            ("simple_gla", "step"): Call(
                "ops/simple_gla/naive.py:naive_recurrent_simple_gla", fla_token()
            ),
            ("based", "sequence"): Call(
                "ops/based/naive.py:naive_parallel_based", fla(head_first=True), heads_second
            ),
            ("delta_rule", "sequence"): Call(
                "ops/delta_rule/naive.py:delta_rule_chunkwise", fla(head_first=True), heads_second
            ),
            ("gated_delta_rule", "sequence"): Call(
                "ops/gated_delta_rule/naive.py:naive_chunk_gated_delta_rule", fla()
            ),
            ("gated_delta_rule", "step"): Call(
                "ops/gated_delta_rule/naive.py:naive_recurrent_gated_delta_rule", fla_token()
            ),
            ("kda", "sequence"): Call("ops/kda/naive.py:naive_chunk_kda", fla()),
            ("kda", "step"): Call("ops/kda/naive.py:naive_recurrent_kda", fla_token()),
            ("dplr", "sequence"): Call(
                "ops/generalized_delta_rule/dplr/naive.py:dplr_chunkwise",
                fla(DPLR, head_first=True),
                heads_second,
            ),
            ("dplr", "step"): Call(
                "ops/generalized_delta_rule/dplr/naive.py:dplr_recurrence",
                fla_token(DPLR, head_first=True),
                heads_second,
            ),
        },
        fits=in_chunks,
    ),
    Peer(
        "transformers, a loop",
        "transformers",
        ("cpu",),
        {
            ("wkv4", "sequence"): Call(f"{RWKV}:rwkv_linear_attention_cpu", hf_wkv4),
            ("wkv4", "step"): Call(f"{RWKV}:rwkv_linear_attention_cpu", hf_wkv4_token),
            ("selective_scan", "sequence"): Call(
                f"{MAMBA}:mamba_selective_scan.__wrapped__", hf_selective
            ),
            ("rg_lru", "sequence"): Call("lsm_cuda.bench.compositions:griffin_loop", needs=GRIFFIN),
            ("rg_lru", "step"): Call(
                "lsm_cuda.bench.compositions:griffin_loop", one_token, needs=GRIFFIN
            ),
        },
        longest=2048,
        longest_training=512,  # it takes a minute and gigabytes at 2048
    ),
    Peer(
        "FLA naive, a loop",
        "fla-core",
        ("cpu",),
        {
            ("gla", "sequence"): Call("ops/gla/naive.py:naive_recurrent_gla", fla({"g": "gk"})),
            ("gla", "step"): Call("ops/gla/naive.py:naive_recurrent_gla", fla_token({"g": "gk"})),
            ("rwkv6", "sequence"): Call(
                "ops/rwkv6/recurrent_naive.py:naive_recurrent_rwkv6",
                fla({"r": "q"}, head_first=True),
                heads_second,
            ),
            ("rwkv6", "step"): Call(
                "ops/rwkv6/recurrent_naive.py:naive_recurrent_rwkv6",
                fla_token({"r": "q"}, head_first=True),
                heads_second,
            ),
            ("hgrn", "sequence"): Call("ops/hgrn/naive.py:naive_recurrent_hgrn", fla()),
            ("hgrn", "step"): Call("ops/hgrn/naive.py:naive_recurrent_hgrn", fla_token()),
            ("gsa", "sequence"): Call("ops/gsa/naive.py:naive_recurrent_gsa", fla()),
            ("gsa", "step"): Call("ops/gsa/naive.py:naive_recurrent_gsa", fla_token()),
        },
        longest=2048,
    ),
    Peer(
        "transformers",
        "transformers",
        ("cpu",),
        {
            (name, kind): call
            for name in ("simple_gla", "ssd")
            for kind, call in (
                (
                    "sequence",
                    Call(f"{SSD}:mamba2_chunk_scan.__wrapped__", hf_ssd(64), first, ("A",)),
                ),
                ("step", Call(f"{SSD}:mamba2_selective_state_update.__wrapped__", hf_ssd_token)),
            )
        }
        | {
            ("gated_delta_rule", "sequence"): Call(
                f"{GDN}:torch_chunk_gated_delta_rule.__wrapped__", hf_delta
            ),
            ("gated_delta_rule", "step"): Call(
                f"{GDN}:torch_recurrent_gated_delta_rule.__wrapped__", hf_delta_token
            ),
            ("selective_scan", "step"): Call(
                f"{MAMBA}:mamba_selective_state_update.__wrapped__", hf_selective_token
            ),
            ("causal_conv1d", "step"): Call(
                f"{MAMBA}:causal_conv1d_update.__wrapped__", hf_conv_token
            ),
            ("kda", "sequence"): Call(f"{KIMI}:chunk_kimi_delta_attention.__wrapped__", hf_delta),
            ("kda", "step"): Call(
                f"{KIMI}:recurrent_kimi_delta_attention.__wrapped__", hf_delta_token
            ),
        },
    ),
    Peer(
        "mamba_ssm",
        "mamba-ssm",
        ("cuda",),
        {
            (name, "sequence"): Call(
                "mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined",
                lambda op, x, shape: {**as_ssd(op, x, shape), "chunk_size": 256},
                first,
                ("A",),
            )
            for name in ("simple_gla", "ssd")
        }
        | {
            ("selective_scan", "sequence"): Call(
                "mamba_ssm.ops.selective_scan_interface:selective_scan_fn"
            )
        },
    ),
    Peer(
        "xlstm, a loop",
        "xlstm",
        ("cpu",),
        {
            ("slstm", "sequence"): Call("lsm_cuda.bench.compositions:slstm_loop", needs=VANILLA),
        },
    ),
    Peer(
        "mlstm_kernels",
        "mlstm_kernels",
        ("cpu",),
        {
            ("mlstm", "sequence"): Call(
                "mlstm_kernels.torch.chunkwise.native.fwbw:mlstm_chunkwise__native_autograd",
                fla(head_first=True),
                heads_second,
            ),
            ("mlstm", "step"): Call(
                "mlstm_kernels.torch.recurrent.native_step:mlstm_recurrent_step__native",
                mlstm_token,
            ),
        },
        fits=in_chunks,
    ),
    Peer(
        "mlstm_kernels (Triton)",
        "mlstm_kernels",
        ("cuda",),
        {
            ("mlstm", "sequence"): Call(
                "mlstm_kernels.torch.chunkwise.triton_xl_chunk.fwbw:mlstm_chunkwise__xl_chunk",
                fla(head_first=True),
                heads_second,
            ),
        },
        fits=in_chunks,
    ),
    Peer(
        "PyTorch",
        "torch",
        ("cpu", "cuda"),
        {
            ("causal_conv1d", "sequence"): Call(
                "lsm_cuda.bench.compositions:conv_and_silu", channels_second, heads_second
            ),
            ("causal_conv1d_fn", "sequence"): Call("lsm_cuda.bench.compositions:conv_and_silu"),
            ("block_pool", "sequence"): Call("lsm_cuda.bench.compositions:pooled"),
            ("merge_attn_states", "sequence"): Call("lsm_cuda.bench.compositions:merged"),
            ("block_select", "sequence"): Call(
                "lsm_cuda.bench.compositions:scored_and_chosen", selection, as_bitmap
            ),
        },
        longest=16384,
    ),
    Peer(
        "torch SDPA, masked",
        "torch",
        ("cpu", "cuda"),
        of_attention(
            Call("torch.nn.functional:scaled_dot_product_attention", masked, heads_second),
            Call("torch.nn.functional:scaled_dot_product_attention", masked_token, heads_second),
        ),
        longest=16384,
    ),
    Peer(
        "torch FlexAttention, masked",
        "torch",
        ("cuda",),
        of_attention(Call("lsm_cuda.bench.compositions:flex_attention", flex_masked, heads_second)),
    ),
    Peer(
        "torch SDPA",
        "torch",
        ("cpu", "cuda"),
        of_every_op(
            Call("torch.nn.functional:scaled_dot_product_attention", softmax, heads_second),
            Call("torch.nn.functional:scaled_dot_product_attention", softmax_token, heads_second),
        ),
        same=False,
    ),
    Peer(
        "torch FlexAttention",
        "torch",
        ("cuda",),
        of_every_op(Call("lsm_cuda.bench.compositions:flex_attention", flex, heads_second)),
        same=False,
    ),
    Peer(
        "flash-attn 2",
        "flash-attn",
        ("cuda",),
        of_every_op(
            Call("flash_attn:flash_attn_func", flash),
            Call("flash_attn:flash_attn_with_kvcache", flash_token),
        ),
        same=False,
    ),
    Peer(
        "flash-attn 3",
        "flash-attn-3",
        ("cuda",),
        of_every_op(
            Call("flash_attn_interface:flash_attn_func", flash),
            Call("flash_attn_interface:flash_attn_with_kvcache", flash_token),
        ),
        same=False,
    ),
    Peer(
        "FlashInfer",
        "flashinfer-python",
        ("cuda",),
        of_every_op(
            Call("flashinfer:single_prefill_with_kv_cache", one_row),
            Call("flashinfer:single_decode_with_kv_cache", one_row_token),
        ),
        same=False,
        backward=False,
        fits=lambda shape: shape["B"] == 1 and not shape.packed,
    ),
]
