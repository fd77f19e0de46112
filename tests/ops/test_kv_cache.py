"""Attention from a cache on every implementation against its definition, and writing to one."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, fields, replace

import pytest
import torch
from cases import DTYPES
from checks import assert_accepted, assert_same_bits
from impls import Emulator, Impl, threads
from inputs import Inputs, Tensors, state_dtype
from torch import Tensor

from lsm_cuda import ops, reference, sparse
from lsm_cuda.ops import AttnMask, BlockLists, _sparse_attn
from lsm_cuda.sparse.kv_quantized import numbers

CAUSAL = AttnMask(causal=True)


@dataclass(frozen=True)
class Decode:
    """One call. ``page``: tokens of a page, 0: contiguous. ``lists``: whose, "1", "kv" or "q", or
    "csr": per query head, of unequal lengths. ``extras``: what is added to scores."""

    Tq: int = 1
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (32, 32)
    lengths: tuple[int, ...] = (70, 1)
    dtype: str = "f32"
    page: int = 0
    lists: str = ""
    mask: AttnMask = CAUSAL
    extras: str = ""
    latent: bool = False

    def __str__(self) -> str:
        rest = (f for f in fields(self) if f.name != "mask")
        mask = [f"{f.name}_{v}" for f in fields(AttnMask)
                if (v := getattr(self.mask, f.name)) != f.default]  # fmt: skip
        return "-".join([*(f"{f.name}_{getattr(self, f.name)}" for f in rest), *mask])


CASES = [
    Decode(),
    Decode(Tq=5, lengths=(130, 3, 0), dtype="bf16"),
    Decode(Tq=4, heads=(8, 1), dims=(64, 80), page=16, dtype="f16"),
    Decode(heads=(16, 1), dims=(128, 64), lengths=(600, 513), page=64, dtype="bf16"),
    Decode(heads=(5, 5), dims=(24, 7), lengths=(33,), extras="sinks"),
    Decode(Tq=7, heads=(6, 2), lengths=(300,), mask=AttnMask(causal=True, left=40, sinks=3)),
    Decode(Tq=2, mask=AttnMask(right=0, left=9), page=8, extras="sinks"),
    Decode(
        Tq=3,
        heads=(14, 2),
        dims=(64, 96),
        lengths=(301, 45),
        page=16,
        dtype="bf16",
        mask=AttnMask(causal=True, left=70, sinks=3),
        extras="softcap sinks",
    ),
    Decode(
        heads=(4, 2),
        dims=(96, 32),
        lengths=(700, 65),
        dtype="bf16",
        extras="left",
        mask=AttnMask(causal=True, sinks=3),
    ),
    Decode(
        Tq=2,
        heads=(4, 2),
        dims=(32, 64),
        lengths=(190, 33),
        dtype="bf16",
        lists="q",
        extras="alibi bias",
    ),
    Decode(Tq=3, lists="1", lengths=(190, 64), mask=AttnMask(), dtype="bf16"),
    Decode(Tq=2, lists="kv", page=32, lengths=(190, 70), extras="sinks bias"),
    Decode(Tq=2, lists="q", lengths=(100, 200), mask=AttnMask(causal=True, dilation=3, sinks=2)),
    Decode(Tq=3, lists="csr", lengths=(100, 200), extras="bias", dtype="bf16"),
    Decode(Tq=2, extras="softcap alibi", lengths=(40, 9)),
    Decode(Tq=3, extras="ramp left", lengths=(90, 30), dtype="f16"),
    Decode(heads=(20, 1), dims=(576, 512), lengths=(70,), latent=True, dtype="bf16"),
    Decode(Tq=2, heads=(4, 2), dims=(256, 200), lengths=(300,), dtype="f32"),
    Decode(Tq=4, mask=AttnMask(causal=True, causal_block=16, prefix=20), lengths=(61,)),
    Decode(lengths=(0, 0), extras="sinks"),
    Decode(Tq=0),
    Decode(Tq=3, dtype="f64", lengths=(270, 20), extras="softcap bias", lists="q"),
]


def make(case: Decode) -> tuple[Inputs, dict]:
    """Arguments by name; the floating ones as Inputs."""
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    (Hq, Hkv), (K, V), B = case.heads, case.dims, len(case.lengths)
    dtype, room = DTYPES[case.dtype], max(*case.lengths, 1) + 5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    rest: dict = {"mask": case.mask, "block_table": None}
    places: tuple[int, ...] = (B, room)
    if case.page:
        pages = -(-room // case.page)
        order = torch.randperm(B * pages + 2, generator=rng)[: B * pages].to(torch.int32)
        rest["block_table"] = order.view(B, pages)
        places = (B * pages + 2, case.page)
    k = (2 * normal(*places, Hkv, K)).to(dtype)
    v = k[..., :V] if case.latent else normal(*places, Hkv, V).to(dtype)
    tensors = {"q": normal(B, case.Tq, Hq, K).to(dtype), "k_cache": k, "v_cache": v}
    rest["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
    if case.lists:
        heads = {"1": 1, "kv": Hkv}.get(case.lists, Hq)
        blocks = -(-max(case.lengths) // 16)
        chosen = torch.rand(B, heads, case.Tq, blocks, generator=rng) < 0.5
        for b, n in enumerate(case.lengths):
            chosen[b, ..., -(-n // 16) :] = False
        chosen[0, 0, 0] = False  # a list without blocks
        capacity = None if case.lists == "csr" else int(chosen.sum(-1).max()) + 1
        bias = normal(*chosen.shape).float() if "bias" in case.extras else None
        rest["lists"] = BlockLists.from_bitmap(
            chosen, case.Tq, max(case.lengths), 1, 16, capacity, bias
        )
    if "sinks" in case.extras:
        tensors["sink_logits"] = normal(Hq).to(state_dtype(dtype))
    if "alibi" in case.extras:
        tensors["alibi_slopes"] = (normal(Hq) / 4).to(state_dtype(dtype))
    if "softcap" in case.extras:
        rest["softcap"] = 3.0
    if "ramp" in case.extras:
        tensors["ramp"] = (10 * torch.rand(Hq, generator=rng)).to(state_dtype(dtype))
        rest["ramp_length"] = 20.0
    if "left" in case.extras:
        left = torch.tensor([7, -1, 20, 0] * Hq, dtype=torch.int32)[:Hq]
        rest["mask"] = replace(case.mask, head_left=left)
    return Inputs(tensors, tensors["q"]), rest


def results(o: Tensor, lse: Tensor) -> Tensors:
    return {"o": o, "final_state_lse": lse}  # its dtype is that of states


def definition(x: Inputs, rest: dict, dtype: torch.dtype) -> Tensors:
    tensors = x.map(lambda t: t.to(dtype)).tensors
    return results(*reference.attention_decode(**tensors, **rest))


def run(impl: Impl, x: Inputs, rest: dict) -> Tensors:
    if isinstance(impl, Emulator):
        t = {"sink_logits": None, "alibi_slopes": None, "ramp": None} | x.tensors
        given = _sparse_attn._arguments(
            "sparse_attn_decode", t["q"], rest.get("lists"), rest["mask"], None,
            rest.get("softcap", 0.0), t["sink_logits"], t["alibi_slopes"], t["ramp"],
            rest.get("ramp_length", 0.0),
        )  # fmt: skip
        lib, caches = library(impl), (t["k_cache"], t["v_cache"])
        tables = (rest["cache_seqlens"], rest["block_table"])
        coded = "affine" in rest
        decode = lib.sparse_attn_decode_codes if coded else lib.sparse_attn_decode
        caches = (*caches, *rest["affine"]) if coded else caches
        return impl.under_every_seed(lambda: results(*decode(t["q"], *caches, *tables, *given)))

    def move(value):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return value.to(impl.device) if isinstance(value, Tensor | BlockLists) else value

    moved = {n: move(t) for n, t in rest.items()}
    if moved["mask"].head_left is not None:
        moved["mask"] = replace(moved["mask"], head_left=moved["mask"].head_left.to(impl.device))
    tensors = {n: t.to(impl.device) for n, t in x.tensors.items()}
    with threads(2):
        o, lse = ops.sparse_attn_decode(**tensors, **moved, return_lse=True)
    return {n: t.cpu() for n, t in results(o, lse).items()}


CODED = [
    (Decode(), 8),
    (Decode(Tq=5, lengths=(130, 3, 0), dtype="bf16"), 4),
    (Decode(Tq=4, heads=(8, 1), dims=(64, 80), page=16, dtype="f16"), 8),
    (Decode(heads=(5, 5), dims=(48, 16), lengths=(33,), dtype="f16", extras="sinks"), 4),
    (Decode(Tq=2, lists="kv", page=32, lengths=(190, 70), extras="sinks bias"), 4),
    (Decode(heads=(20, 1), dims=(576, 512), lengths=(70,), dtype="bf16"), 8),
    (Decode(Tq=3, dtype="f64", dims=(14, 6), lengths=(270, 20)), 4),
]


@pytest.mark.parametrize(("decode", "bits"), CODED, ids=str)
def test_codes_are_read_where_they_are(impl, decode, bits):
    """As the numbers that they stand for."""
    x, rest = make(decode)
    (k, k_affine), (v, v_affine) = (
        sparse.quantize(x.tensors[n], bits) for n in ("k_cache", "v_cache")
    )
    meant = {
        "k_cache": numbers(k, k_affine, bits, k_affine.dtype),
        "v_cache": numbers(v, v_affine, bits, v_affine.dtype),
    }
    plain = replace(x, tensors=x.tensors | meant)
    truth, same = (definition(plain, rest, d) for d in (torch.float64, torch.float32))
    coded = replace(x, tensors=x.tensors | {"k_cache": k, "v_cache": v})
    got = run(impl, coded, rest | {"affine": (k_affine, v_affine)})
    assert_accepted(got, truth, same, x)


def test_bad_codes(impl):
    q, codes = torch.randn(1, 1, 2, 32), torch.zeros(1, 9, 1, 32, dtype=torch.uint8)
    affine = torch.zeros(1, 9, 1, 2)
    device = impl.device
    for k, a, text in [
        (codes[..., :20], affine, "k must have a byte of codes for each of the K = 32 numbers of "
         "q, or for two, got 20 bytes"),
        (codes.float(), affine, "k must have dtype uint8, got float32"),
        (codes, affine[..., :1], "k_affine must have shape like the codes, of 2 numbers = "
         "[1, 9, 1, 2], got [1, 9, 1, 1]"),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=re.escape(text)):
            ops.sparse_attn_decode(
                q.to(device), k.to(device), codes.to(device),
                affine=(a.to(device), affine.to(device)),
            )  # fmt: skip


test_bad_codes.only_impls = ("cpu", "cuda")  # checks of the library's operator


def library(impl: Impl):
    class Library:
        @staticmethod
        def raw(kind: str, namespace: str = "lsm"):
            return getattr(torch.ops, namespace)

    return impl.raw(Library, "") if isinstance(impl, Emulator) else torch.ops.lsm


@pytest.mark.parametrize("decode", CASES, ids=str)
def test_decode(impl, decode):
    x, rest = make(decode)
    truth, same = (definition(x, rest, d) for d in (torch.float64, torch.float32))
    assert_accepted(run(impl, x, rest), truth, same, x)


@pytest.mark.parametrize("lists", ["", "kv"])
def test_a_sequence_does_not_depend_on_its_batch(impl, lists):
    """To the last bit, at lengths that are cut into parts."""
    case = Decode(Tq=2, heads=(4, 2), lengths=(700, 90, 300), dtype="bf16", lists=lists, page=32)
    x, rest = make(case)
    whole = run(impl, x, rest)
    for b in range(3):
        own = replace(x, tensors=x.tensors | {"q": x.tensors["q"][b : b + 1]})
        args = rest | {n: rest[n][b : b + 1] for n in ("cache_seqlens", "block_table")}
        if lists:
            index, shape = rest["lists"].index, rest["lists"].shape
            args["lists"] = replace(rest["lists"], index=index[b : b + 1], shape=(1, *shape[1:]))
        alone = run(impl, own, args)
        assert_same_bits(alone, {n: t[b : b + 1] for n, t in whole.items()})


def test_pages_are_the_same_cache(impl):
    x, rest = make(Decode(Tq=2, lengths=(90, 40), dtype="bf16", page=16))
    table = rest["block_table"].long()
    flat = {n: x.tensors[n][table].flatten(1, 2) for n in ("k_cache", "v_cache")}
    contiguous = run(impl, replace(x, tensors=x.tensors | flat), rest | {"block_table": None})
    assert_same_bits(run(impl, x, rest), contiguous)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_update(impl, paged, dtype):
    k_cache, v_cache = torch.zeros(6, 8, 2, 12), torch.zeros(6, 8, 2, 5)
    k, v = torch.randn(3, 4, 2, 12), torch.randn(3, 4, 2, 5)
    k_cache, v_cache, k, v = (t.to(DTYPES[dtype]) for t in (k_cache, v_cache, k, v))
    lengths, table = torch.tensor([0, 3, 9], dtype=torch.int32), None
    if paged:
        table = torch.tensor([[3, 1], [0, 5], [2, 4]], dtype=torch.int32)
    else:
        k_cache, v_cache = (t.view(3, 16, *t.shape[2:]) for t in (k_cache, v_cache))
    expected = reference.kv_cache_update(k_cache, v_cache, k, v, lengths, table)
    on = [
        None if t is None else t.to(impl.device) for t in (k_cache, v_cache, k, v, lengths, table)
    ]
    library(impl).kv_cache_update(*on)
    for got, want in zip(on[:2], expected, strict=True):
        assert torch.equal(got.cpu(), want)


def test_a_ring_is_a_window_with_sinks(impl):
    """Token after token, as StreamingLLM decodes: sinks stay, the newest overwrite the oldest."""
    W, sinks, T = 6, 2, 20
    q, k, v = torch.randn(3, 1, T, 2, 16)
    ring = [torch.zeros(1, W + sinks, 2, 16, device=impl.device) for _ in range(2)]
    mask = AttnMask(causal=True, left=W - 1, sinks=sinks)
    whole, _ = reference.block_sparse_attention(q, k, v, None, mask)
    lib, ones = library(impl), [torch.tensor([n], dtype=torch.int32) for n in range(T + 1)]
    given = _sparse_attn._arguments(
        "sparse_attn_decode", q, None, AttnMask(), None, 0.0, None, None, None, 0.0
    )
    for t in range(T):
        new = [x[:, t, None].to(impl.device) for x in (q, k, v)]
        lib.kv_cache_update(*ring, *new[1:], ones[t].to(impl.device), None, sinks)
        length = ones[t + 1].clamp(max=W + sinks).to(impl.device)
        o, _ = lib.sparse_attn_decode(new[0], *ring, length, None, *given)
        torch.testing.assert_close(o.cpu(), whole[:, t, None], rtol=1e-5, atol=1e-5)


def test_flash_attn_with_kvcache():
    q, (k, v) = torch.randn(2, 3, 4, 16), torch.randn(2, 2, 10, 2, 16)
    caches = [torch.nn.functional.pad(x[:, :7], (0, 0, 0, 0, 0, 9)) for x in (k, v)]
    got = ops.flash_attn_with_kvcache(q, *caches, k[:, 7:], v[:, 7:], 7, causal=True)
    k, v = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    seen = torch.ones(3, 10, dtype=torch.bool).tril(7)
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, seen)
    torch.testing.assert_close(got, want.transpose(1, 2))
    for new in ({"k": q[:, :1, :2]}, {"v": q[:, :1, :2]}):
        with pytest.raises(RuntimeError, match="new keys and values come together, got one"):
            ops.flash_attn_with_kvcache(q, *caches, **new, cache_seqlens=7)


def merge_inputs(parts: int, dtype: torch.dtype, V: int) -> Tensors:
    o = torch.randn(parts, 2, 5, 3, V, dtype=torch.float64).to(dtype)
    lse = (3 * torch.randn(parts, 2, 3, 5, dtype=torch.float64)).to(state_dtype(dtype))
    lse[0, 0] = -torch.inf
    lse[:, 1, 1] = -torch.inf
    grad_o = torch.randn(2, 5, 3, V, dtype=torch.float64).to(dtype)
    return {"o_parts": o, "lse_parts": lse, "grad_o": grad_o, "grad_lse": torch.randn(2, 3, 5)}


@pytest.mark.parametrize(
    ("parts", "dtype", "V"),
    [(3, "f32", 40), (1, "bf16", 64), (7, "f16", 300), (40, "bf16", 9), (2, "f64", 33)],
)
def test_merge(impl, parts, dtype, V):
    t = merge_inputs(parts, DTYPES[dtype], V)
    t["grad_lse"] = t["grad_lse"].to(t["lse_parts"].dtype)

    def derived(wide: torch.dtype) -> Tensors:
        leaves = [t[n].to(wide).requires_grad_() for n in ("o_parts", "lse_parts")]
        o, lse = reference.merge_attention_states(*leaves)
        finite = lse.detach().isfinite()
        upstream = t["grad_o"].to(wide), torch.where(finite, t["grad_lse"].to(wide), 0.0)
        d_o, d_lse = torch.autograd.grad([o, lse], leaves, upstream)
        return results(o.detach(), lse.detach()) | {"do": d_o, "final_state_d": d_lse}

    def call() -> Tensors:
        on = {n: x.to(impl.device) for n, x in t.items()}
        lib, parts_on = library(impl), (on["o_parts"], on["lse_parts"])
        o, lse = lib.merge_attn_states(*parts_on)
        d_o, d_lse = lib.merge_attn_states_bwd(*parts_on, o, lse, on["grad_o"], on["grad_lse"])
        return {n: x.cpu() for n, x in
                (results(o, lse) | {"do": d_o, "final_state_d": d_lse}).items()}  # fmt: skip

    got = impl.under_every_seed(call) if isinstance(impl, Emulator) else call()
    x = Inputs({"q": t["o_parts"], "o": t["o_parts"]}, t["grad_o"])
    assert_accepted(got, derived(torch.float64), derived(torch.float32), x)


def test_an_empty_part_is_not_read(impl):
    """What lies in a part whose lse is −inf does not matter, NaN included."""
    t = merge_inputs(3, torch.float32, 16)
    lib = library(impl)
    want = lib.merge_attn_states(*(t[n].to(impl.device) for n in ("o_parts", "lse_parts")))
    t["o_parts"][0, 0] = torch.nan
    got = lib.merge_attn_states(*(t[n].to(impl.device) for n in ("o_parts", "lse_parts")))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_merge_gradcheck():
    t = merge_inputs(3, torch.float64, 4)
    lse = t["lse_parts"].masked_fill(t["lse_parts"] == -torch.inf, 0.5)
    leaves = [t["o_parts"].requires_grad_(), lse.requires_grad_()]
    assert torch.autograd.gradcheck(ops.merge_attn_states, leaves)
    o, _ = ops.merge_attn_states(*leaves)
    (grad,) = torch.autograd.grad(o.sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_opcheck():
    t = merge_inputs(3, torch.float32, 8)
    parts = [t[n].requires_grad_() for n in ("o_parts", "lse_parts")]
    torch.library.opcheck(torch.ops.lsm.merge_attn_states.default, parts)
    x, rest = make(Decode(Tq=2, page=16))
    tables = (rest["cache_seqlens"], rest["block_table"])
    given = _sparse_attn._arguments(
        "", x.tensors["q"], None, CAUSAL, None, 0.0, None, None, None, 0.0
    )
    decode = (*x.tensors.values(), *tables, *given)
    torch.library.opcheck(torch.ops.lsm.sparse_attn_decode.default, decode)
    codes = torch.zeros(*decode[1].shape[:3], decode[1].shape[3] // 2, dtype=torch.uint8)
    affine = torch.zeros(*codes.shape[:3], 2)
    coded = (decode[0], codes, codes, affine, affine, *decode[3:])
    torch.library.opcheck(torch.ops.lsm.sparse_attn_decode_codes.default, coded)
    caches, new = torch.zeros(2, 2, 8, 1, 4), torch.randn(2, 2, 1, 1, 4)
    update = (*caches.clone(), *new, torch.tensor([0, 7], dtype=torch.int32), None, -1)
    torch.library.opcheck(torch.ops.lsm.kv_cache_update.default, update)


# Any operator that writes to two views of one tensor goes wrong in compiled code before torch 2.13.
one_tensor = pytest.param(
    True,
    id="one_tensor",
    marks=pytest.mark.skipif(
        torch.__version__ < (2, 13),
        reason="this torch's inductor miscompiles writes to two views of one tensor",
    ),
)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [pytest.param(False, id="two_tensors"), one_tensor])
def test_compile(shared):
    def step(q, k, v, k_cache, v_cache, lengths):
        ops.kv_cache_update(k_cache, v_cache, k, v, lengths)
        return ops.sparse_attn_decode(q, k_cache, v_cache, lengths + 1)

    q, (k, v) = torch.randn(2, 1, 4, 16), torch.randn(2, 2, 1, 2, 16)
    caches, lengths = torch.randn(2, 2, 9, 2, 16), torch.tensor([3, 8], dtype=torch.int32)
    expected = caches.clone()
    k_cache, v_cache = caches if shared else [cache.clone() for cache in caches]
    want = step(q, k, v, *expected, lengths)
    got = torch.compile(step, fullgraph=True)(q, k, v, k_cache, v_cache, lengths)
    torch.testing.assert_close(got, want)
    assert torch.equal(torch.stack([k_cache, v_cache]), expected)


Q, CACHE = torch.randn(2, 1, 4, 16), torch.randn(2, 8, 2, 16)
LENGTHS, TABLE = (torch.tensor(n, dtype=torch.int32) for n in ([3, 8], [[0, 1], [1, 0]]))


@pytest.mark.parametrize(
    ("lengths", "table", "text"),
    [
        ([3, 9], None, "cache_seqlens must be in [0, 8], what the cache has room for, got 9 for "
         "sequence 1"),
        ([-1, 8], None, "cache_seqlens must be in [0, 8], what the cache has room for, got -1 for "
         "sequence 0"),
        ([3, 9], [[0, -1], [1, 2]], "block_table must name pages in [0, 2), got 2 for page 1 of "
         "sequence 1"),
    ],
)  # fmt: skip
def test_what_lies_outside_the_cache_is_refused(impl, lengths, table, text):
    """Where values can be read; pages that no length needs may be anything."""
    lengths = torch.tensor(lengths, dtype=torch.int32)
    table = None if table is None else torch.tensor(table, dtype=torch.int32)
    given = _sparse_attn._arguments("", Q, None, CAUSAL, None, 0.0, None, None, None, 0.0)
    with pytest.raises(RuntimeError) as error:
        library(impl).sparse_attn_decode(Q, CACHE, CACHE, lengths, table, *given)
    assert f"lsm::sparse_attn_decode: {text}" in str(error.value)


test_what_lies_outside_the_cache_is_refused.only_impls = ("cpu", "emulator")


NEW = torch.randn(2, 1, 2, 16)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"k": NEW[0]}, "k must have shape [B, T, H, K], got [1, 2, 16]"),
        ({"v": NEW[:, :, :1]}, "v must have shape [B, T, H, V] with all but V like k = "
         "[2, 1, 2, 16], got [2, 1, 1, 16]"),
        ({"k_cache": CACHE.half()}, "k_cache must have dtype float32 like the new tokens, got "
         "float16"),
        ({"k_cache": CACHE[..., :8]}, "k_cache must have H = 2 heads of 16 like k, got "
         "[2, 8, 2, 8]"),
        ({"v_cache": CACHE[:, :4]}, "v_cache must have the places of k_cache = [2, 8, 2, 16], got "
         "[2, 4, 2, 16]"),
        ({"k_cache": CACHE.transpose(2, 3).contiguous().transpose(2, 3)}, "k_cache is updated in "
         "place and must be contiguous in its last dimension, got strides [256, 32, 1, 2]"),
        ({"cache_seqlens": LENGTHS.long()}, "cache_seqlens must have dtype int32, got int64"),
        ({}, "cache_seqlens and the T = 1 new tokens must fit in the cache's capacity of 8, got 8 "
         "for sequence 1"),
        ({"block_table": 2 - TABLE}, "block_table must name pages in [0, 2), got 2 for page "
         "0 of sequence 0"),
        ({"ring_sinks": 8}, "ring_sinks must be below the cache's capacity of 8, got 8"),
    ],
)  # fmt: skip
def test_update_refuses(impl, change, text):
    given = {"k_cache": CACHE.clone(), "v_cache": CACHE.clone(), "k": NEW, "v": NEW}
    given |= {"cache_seqlens": LENGTHS, "block_table": None, "ring_sinks": -1} | change
    with pytest.raises(RuntimeError) as error:
        library(impl).kv_cache_update(**given)
    assert f"lsm::kv_cache_update: {text}" in str(error.value)


test_update_refuses.only_impls = ("cpu", "emulator")  # which read values


def test_inference_only():
    with pytest.raises(RuntimeError, match="has no backward"):
        ops.sparse_attn_decode(Q.clone().requires_grad_(), CACHE, CACHE)
    with pytest.raises(RuntimeError, match="has no backward"):
        ops.kv_cache_update(CACHE, CACHE, NEW.clone().requires_grad_(), NEW, LENGTHS)
