"""inf and NaN stay with those who see them: keys that a query's mask or list leaves out, other
heads and other sequences have no say in its results or gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention import Attn, Call, make, run
from emulators import missing
from impls import Emulator, Impl
from inputs import Tensors
from test_kv_cache import Decode
from test_kv_cache import make as make_decode
from test_kv_cache import run as run_decode
from torch import Tensor

from lsm_cuda import reference
from lsm_cuda.ops import AttnMask, BlockLists

WINDOW = {"causal": True, "left": 9}
EVERYTHING = ("softcap", "sinks", "alibi", "ramp", "bias")
CASES = [
    Attn(Tq=70, Tk=70, lists="none", mask=WINDOW),
    Attn(Tq=70, Tk=70, lists="none", mask=WINDOW, dtype="bf16", heads=(4, 2, 1)),
    Attn(Tq=70, Tk=70, lists="none", mask=WINDOW, dtype="f16", extras=("alibi", "softcap")),
    Attn(Tq=70, Tk=70, mask=WINDOW, heads=(2, 1, 2), extras=EVERYTHING),
    Attn(Tq=70, Tk=70, mask=WINDOW, heads=(2, 1, 1), dtype="bf16", extras=EVERYTHING, lists="all"),
    Attn(Tq=40, Tk=96, blocks=(1, 16), heads=(4, 1, 1), dtype="bf16", lists="capacity"),
    Attn(Tq=40, Tk=96, blocks=(1, 16), heads=(4, 2, 2)),
    Attn(Tq=96, Tk=96, blocks=(1, 16), heads=(8, 2, 2), dims=(32, 48), dtype="bf16", mask=WINDOW),
    Attn(
        Tq=60,
        Tk=96,
        blocks=(1, 32),
        heads=(6, 2, 1),
        dims=(32, 64),
        dtype="bf16",
        mask=WINDOW,
        extras=("sinks",),
    ),
    Attn(Tq=90, Tk=90, lists="none", batch="int32", dims=(256, 200), dtype="bf16", mask=WINDOW),
    Attn(Tq=90, Tk=90, lists="none", batch="int64", mask={"causal": True}, dims=(72, 128)),
    Attn(Tq=40, Tk=40, lists="none", mask=WINDOW, dims=(576, 512), dtype="bf16"),
    Attn(Tq=40, Tk=40, lists="none", mask=WINDOW, dims=(300, 40)),
]


def spoilt(call: Call, with_what: bool) -> tuple[Call, Tensor, Tensor]:
    """inf and NaN in a few keys and values of head 0 and in a few queries, or zeros; which ones."""
    t = {n: x.clone() for n, x in call.x.tensors.items()}
    grad_o = call.x.grad_o.clone()
    Tq, Tk = t["q"].shape[1], t["k"].shape[1]
    keys, queries = [Tk // 3, Tk // 2, Tk - 1], [Tq // 4, Tq - 2]
    for at, name, value in [
        (keys[0], "k", torch.nan), (keys[1], "v", torch.inf), (keys[2], "k", torch.inf),
        (keys[2], "v", torch.nan),
    ]:  # fmt: skip
        t[name][:, at, 0] = value if with_what else 0.0
    t["q"][:, queries[0]] = torch.nan if with_what else 0.0
    grad_o[:, queries[1]] = torch.inf if with_what else 0.0
    spoilt_call = replace(call, x=replace(call.x, tensors=t, grad_o=grad_o))
    return spoilt_call, torch.tensor(keys), torch.tensor(queries)


def pairs_of(call: Call) -> Tensor:
    """[B, Hq, Tq, Tk]: who sees whom."""
    ones = torch.ones_like
    x, lists = call.x, call.lists
    tensors = {"q": ones(x.tensors["q"]).float(), "k": ones(x.tensors["k"]).float()}
    B, Tk, Hkv, _ = tensors["k"].shape
    tensors["v"] = torch.eye(Tk).expand(B, Hkv, Tk, Tk).transpose(1, 2)
    ramp = {n: t for n, t in x.tensors.items() if n == "ramp"}
    options = {n: o for n, o in call.options.items() if n == "ramp_length"}
    o, _ = reference.block_sparse_attention(
        **tensors, **ramp, **options, lists=lists, mask=call.mask, cu_seqlens_q=x.cu_seqlens,
        cu_seqlens_k=call.cu_seqlens_k,
    )  # fmt: skip
    return o.transpose(1, 2) != 0


@pytest.mark.parametrize("attn", CASES, ids=str)
def test_attention(impl: Impl, attn: Attn):
    call = make(attn)
    pairs = pairs_of(call)
    clean, keys, queries = spoilt(call, False)
    got, want = (run(impl, c) for c in (spoilt(call, True)[0], clean))
    group = pairs.shape[1] // call.x.tensors["k"].shape[2]
    bad_rows = pairs[..., keys].any(-1)  # [B, Hq, Tq]
    bad_rows[:, group:] = False
    o_rows = bad_rows.clone()
    o_rows[..., queries[0]] = True
    bad_rows[..., queries] = True
    bad_keys = (pairs & bad_rows[..., None]).any(2).unflatten(1, (-1, group)).any(2)
    bad_keys[:, 0, keys] = True

    def same(name: str, good: Tensor) -> None:
        # of lists of each token's own every key is on one of a bad row
        assert good.any() or (name in ("dk", "dv") and attn.blocks[0] == 1), name
        a, b = got[name][good].float(), want[name][good].float()
        half = got[name].dtype in (torch.bfloat16, torch.float16)
        scale = max(1.0, float(b[b.isfinite()].abs().amax())) if good.any() else 1.0
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(a / scale, b / scale, **tolerance, msg=lambda m: f"{name}: {m}")

    same("o", ~o_rows.transpose(1, 2))
    same("lse", ~(o_rows & pairs.any(-1)))
    same("dq", ~bad_rows.transpose(1, 2))
    for name in ("dk", "dv"):
        same(name, ~bad_keys.transpose(1, 2))
    # Who sees them has them.
    sees = pairs[:, :group, :, keys].any(-1)
    assert not got["o"].isfinite().all(-1).transpose(1, 2)[:, :group][sees].any()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_blocks_of_other_queries(cpu: Impl, dtype: str):
    """A query that is NaN has no part in a block that all others of its tile see whole."""
    call = make(Attn(Tq=32, Tk=32, heads=(16, 1, 1), dims=(32, 32), dtype=dtype, lists="none",
                     extras=("softcap",)))  # fmt: skip
    every = torch.eye(2, dtype=torch.bool).repeat(16, 1)  # even queries: block 0, odd ones: 1
    call = replace(call, lists=BlockLists.from_bitmap(every, 32, 32, 1, 16))
    call.x.tensors["q"][:, 0] = torch.nan
    got = run(cpu, call)
    for name in ("dk", "dv"):
        assert got[name][:, :16].isnan().any() and got[name][:, 16:].isfinite().all(), name
    assert got["dq"][:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_keys_behind_a_query_that_saw_nan(cpu: Impl, dtype: str):
    """In a block of their own, of finite queries and keys."""
    call = make(Attn(Tq=48, Tk=48, dims=(32, 32), dtype=dtype, lists="all", mask=WINDOW))
    call.x.tensors["k"][:, 10] = torch.nan
    got = run(cpu, call)
    for name in ("dq", "dk", "dv"):
        assert got[name][:, 10:20].isnan().any() and got[name][:, 20:].isfinite().all(), name


@pytest.mark.skipif(bool(missing("_emu")), reason=str(missing("_emu")))
@pytest.mark.parametrize(
    "attn",
    [
        *CASES[1:3],
        replace(CASES[4], dims=(128, 64)),
        Attn(Tq=90, Tk=90, lists="none", batch="int64", mask=WINDOW, dims=(72, 128), dtype="bf16"),
    ],
    ids=str,
)
def test_attention_on_hopper(attn: Attn):
    test_attention(Emulator("hopper", seeds=(1, 2), architecture=90), attn)


DECODES = [
    Decode(Tq=4, lengths=(70, 40)),
    Decode(Tq=4, lengths=(70, 300), dtype="bf16", page=16),
    Decode(Tq=3, heads=(10, 2), lengths=(75, 41), dtype="bf16", dims=(64, 96), extras="sinks"),
    Decode(Tq=3, heads=(8, 2), lengths=(70, 40), dtype="f16", dims=(64, 128), extras="sinks"),
    Decode(Tq=3, heads=(2, 1), lengths=(70, 40), dtype="bf16", dims=(72, 300), extras="left"),
    Decode(Tq=4, lengths=(70, 40), mask=AttnMask(causal=True, left=2), dtype="f16"),
]


@pytest.mark.parametrize("decode", DECODES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_decode(impl: Impl, decode: Decode, value: float):
    """The last new token of sequence 0, which earlier ones do not see; pages behind the end."""
    x, rest = make_decode(decode)

    def spoil(value: float, behind: float) -> Tensors:
        tensors = {n: t.clone() for n, t in x.tensors.items()}
        for name in ("k_cache", "v_cache"):
            rows = tensors[name]
            for b, n in enumerate(decode.lengths):
                for key in range(n - (b == 0), rows.shape[1] if not decode.page else n):
                    place = (b, key)
                    if decode.page:
                        page = int(rest["block_table"][b, key // decode.page])
                        place = (page, key % decode.page)
                    if key >= n:
                        rows[place] = behind
                    elif b == 0 and name != "k_cache":
                        rows[place][0] = value
        return run_decode(impl, replace(x, tensors=tensors), rest)

    got, want = spoil(value, torch.nan), spoil(0.0, 0.0)
    group = decode.heads[0] // decode.heads[1]
    good = torch.ones(got["o"].shape[:3], dtype=torch.bool)
    good[0, -1, :group] = False
    tolerance = {} if decode.dtype == "f32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(got["o"][good], want["o"][good], **tolerance)
    assert not got["o"][0, -1, :group].isfinite().any()
    torch.testing.assert_close(got["final_state_lse"], want["final_state_lse"])


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_who_sees_nothing_but_nan_gets_it(impl: Impl, dtype: str):
    """And not the zeros of a query without keys."""
    x, rest = make_decode(Decode(Tq=1, lengths=(7, 0), dtype=dtype))
    x.tensors["k_cache"][0] = torch.nan
    got = run_decode(impl, x, rest)
    assert got["o"][0].isnan().all() and got["final_state_lse"][0].isnan().all()
    assert (got["o"][1] == 0).all() and (got["final_state_lse"][1] == -torch.inf).all()
