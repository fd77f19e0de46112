"""What people write in PyTorch for want of an operator, and cells of others walked in Python."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import BLOCK, CHOSEN, STRIDE, WINDOW

__all__ = [
    "as_bitmap",
    "conv_and_silu",
    "flex_attention",
    "griffin_loop",
    "merged",
    "pooled",
    "scored_and_chosen",
    "slstm_loop",
]


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def flex_attention(**arguments: Any) -> Any:
    return compiled_flex()(**arguments)


def conv_and_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, D, T]."""
    D, W = weight.shape
    return F.silu(
        F.conv1d(x, weight.unsqueeze(1), bias, padding=W - 1, groups=D)[..., : x.shape[2]]
    )


def pooled(x: Tensor) -> Tensor:
    """Means of windows, [B, T, H, K] to [B, R, H, K]."""
    return x.unfold(1, WINDOW, STRIDE).mean(-1)


def merged(o: Tensor, lse: Tensor) -> Tensor:
    weight = lse.softmax(0).transpose(-1, -2).unsqueeze(-1)
    return (weight * o).sum(0).to(o.dtype)


def scored_and_chosen(q: Tensor, k: Tensor, shares: Tensor, past: Tensor, taken: Tensor) -> Tensor:
    """Indices of blocks: a softmax over windows that are ``past``, summed over a group's heads,
    then over windows by their ``shares`` of blocks; blocks ``taken`` come first."""
    B, T, H, K = q.shape
    grouped = q.reshape(B, T, k.shape[2], H // k.shape[2], K)
    scores = K**-0.5 * torch.einsum("bthgk,bjhk->bhgtj", grouped, k)
    p = scores.masked_fill(~past, -torch.inf).softmax(-1).nan_to_num(0.0).sum(2)
    rank: Tensor = p @ shares + taken
    return rank.topk(min(CHOSEN, rank.shape[-1]), -1).indices


def as_bitmap(indices: Tensor) -> Tensor:
    """Of [B, H, T, CHOSEN], those up to the query's own block."""
    T = indices.shape[2]
    blocks = -(-T // BLOCK)
    bitmap = torch.zeros(*indices.shape[:3], blocks, device=indices.device)
    own = torch.arange(T, device=indices.device)[:, None] // BLOCK
    ahead = torch.arange(blocks, device=indices.device) > own
    return bitmap.scatter_(-1, indices, 1.0).masked_fill_(ahead, 0.0)


# --- xLSTM's sLSTM and Griffin, walked in Python


def slstm_loop(x: Tensor, R: Tensor) -> Tensor:
    """xlstm's plain cell, in fp32."""
    vanilla: Any = importlib.import_module("xlstm.blocks.slstm.src.vanilla")

    B, _, _, H, K = x.shape
    cell = vanilla.slstm_pointwise_function_registry["slstm"]
    zeros = R.new_zeros(4 * H * K)
    tokens, matrix = x.to(R.dtype).flatten(2).transpose(0, 1), R.permute(0, 2, 3, 1).flatten(1, 2)
    found, _, _ = vanilla.slstm_forward(
        tokens, zeros.view(4, 1, -1).expand(-1, B, -1), matrix, zeros, cell
    )
    return found[0, 1:].transpose(0, 1).unflatten(2, (H, K))  # type: ignore[no-any-return]


def griffin_loop(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, param: Tensor, initial_state: Tensor
) -> Tensor:
    """The layer of transformers behind its projections."""
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as gemma

    log = -8.0 * recurrence_gate.sigmoid() * F.softplus(param)
    root = gemma.SqrtBoundDerivative.apply(1 - (2 * log).exp())
    scaled = x * input_gate.sigmoid() * root.to(x.dtype)
    never = torch.zeros(*x.shape[:2], 1, dtype=torch.bool, device=x.device)
    walk = gemma.RecurrentGemmaRglru._rnn_scan
    h, _ = walk(None, scaled, log.exp(), never, initial_state)
    return h  # type: ignore[no-any-return]
