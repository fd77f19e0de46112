"""Our arguments as those of other people's functions: names, layouts and constants of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Attention, Selection
from .calls import Arguments
from .operators import BLOCK, STRIDE, WINDOW
from .registry import Inputs, Op, Shape

# --- FLA


def fla(renamed: dict[str, str] | None = None, head_first: bool = False, **more: Any) -> Arguments:
    """Our names to theirs, ``fla({"g": "gk"})``, boundaries as int64, and constants."""
    names = renamed or {}

    def arguments(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
        theirs: dict[str, Any] = {}
        for name, t in x.items():
            swap = head_first and name in op.inputs and op.per_token(name)
            t = t.long() if name == "cu_seqlens" else t
            theirs[names.get(name, name)] = t.transpose(1, 2).contiguous() if swap else t
        return theirs | more

    return arguments


def fla_token(renamed: dict[str, str] | None = None, head_first: bool = False) -> Arguments:
    """A decode step through a function for sequences: T = 1, a state in, a state out."""
    sequence = fla(renamed, head_first, output_final_state=True)

    def arguments(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
        token = {n: t[:, :1].contiguous() if op.per_token(n) else t for n, t in x.items()}
        return {**sequence(op, token, shape), "initial_state": op.states(x, shape)}

    return arguments


# --- Mamba-2, whose operator has other names for v, k, q and g


def as_ssd(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """simple_gla as an SSD: g = dt A and v = dt x, with A = −1; ssd as it is."""
    if op.name == "ssd":
        return dict(x)
    q, k, v = (x[name] for name in op.qkv)
    dt = -x["g"]
    scaled = (v / dt.unsqueeze(-1)).to(v.dtype)
    A = -torch.ones(dt.shape[-1], device=dt.device)
    return {"x": scaled, "dt": dt, "A": A, "B": k, "C": q * shape["K"] ** -0.5}


def hf_ssd(chunk_size: int) -> Arguments:
    def arguments(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
        theirs = as_ssd(op, x, shape)
        return {"hidden_states": theirs.pop("x"), **theirs, "chunk_size": chunk_size}

    return arguments


def hf_ssd_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {
        n: t[:, 0].contiguous() if t.dim() > 2 else t for n, t in as_ssd(op, x, shape).items()
    }
    B, HV, V, K = shape.dims("B HV V K")
    dt, A = theirs["dt"], theirs["A"]
    theirs |= {
        "dt": dt.unsqueeze(-1).expand(-1, -1, V), "A": A.view(-1, 1, 1).expand(-1, V, K),
        "state": torch.zeros(B, HV, V, K, device=dt.device),
    }  # fmt: skip
    return {"hidden_states": theirs.pop("x"), **theirs}


# --- delta rules of transformers


def hf_delta(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    names = {"q": "query", "k": "key", "v": "value"}
    return {names.get(name, name): t for name, t in x.items()}


def hf_delta_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    token = {n: t[:, :1].contiguous() if op.per_token(n) else t for n, t in x.items()}
    state = {"initial_state": op.states(x, shape), "output_final_state": True}
    return hf_delta(op, token, shape) | state


# --- xLSTM


def mlstm_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    token = {n: t[:, 0].contiguous() for n, t in x.items()}
    C, n, m = op.states(x, shape)
    gates = {name: token.pop(name).unsqueeze(-1) for name in "if"}
    return {**token, **gates, "c": C, "n": n, "m": m.unsqueeze(-1)}


# --- softmax attention


def heads_first(op: Op, x: Inputs) -> list[Tensor]:
    """q, k, v as [B, heads, T, ·]."""
    return [t.transpose(1, 2).contiguous() for t in time_first(op, x)]


def gqa(q: Tensor, k: Tensor) -> dict[str, Any]:
    """For torch, where queries have more heads; heads come second."""
    return {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}


def softmax(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    q, k, v = heads_first(op, x)
    return {"query": q, "key": k, "value": v, "is_causal": True, **gqa(q, k)}


def softmax_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """One query, and a cache of T keys and values."""
    q, k, v = heads_first(op, x)
    return {"query": q[:, :, :1], "key": k, "value": v, **gqa(q, k)}


def time_first(op: Op, x: Inputs) -> list[Tensor]:
    """q, k, v as [B, T, heads, ·]: keys have the heads of values, and queries as many or more."""
    q, k, v = (x[name] for name in op.qkv)
    q, k = (t.repeat_interleave(max(1, v.shape[2] // t.shape[2]), 2) for t in (q, k))
    return [q.contiguous(), k.contiguous(), v]


def flash(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    q, k, v = time_first(op, x)
    return {"q": q, "k": k, "v": v, "causal": True}


def flash_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    q, k, v = time_first(op, x)
    return {"q": q[:, :1].contiguous(), "k_cache": k, "v_cache": v}


def one_row(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    q, k, v = (t[0] for t in time_first(op, x))
    return {"q": q, "k": k, "v": v, "causal": True}


def one_row_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    q, k, v = (t[0] for t in time_first(op, x))
    return {"q": q[0], "k": k, "v": v}


def flex(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = heads_first(op, x)
    T = shape["T"]
    mask = create_block_mask(
        lambda b, h, i, j: i >= j, None, None, T, T, device=q.device, _compile=T > 8192
    )
    return {"query": q, "key": k, "value": v, "block_mask": mask, **gqa(q, k)}


# --- sparse attention


def masked(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """The pattern as a dense mask."""
    assert isinstance(op, Attention)
    mask = op.seen(shape["T"], x["q"].device)
    return softmax(op, x, shape) | {"attn_mask": mask, "is_causal": False}


def masked_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """The last query, and the keys and values that it sees, in memory of their own."""
    assert isinstance(op, Attention)
    q, k, v = heads_first(op, x)
    seen = op.seen_by_last(shape["T"], q.device)
    return {"query": q[:, :, -1:], "key": k[:, :, seen], "value": v[:, :, seen], **gqa(q, k)}


def flex_masked(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    assert isinstance(op, Attention)
    q, k, v = heads_first(op, x)
    T, window, lists = shape["T"], op.window, op.lists and op.lists(shape["T"])
    block_q = lists.block_q if lists else T
    bitmap = lists.to_bitmap()[0, 0] if lists else torch.ones(1, -(-T // BLOCK), dtype=torch.bool)
    bitmap = bitmap.to(q.device)

    def seen(b: Any, h: Any, i: Any, j: Any) -> Any:
        there = bitmap[i // block_q, j // BLOCK] & (i >= j)
        return there & (i - j < window) if window else there

    mask = create_block_mask(seen, None, None, T, T, device=q.device, _compile=T > 8192)
    return {"query": q, "key": k, "value": v, "block_mask": mask, **gqa(q, k)}


def selection(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    assert isinstance(op, Selection)
    q, k = x["q"], x["k"]
    T, windows, device = shape["T"], k.shape[1], q.device
    t, start = torch.arange(T, device=device), torch.arange(windows, device=device) * STRIDE
    block = torch.arange(-(-T // BLOCK), device=device)
    shares = torch.zeros(windows, len(block), device=device)
    for part in range(0, WINDOW, STRIDE):
        shares += (start + part)[:, None] // BLOCK == block
    own = t[:, None] // BLOCK
    first = (block == 0) | (block == own) | (block == own - 1)
    taken = torch.where(first, 1e9, 0.0).masked_fill(block > own, -1e9)
    past = start + WINDOW - 1 <= t[:, None]
    return {"q": q, "k": k, "shares": shares.to(q.dtype), "past": past, "taken": taken}


# --- convolution and scans


def channels_second(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    return {**x, "x": x["x"].transpose(1, 2).contiguous()}


def hf_selective(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"u": "hidden_states", "delta": "dt"}
    return {theirs.get(name, name): t.to(x["A"].dtype) for name, t in x.items()}


def hf_selective_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"x": "hidden_states"}
    return {theirs.get(name, name): t for name, t in op.token(x, shape).items()}


def hf_conv_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"x": "hidden_states", "state": "conv_state"}
    token = op.token(x, shape)
    token["x"] = token["x"].unsqueeze(-1)
    return {theirs.get(name, name): t for name, t in token.items()}


def one_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """A sequence of one, after what ours is after."""
    return {n: t[:, :1].contiguous() if op.per_token(n) else t for n, t in x.items()}


def hf_wkv4(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"w": "time_decay", "u": "time_first", "k": "key", "v": "value"}
    return {theirs[name]: t for name, t in x.items()}


def hf_wkv4_token(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    """A sequence of one behind a state."""
    return hf_wkv4(op, one_token(op, x, shape), shape) | {"state": op.states(x, shape)}
