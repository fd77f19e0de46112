"""Other people's code for the same work, used where it is installed and skipped by name where not.

A peer is one row of PEERS: which operators it serves, by which function, and how our arguments
become its own (before the clock starts, so that layouts cost nobody anything).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attention, Dense, Nsa, Selection
from .operators import BLOCK, CHOSEN, STRIDE, WINDOW, first
from .registry import OPS, ROWS, Inputs, Op, Shape

__all__ = ["PEERS", "Call", "Peer", "absent", "ours", "version"]

Arguments = Callable[[Op, Inputs, Shape], dict[str, Any]]


def as_they_are(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    return dict(x)


def heads_second(result: Any) -> Tensor:
    """[B, H, T, V] to [B, T, H, V]."""
    return first(result).transpose(1, 2)


@dataclass(frozen=True)
class Call:
    """One function of a peer.

    ``function``: ``"module:name"``, or ``"ops/…/naive.py:name"`` for a file of FLA's, whose package
    cannot be imported without triton. ``arguments`` makes its keyword arguments, ``result`` turns
    what it returns into our output. Tensors named in ``constants`` get no gradient.
    """

    function: str
    arguments: Arguments = as_they_are
    result: Callable[[Any], Tensor] = first
    constants: tuple[str, ...] = ("cu_seqlens",)

    def load(self) -> Callable[..., Any]:
        """Raises ImportError with the reason where the function cannot be had."""
        where, name = self.function.split(":")
        module = fla_file(where) if where.endswith(".py") else importlib.import_module(where)
        try:
            found: Callable[..., Any] = operator.attrgetter(name)(module)
        except AttributeError as error:
            raise ImportError(f"{where} has no {name}") from error
        return found


@dataclass(frozen=True)
class Peer:
    """Somebody else's package and the operators it serves.

    ``calls``: by operator and kind ("sequence" or "step"). ``same``: it computes our function and
    must agree in value; else it is what people use instead. ``longest``: T beyond which it is not
    tried. ``fits``: shapes it takes.
    """

    name: str
    package: str  # the distribution whose version is recorded
    devices: tuple[str, ...]
    calls: dict[tuple[str, str], Call]
    same: bool = True
    backward: bool = True
    longest: int = 2**40
    fits: Callable[[Shape], bool] = field(default=lambda shape: not shape.packed)

    def call(self, op: Op, shape: Shape, mode: str) -> Call | None:
        """What to time in a mode, or None if the row has nothing there."""
        if (mode == "training" and not self.backward) or not self.fits(shape):
            return None
        if mode != "step" and shape["T"] > self.longest:
            return None
        return self.calls.get((op.name, "step" if mode == "step" else "sequence"))


def absent(peer: Peer) -> str | None:
    """Why a peer cannot be used here, or None."""
    try:
        next(iter(peer.calls.values())).load()
    except Exception as error:  # whatever a broken install raises is the reason it is skipped
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ours(op: Op, mode: str) -> Call:
    """Our own function, called like a peer's."""
    if mode == "step":
        return Call(f"lsm_cuda.ops:{op.step}", lambda op, x, shape: op.token(x, shape))
    return Call(f"lsm_cuda.ops:{op.chunk}", lambda op, x, shape: op.sequence(x, shape), op.result)


# --- FLA


@functools.cache
def fla_file(path: str) -> ModuleType:
    """A file under FLA's package folder, by path; LSM_FLA_DIR names the folder, or ``fla`` is
    installed."""
    root = os.environ.get("LSM_FLA_DIR")
    if root is None:
        spec = importlib.util.find_spec("fla")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("no module named 'fla', and LSM_FLA_DIR is not set")
        root = spec.submodule_search_locations[0]
    file = Path(root) / path
    if not file.is_file():
        raise ImportError(f"{path} is not in {root}")
    spec = importlib.util.spec_from_file_location("fla_" + path[:-3].replace("/", "_"), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def flex_attention(**arguments: Any) -> Any:
    return compiled_flex()(**arguments)


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


def of_attention(sequence: Call, step: Call | None = None) -> dict[tuple[str, str], Call]:
    """For the patterns that are one softmax under a mask; causality alone needs none."""
    other = (Dense, Nsa)
    names = [r.name for r in ROWS if isinstance(r, Attention) and not isinstance(r, other)]
    found = {(name, "sequence"): sequence for name in names}
    return found if step is None else found | {(name, "step"): step for name in names}


# --- PyTorch itself, put together


def conv_and_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [B, D, T]."""
    D, W = weight.shape
    return F.silu(
        F.conv1d(x, weight.unsqueeze(1), bias, padding=W - 1, groups=D)[..., : x.shape[2]]
    )


def channels_second(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    return {**x, "x": x["x"].transpose(1, 2).contiguous()}


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


def of_every_op(sequence: Call, step: Call | None = None) -> dict[tuple[str, str], Call]:
    """Softmax attention stands beside every operator with queries, keys and values."""
    names = [op.name for op in OPS.values() if op.qkv]
    found = {(name, "sequence"): sequence for name in names}
    return found if step is None else found | {(name, "step"): step for name in names}


def hf_selective(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"u": "hidden_states", "delta": "dt"}
    return {theirs.get(name, name): t.to(x["A"].dtype) for name, t in x.items()}


def hf_wkv4(op: Op, x: Inputs, shape: Shape) -> dict[str, Any]:
    theirs = {"w": "time_decay", "u": "time_first", "k": "key", "v": "value"}
    return {theirs[name]: t for name, t in x.items()}


def in_chunks(shape: Shape) -> bool:
    return shape["T"] % 64 == 0 and not shape.packed


SSD = "transformers.models.mamba2.modeling_mamba2"
GDN = "transformers.models.qwen3_next.modeling_qwen3_next"
KIMI = "transformers.models.kimi_linear.modeling_kimi_linear"
MAMBA = "transformers.models.mamba.modeling_mamba"
RWKV = "transformers.models.rwkv.modeling_rwkv"
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
            )
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
            ("selective_scan", "sequence"): Call(
                f"{MAMBA}:mamba_selective_scan.__wrapped__", hf_selective
            ),
            ("rg_lru", "sequence"): Call("lsm_cuda.bench.peers:griffin_loop"),
        },
        longest=512,  # training takes a minute and gigabytes at 2048
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
            ("slstm", "sequence"): Call("lsm_cuda.bench.peers:slstm_loop"),
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
                "lsm_cuda.bench.peers:conv_and_silu", channels_second, heads_second
            ),
            ("block_pool", "sequence"): Call("lsm_cuda.bench.peers:pooled"),
            ("merge_attn_states", "sequence"): Call("lsm_cuda.bench.peers:merged"),
            ("block_select", "sequence"): Call(
                "lsm_cuda.bench.peers:scored_and_chosen", selection, as_bitmap
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
        of_attention(Call("lsm_cuda.bench.peers:flex_attention", flex_masked, heads_second)),
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
        of_every_op(Call("lsm_cuda.bench.peers:flex_attention", flex, heads_second)),
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
