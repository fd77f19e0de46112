"""Sparse attention for the tests: cases, one way to run them anywhere, and dense attention under
the same mask."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields, replace

import torch
from cases import DTYPES
from impls import Cuda, Emulator, Impl, threads
from inputs import Inputs, Tensors, boundaries, lay_out, state_dtype
from torch import Tensor

from lsm_cuda import ops, reference
from lsm_cuda.ops import AttnMask, BlockLists
from lsm_cuda.ops._sparse_attn import TENSORS

# Arguments that are differentiable but for q, k, v.
OTHERS = ("block_bias", "sink_logits", "ramp")


@dataclass(frozen=True)
class Attn:
    """One call. ``batch``: rows, or the dtype of cu_seqlens for sequences packed into one row.

    ``lists``: none, csr, capacity, all (every block) or empty (no block). ``heads``: Hq, Hkv and
    the lists'. ``extras``: further terms of the scores: softcap, sinks, alibi, ramp, bias.
    """

    Tq: int = 40
    Tk: int = 40
    heads: tuple[int, int, int] = (2, 1, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: str = "f32"
    batch: int | str = 1
    mask: dict = field(default_factory=dict, hash=False)
    lists: str = "csr"
    blocks: tuple[int, int] = (16, 16)
    extras: tuple[str, ...] = ()
    scale: float | None = None
    layout: str = "contiguous"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def __str__(self) -> str:
        changed = (f.name for f in fields(self) if getattr(self, f.name) != getattr(Attn(), f.name))
        values = ("".join(f"{n}_{getattr(self, n)}".split()) for n in changed)
        return "-".join(values).replace("'", "") or "plain"


@dataclass(frozen=True)
class Call:
    """Inputs, and what else a call takes."""

    x: Inputs  # q, k, v and the others that are there; grad_o
    mask: AttnMask
    lists: BlockLists | None
    options: dict
    grad_lse: Tensor
    cu_seqlens_k: Tensor | None

    def arguments(self, tensors: Tensors) -> dict:
        """Of lsm_cuda.ops.block_sparse_attn, or of its definition; with tensors for those of x."""
        given = {n: t for n, t in tensors.items() if n not in ("block_bias",)}
        bias, dtype = tensors.get("block_bias"), tensors["q"].dtype
        lists = self.lists if bias is None else replace(self.lists, bias=bias)
        options = {
            n: o.to(dtype) if isinstance(o, Tensor) and dtype == torch.float64 else o
            for n, o in self.options.items()
        }
        return {**given, "lists": lists, "mask": self.mask, "scale": self.x.scale, **options}


def rows_of(case: Attn, cu: Tensor | None) -> int:
    lengths = [case.Tq] if cu is None else cu.diff().tolist()
    return sum(-(-n // case.blocks[0]) for n in lengths)


def make_lists(case: Attn, B: int, cu_q, cu_k, rng: torch.Generator) -> BlockLists | None:
    if case.lists == "none":
        return None
    block_q, block_k = case.blocks
    longest = case.Tk if cu_k is None else max(cu_k.diff().tolist(), default=0)
    bitmap = torch.rand(
        B, case.heads[2], rows_of(case, cu_q), -(-longest // block_k), generator=rng
    )
    bitmap = bitmap < {"all": 2.0, "empty": 0.0}.get(case.lists, 0.5)
    if cu_k is not None:  # blocks that a sequence does not have
        first = 0
        for tq, tk in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True):
            rows = -(-tq // block_q)
            bitmap[:, :, first : first + rows, -(-tk // block_k) :] = False
            first += rows
    capacity = bitmap.shape[-1] + 1 if case.lists == "capacity" else None
    return BlockLists.from_bitmap(
        bitmap, case.Tq, case.Tk, block_q, block_k, capacity, None, cu_q, cu_k
    )


def make(case: Attn) -> Call:
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    cu_q = cu_k = None
    B, (Hq, Hkv, _), (K, V) = case.batch, case.heads, case.dims
    if isinstance(case.batch, str):
        dtype, B = getattr(torch, case.batch), 1
        cu_q = boundaries(case.Tq, dtype)
        # Each sequence has keys, or none, of its own.
        cu_k = cu_q if case.Tq == case.Tk else torch.tensor(
            [0, 3, case.Tk // 2, case.Tk // 2, case.Tk - 5, case.Tk - 5, case.Tk]
        ).to(dtype)  # fmt: skip

    def normal(*shape: int, dtype: torch.dtype = case.torch_dtype) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    wide = state_dtype(case.torch_dtype)
    lists = make_lists(case, B, cu_q, cu_k, rng)
    tensors = {
        "q": lay_out(normal(B, case.Tq, Hq, K), case.layout),
        "k": lay_out(normal(B, case.Tk, Hkv, K), case.layout),
        "v": lay_out(normal(B, case.Tk, Hkv, V), case.layout),
    }
    options: dict = {}
    if "bias" in case.extras and lists is not None:
        tensors["block_bias"] = normal(*lists.index.shape, dtype=wide)
    if "sinks" in case.extras:
        tensors["sink_logits"] = normal(Hq, dtype=wide)
    if "ramp" in case.extras:
        tensors["ramp"] = (normal(Hq, dtype=wide) * 4 + 6).abs()
        options["ramp_length"] = 5.0
    if "alibi" in case.extras:
        options["alibi_slopes"] = normal(Hq, dtype=wide).abs() / 4
    if "softcap" in case.extras:
        options["softcap"] = 1.5
    mask = dict(case.mask)
    if "head_left" in mask:
        mask["head_left"] = torch.tensor(mask["head_left"], dtype=torch.int32)
    x = Inputs(tensors, normal(B, case.Tq, Hq, V), scale=case.scale, cu_seqlens=cu_q)
    return Call(x, AttnMask(**mask), lists, options, normal(B, Hq, case.Tq, dtype=wide), cu_k)


def differentiate(call: Call, forward, x: Inputs, grad_lse: Tensor) -> Tensors:
    leaves = {name: t.detach().requires_grad_() for name, t in x.tensors.items()}
    o, lse = forward(leaves)
    nothing = sum(t.sum() for t in leaves.values()) * 0
    results = {n: t if t.requires_grad else t + nothing for n, t in (("o", o), ("lse", lse))}
    # Of queries without keys lse is −inf, whatever flows back into it.
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), [x.grad_o, grad_lse], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    gradients = {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {"o": o.detach(), "lse": lse.detach()} | gradients


def half_of_blocks(
    Tq: int, Tk: int, Hq: int, Hkv: int, K: int, V: int, block_q: int, block_k: int
) -> tuple[tuple, Tensor, Tensor]:
    """Raw arguments in bf16 over lists of half of the blocks; their bitmap; a gradient of o."""
    draw = torch.Generator().manual_seed(0)
    q, grad_o = (torch.randn(1, Tq, Hq, n, generator=draw).bfloat16() for n in (K, V))
    k, v = (torch.randn(1, Tk, Hkv, n, generator=draw).bfloat16() for n in (K, V))
    bitmap = torch.rand(-(-Tq // block_q), Tk // block_k, generator=draw) < 0.5
    lists = BlockLists.from_bitmap(bitmap, Tq, Tk, block_q, block_k)
    arguments = (
        q, k, v, None, None, lists.index, lists.row_ptr, *(None,) * 5, [1.0, 0.0, 0.0, 0.0],
        AttnMask().numbers(), [1, block_q, block_k],
    )  # fmt: skip
    return arguments, bitmap, grad_o


def definition(call: Call, dtype: torch.dtype) -> Tensors:
    def forward(tensors: Tensors):
        return reference.block_sparse_attention(
            **call.arguments(tensors), cu_seqlens_q=call.x.cu_seqlens,
            cu_seqlens_k=call.cu_seqlens_k,
        )  # fmt: skip

    return differentiate(call, forward, call.x.map(lambda t: t.to(dtype)), call.grad_lse.to(dtype))


def run(impl: Impl, call: Call) -> Tensors:
    if isinstance(impl, Emulator):
        return impl.under_every_seed(lambda: emulated(impl, call))
    x = call.x.to(impl.device)

    def forward(tensors: Tensors):
        arguments = call.arguments(tensors)
        if isinstance(impl, Cuda):
            arguments["lists"] = arguments["lists"] and arguments["lists"].to(impl.device)
            for name, o in arguments.items():
                arguments[name] = o.to(impl.device) if isinstance(o, Tensor) else o
        cu_k = None if call.cu_seqlens_k is None else call.cu_seqlens_k.to(impl.device)
        return ops.block_sparse_attn(
            **arguments, cu_seqlens=x.cu_seqlens, cu_seqlens_k=cu_k, return_lse=True
        )

    with threads(2):
        results = differentiate(call, forward, x, call.grad_lse.to(impl.device))
    return {n: t.cpu() for n, t in results.items()}


def raw_arguments(call: Call) -> tuple:
    """Of lsm::block_sparse_attn_fwd."""
    t, lists = call.x.tensors, call.lists
    scale = call.x.scale if call.x.scale is not None else t["q"].shape[-1] ** -0.5
    scores = [scale, call.options.get("softcap", 0.0), call.options.get("ramp_length", 0.0)]
    scores.append(call.options.get("pv_threshold", 0.0))
    blocks = [1, 64, 64] if lists is None else [lists.shape[1], lists.block_q, lists.block_k]
    named = {
        **t,
        "cu_seqlens_q": call.x.cu_seqlens,
        "cu_seqlens_k": call.cu_seqlens_k,
        "block_index": None if lists is None else lists.index,
        "block_ptr": None if lists is None else lists.row_ptr,
        "head_left": call.mask.head_left,
        "alibi_slopes": call.options.get("alibi_slopes"),
    }
    return (*(named.get(n) for n in TENSORS), scores, call.mask.numbers(), blocks)


def emulated(impl: Emulator, call: Call) -> Tensors:
    """By hand what autograd does, with the emulator's operators."""
    library = emulator_ops(impl)
    arguments = raw_arguments(call)
    o, lse = library.block_sparse_attn_fwd(*arguments)
    dq, dk, dv, *others = library.block_sparse_attn_bwd(
        *arguments, o, lse, call.x.grad_o, call.grad_lse
    )
    results = {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    grads = dict(zip(OTHERS, others, strict=True))
    return results | {f"d{n}": grads[n] for n in call.x.tensors if n in OTHERS}


def emulator_ops(impl: Emulator):
    class Library:
        @staticmethod
        def raw(kind: str, namespace: str = "lsm"):
            return getattr(torch.ops, namespace)

    return impl.raw(Library, "")


def dense(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """torch's attention over ``pairs``, bool [B, Hq, Tq, Tk]; queries without any give zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    some = pairs.any(-1, keepdim=True)
    o = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=pairs | ~some, scale=scale
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (scale * q.float() @ k.float().mT).masked_fill(~pairs, -torch.inf)
    lse = torch.where(some[..., 0], scores.masked_fill(~some, 0.0).logsumexp(-1), -torch.inf)
    return torch.where(some, o, 0.0).transpose(1, 2), lse
