"""The sparse attention engine's operators as Python sees them: shapes for tracing, formulas for
autograd, and the calls that public functions make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import (
    accumulation_dtype,
    autocast_dtype,
    check_device_like,
    check_no_forward_ad,
    check_no_gradient,
    check_same_device,
    no_double_backward,
)
from .attn_mask import AttnMask
from .block_lists import BlockLists

# Arguments of block_sparse_attn_fwd and _bwd in order. With cache_seqlens and block_table for
# the boundaries they are those of sparse_attn_decode.
TENSORS = (
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "block_index", "block_ptr", "block_bias",
    "head_left", "sink_logits", "alibi_slopes", "ramp",
)  # fmt: skip
CACHED = ("q", "k", "v", "cache_seqlens", "block_table", *TENSORS[5:])
# Then come scores: scale, softcap, ramp_length, pv_threshold; mask: AttnMask.numbers(); blocks:
# heads of the lists, block_q, block_k.
_OTHERS = 3


def _output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=accumulation_dtype(q))


def _same_device(op: str, names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    named = dict(zip(names, tensors, strict=True))
    check_same_device(op, named.pop("q"), **named)


@torch.library.register_fake("lsm::block_sparse_attn_fwd")
def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    _same_device("block_sparse_attn_fwd", TENSORS, inputs[:-_OTHERS])
    return _output(inputs[0], inputs[2])


@torch.library.register_fake("lsm::block_sparse_attn_bwd")
def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    tensors = dict(zip(TENSORS, inputs, strict=False))
    q = tensors["q"]
    wide = q.new_empty(0, dtype=accumulation_dtype(q))
    grads = [tensors[n].new_empty(tensors[n].shape) for n in "qkv"]
    for name in ("block_bias", "sink_logits", "ramp"):
        t = tensors[name]
        grads.append(wide.new_empty((0,) if t is None else t.shape))
    return tuple(grads)


@torch.library.register_fake("lsm::sparse_attn_decode")
def _decode_fake(*inputs):  # type: ignore[no-untyped-def]
    _same_device("sparse_attn_decode", CACHED, inputs[:-_OTHERS])
    return _output(inputs[0], inputs[2])


@torch.library.register_fake("lsm::sparse_attn_decode_codes")
def _decode_codes_fake(q, k, v, k_affine, v_affine, *rest):  # type: ignore[no-untyped-def]
    names = (*CACHED[:3], "k_affine", "v_affine", *CACHED[3:])
    _same_device("sparse_attn_decode_codes", names, (q, k, v, k_affine, v_affine, *rest[:-_OTHERS]))
    o, lse = _output(q, v)
    return o.new_empty(*o.shape[:3], v.shape[3] * q.shape[3] // k.shape[3]), lse


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:-_OTHERS], *output)
    ctx.others = inputs[-_OTHERS:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_lse):  # type: ignore[no-untyped-def]
    *tensors, o, lse = ctx.saved_tensors
    grad_o = torch.zeros_like(o) if grad_o is None else grad_o
    dq, dk, dv, *rest = torch.ops.lsm.block_sparse_attn_bwd(
        *tensors, *ctx.others, o, lse, grad_o, grad_lse
    )
    named = dict(zip(TENSORS, tensors, strict=True))
    grads = dict.fromkeys(TENSORS) | {"q": dq, "k": dk, "v": dv}
    for name, grad in zip(("block_bias", "sink_logits", "ramp"), rest, strict=True):
        grads[name] = None if named[name] is None else grad
    return (*grads.values(), *(None,) * _OTHERS)


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("block_sparse_attn_bwd"))


torch.library.register_autograd(
    "lsm::block_sparse_attn_fwd", _backward, setup_context=_setup_context
)
torch.library.register_autograd("lsm::block_sparse_attn_bwd", _refuse_double_backward)


# ---- The merge ----


@torch.library.register_fake("lsm::merge_attn_states")
def _merge_fake(o, lse):  # type: ignore[no-untyped-def]
    check_device_like("merge_attn_states", "o", o, {"lse": lse})
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])


@torch.library.register_fake("lsm::merge_attn_states_bwd")
def _merge_bwd_fake(o_parts, lse_parts, o, lse, grad_o, grad_lse):  # type: ignore[no-untyped-def]
    return o_parts.new_empty(o_parts.shape), lse_parts.new_empty(lse_parts.shape)


def _merge_setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _merge_backward(ctx, grad_o, grad_lse):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    grad_o = torch.zeros_like(saved[2]) if grad_o is None else grad_o
    return torch.ops.lsm.merge_attn_states_bwd(*saved, grad_o, grad_lse)


def _refuse_merge_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("merge_attn_states_bwd"))


torch.library.register_autograd(
    "lsm::merge_attn_states", _merge_backward, setup_context=_merge_setup_context
)
torch.library.register_autograd("lsm::merge_attn_states_bwd", _refuse_merge_double_backward)


# ---- Calls ----


def _arguments(
    op: str,
    q: Tensor,
    lists: BlockLists | None,
    mask: AttnMask | None,
    scale: float | None,
    softcap: float,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    ramp: Tensor | None,
    ramp_length: float,
    pv_threshold: float = 0.0,
) -> tuple[Any, ...]:
    """What follows the boundaries."""
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"lsm::{op}: alibi_slopes get no gradient, got a tensor that requires grad; "
            "detach it, or use lsm_cuda.reference"
        )
    wide = accumulation_dtype(q)
    mask = mask or AttnMask()
    index = row_ptr = bias = None
    blocks = [1, 64, 64]
    if lists is not None:
        lists = lists.expand(q.shape[0])
        index, row_ptr = lists.index, lists.row_ptr
        bias = None if lists.bias is None else lists.bias.to(wide)
        blocks = [lists.shape[1], lists.block_q, lists.block_k]
    per_head = (None if t is None else t.to(wide) for t in (sink_logits, alibi_slopes, ramp))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = [float(scale), float(softcap), float(ramp_length), float(pv_threshold)]
    left = mask.head_left
    return (index, row_ptr, bias, left, *per_head, scores, mask.numbers(), blocks)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: BlockLists | None,
    mask: AttnMask | None,
    scale: float | None,
    softcap: float,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    ramp: Tensor | None,
    ramp_length: float,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pv_threshold: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of whole sequences."""
    op = "block_sparse_attn_fwd"
    bias = None if lists is None else lists.bias
    if lists is not None and lists.cu_seqlens_q is not None and cu_seqlens_q is None:
        raise RuntimeError(f"lsm::{op}: lists are of packed sequences, cu_seqlens is missing")
    if pv_threshold:
        given = [t for t in (q, k, v, bias, sink_logits, ramp) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in given):
            raise RuntimeError(
                f"lsm::{op}: pv_threshold has no backward, got an argument that requires grad; "
                "leave it out, or use torch.no_grad()"
            )
    check_no_forward_ad(op, q=q, k=k, v=v, block_bias=bias, sink_logits=sink_logits, ramp=ramp)
    dtype = autocast_dtype(q.device.type)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = (x.to(dtype) for x in (q, k, v))
    rest = _arguments(
        op, q, lists, mask, scale, softcap, sink_logits, alibi_slopes, ramp, ramp_length,
        pv_threshold,
    )  # fmt: skip
    return torch.ops.lsm.block_sparse_attn_fwd(  # type: ignore[no-any-return]
        q, k, v, cu_seqlens_q, cu_seqlens_k, *rest
    )


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor | None,
    block_table: Tensor | None,
    lists: BlockLists | None,
    mask: AttnMask | None,
    scale: float | None,
    softcap: float,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    ramp: Tensor | None,
    ramp_length: float,
    affine: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``o`` and ``lse`` of the last tokens of a cache; of codes if there is ``affine``."""
    op = "sparse_attn_decode"
    check_no_gradient(op, "block_sparse_attn", q, k, v)
    given = _arguments(
        op, q, lists, mask, scale, softcap, sink_logits, alibi_slopes, ramp, ramp_length
    )
    if affine is not None:
        return torch.ops.lsm.sparse_attn_decode_codes(  # type: ignore[no-any-return]
            q, k, v, *affine, cache_seqlens, block_table, *given
        )
    return torch.ops.lsm.sparse_attn_decode(  # type: ignore[no-any-return]
        q, k, v, cache_seqlens, block_table, *given
    )
