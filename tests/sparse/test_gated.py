"""InfLLM-v2 and SeerAttention: choices against their definitions on the whole map."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from dense import dense_attention, qkv

from lsm_cuda import sparse
from lsm_cuda.modules import RotaryEmbedding
from lsm_cuda.ops import AttnMask
from lsm_cuda.sparse import KVCache, SeerAttentionGate, SeerAttentionR

B, T, HQ, HKV, K = 2, 77, 4, 2, 8
G = HQ // HKV
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()


def windows(x: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    return torch.stack([x[:, s : s + length].mean(1) for s in range(0, x.shape[1], stride)], 1)


def softmaxes(q, k, length, stride):
    """Scores over windows, ``[B, Hq, T, windows]``, -inf where a window is not past."""
    keys = windows(k, length, stride).repeat_interleave(G, 2)
    score = torch.einsum("bthd,bnhd->bhtn", q, keys) / K**0.5
    end = torch.arange(keys.shape[1]) * stride + length - 1
    return score.masked_fill(end > torch.arange(q.shape[1])[:, None], -torch.inf)


def test_infllm_v2():
    leaves = q, k, _v = qkv(T, HQ, HKV)
    block, kernel, stride, topk = 16, 8, 4, 3
    fine, coarse = softmaxes(q, k, kernel, stride), softmaxes(q, k, 4 * kernel, 4 * stride)
    norm = coarse.logsumexp(-1)
    norm = norm.masked_fill(norm == -torch.inf, 0)
    p = (fine - norm[..., None]).exp().nan_to_num(0).unflatten(1, (HKV, G)).sum(2)
    blocks = -(-T // block)
    best = torch.stack(
        [
            torch.stack(
                [
                    p[..., n]
                    for n in range(p.shape[-1])
                    if n * stride < (j + 1) * block and n * stride + kernel > j * block
                ]
            ).amax(0)
            for j in range(blocks)
        ],
        -1,
    )
    own, column = torch.arange(T)[:, None] // block, torch.arange(blocks)
    best = best.masked_fill((column == 0) | (column == own), torch.inf)
    best = best.masked_fill(column > own, -torch.inf)
    # stable: neighbours may tie, with a window across their border as the best of both
    order = torch.sort(best, dim=-1, descending=True, stable=True)[1][..., :topk]
    chosen = torch.zeros(B, HKV, T, blocks, dtype=torch.bool).scatter(-1, order, True)
    chosen &= best > -torch.inf
    lists = sparse.infllm_v2_lists(q, k, topk, block, kernel, stride, local=1)
    assert torch.equal(lists.to_bitmap(), chosen)
    read = chosen.repeat_interleave(G, 1).repeat_interleave(block, 3)[..., :T] & CAUSAL
    want, _ = dense_attention(*leaves, read.int())
    o = sparse.infllm_v2_attn(*leaves, topk, block, kernel, stride, local=1)
    weight = torch.randn_like(o)
    for a, b in zip(
        [o, *torch.autograd.grad((o * weight).sum(), leaves)],
        [want, *torch.autograd.grad((want * weight).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_infllm_v2_of_packed_sequences():
    q, k, v = (x[:1] for x in qkv(T, HQ, HKV))
    cuts, options = [0, 3, 3, 40, 77], (3, 16, 8, 4, 1, 1)
    o = sparse.infllm_v2_attn(q, k, v, *options, cu_seqlens=torch.tensor(cuts))
    for a, b in pairwise(cuts):
        alone = sparse.infllm_v2_attn(*(x[:, a:b] for x in (q, k, v)), *options)
        torch.testing.assert_close(o[:, a:b], alone, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("block_q", [16, 1])
def test_pooled_attention_map(block_q):
    q, k, _ = qkv(T, HQ, HKV)
    score = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(G, 2)) / K**0.5
    p = score.masked_fill(~CAUSAL, -torch.inf).softmax(-1)
    want = torch.stack(
        [
            torch.stack([c.amax((-1, -2)) for c in r.split(16, -1)], -1)
            for r in p.split(block_q, -2)
        ],
        -2,
    )
    want = want / want.sum(-1, keepdim=True)
    got = sparse.pooled_attention_map(q, k, 16, block_q)
    torch.testing.assert_close(got, want.detach())


def make_gate(**options) -> SeerAttentionGate:
    torch.manual_seed(1)
    return SeerAttentionGate(K, HQ, HKV, block=16, gate_dim=6, **options).double()


def test_gate_is_its_formula():
    q, k, _ = qkv(T, HQ, HKV)
    gate, rotary = make_gate(), RotaryEmbedding(6)
    place = torch.arange(0, T, 16)
    qs = torch.stack([x.mean(1) for x in q.split(16, 1)], 1)
    ks = torch.stack([torch.cat([x.mean(1), x.amax(1), x.amin(1)], -1) for x in k.split(16, 1)], 1)
    qs = rotary(torch.einsum("bnhd,hdg->bnhg", qs, gate.w_q), place)
    ks = rotary(torch.einsum("bnhd,hdg->bnhg", ks, gate.w_k), place).repeat_interleave(G, 2)
    want = torch.einsum("bnhg,bmhg->bhnm", qs, ks) / 6**0.5
    want = want.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(gate(q, k), want)
    target = sparse.pooled_attention_map(q, k, 16)
    loss = gate.loss(q, k, target)
    p = want.softmax(-1)
    want = torch.where(target > 0, target * (target / p).log(), 0).sum(-1).mean()
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("group", [False, True])
def test_gate_learns_the_map(group):
    """Keys of one block stand out; a gate finds them."""
    q, k, _v = (x.detach() for x in qkv(T, HQ, HKV))
    with torch.no_grad():
        for b in range(B):
            k[b, 16 * (b + 1) : 16 * (b + 2)] += 3 * q.mean((0, 1)).unflatten(0, (HKV, G)).mean(1)
        q += 2 * q.mean((0, 1))
    gate = make_gate(rope_theta=None, group_queries=group)
    target = sparse.pooled_attention_map(q, k, 16, 1 if group else 16)
    optimizer = torch.optim.Adam(gate.parameters(), 0.05)
    losses = []
    for _ in range(60):
        losses.append(gate.loss(q, k, target))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    kept = sparse.recall(q, k, gate.lists(q, k, topk=2)).mean()
    first = sparse.recall(q, k, make_gate(rope_theta=None, group_queries=group).lists(q, k, topk=2))
    assert kept > first.mean()


def test_gate_lists():
    q, k, _v = (x.detach() for x in qkv(T, HQ, HKV))
    gate, blocks = make_gate(), torch.arange(5)
    p = gate(q, k).softmax(-1)
    always = (blocks == 0) | (blocks == blocks[:, None])
    few = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(2).indices, True)
    ahead = blocks > blocks[:, None]
    assert torch.equal(gate.lists(q, k, topk=2).to_bitmap(), (few | always) & ~ahead)
    assert torch.equal(gate.lists(q, k, threshold=0.3).to_bitmap(), ((p >= 0.3) | always) & ~ahead)
    assert gate.lists(q, k, mass=1.0).density(AttnMask(causal=True)) == 1
    with pytest.raises(ValueError, match="give one of topk, threshold and mass, got 2, None"):
        gate.lists(q, k, topk=2, mass=0.5)


@pytest.mark.parametrize("positions", [False, True])
def test_seer_r_decodes_by_its_gate(positions):
    q, k, v = (x.detach() for x in qkv(T, HQ, HKV))
    gate = make_gate(group_queries=True, rope_theta=1000.0)
    rotary = RotaryEmbedding(K) if positions else None
    cache = KVCache(SeerAttentionR(gate, topk=3), rotary=rotary)
    cache.prefill(q[:, :40], k[:, :40], v[:, :40])
    turned = [x if rotary is None else rotary(x) for x in (q, k)]
    for n in range(41, T + 1):
        at = slice(n - 1, n)
        o = cache.step(q[:, at], k[:, at], v[:, at])
        torch.testing.assert_close(
            cache.policy.compressed, gate.keys(k[:, :n]), atol=1e-6, rtol=1e-6
        )
        logits = gate(q[:, :n], k[:, :n])[:, :, -1]
        page = torch.arange(logits.shape[-1])
        logits = logits.masked_fill((page == 0) | (page == page[-1]), torch.inf)
        read = torch.zeros_like(logits, dtype=torch.bool)
        read.scatter_(-1, logits.topk(3).indices, True)
        read = read.repeat_interleave(16, -1)[..., :n].repeat_interleave(G, 1)
        args = turned[0][:, at], turned[1][:, :n], v[:, :n]
        want, _ = dense_attention(*args, read[:, :, None].int())
        torch.testing.assert_close(o, want, atol=1e-6, rtol=1e-6)


def models(transformers):
    sizes = {
        "vocab_size": 50, "hidden_size": HQ * K, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": HQ, "num_key_value_heads": HKV, "head_dim": K,
        "attn_implementation": "eager",
    }  # fmt: skip
    window = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
    return {
        "LlamaAttention": (transformers.LlamaConfig, sizes),
        # a window, a soft cap of scores, and sink logits
        "Gemma2Attention": (transformers.Gemma2Config, sizes | window
                            | {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": K}),
        "Qwen3Attention": (transformers.Qwen3Config, sizes),
        "GptOssAttention": (transformers.GptOssConfig, sizes | window
                            | {"num_local_experts": 2, "num_experts_per_tok": 1}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["LlamaAttention", "Gemma2Attention", "Qwen3Attention", "GptOssAttention"]
)
@torch.no_grad()
def test_any_model_of_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    make, options = models(transformers)[kind]
    model = transformers.AutoModelForCausalLM.from_config(make(**options)).eval()
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(p, 1.0)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            p *= 10  # so that attention is not flat
    ids = torch.randint(50, (2, 70))
    whole = model(ids).logits

    def attach(**choice):
        return sparse.attach_seer(
            model,
            lambda m: SeerAttentionGate(K, HQ, HKV, 16, 8, rope_theta=None),
            lambda m: type(m).__name__ == kind,
            **choice,
        )

    assert len(attach(mass=1.0)) == 2
    torch.testing.assert_close(model(ids).logits, whole, atol=1e-4, rtol=1e-4)
    attach(topk=1)
    assert (model(ids).logits - whole).abs().max() > 1e-4
    mask = torch.ones(2, 70)
    mask[0, :5] = 0
    with pytest.raises(ValueError, match="must come without padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="accepts no module"):
        sparse.attach_seer(model, lambda m: None, lambda m: False)
    with pytest.raises(ValueError, match="causal and without dropout, got dropout = 0.1"):
        sparse.seer_attention_forward(model, ids, ids, ids, dropout=0.1)


# ---- DuoAttention ----


def test_duo_attention_learns_its_heads():
    """A gate between two attentions; heads whose output the window changes keep it."""
    leaves = q, k, v = qkv(T, HQ, HKV)
    gate = torch.rand(HKV, dtype=torch.float64, requires_grad=True)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    full, _ = dense_attention(q, k, v, CAUSAL[None].int())
    near, _ = dense_attention(q, k, v, (CAUSAL & ((j < 3) | (j > t - 6)))[None].int())
    share = gate.repeat_interleave(G)[:, None]
    want, got = share * full + (1 - share) * near, sparse.duo_attn(q, k, v, gate, 6, 3)
    weight = torch.randn_like(want)
    grads = (torch.autograd.grad((o * weight).sum(), [*leaves, gate]) for o in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    with torch.no_grad():  # keys of the second head are alike: near and far weigh the same
        k[:, :, 1], v[:, :, 1] = 0, 1
        target = sparse.duo_attn(q, k, v, torch.ones(HKV, dtype=torch.float64), 6, 3)
    learned = torch.ones(HKV, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([learned], 0.05)
    for _ in range(30):
        o = sparse.duo_attn(*(x.detach() for x in leaves), learned.clamp(0, 1), 6, 3)
        loss = (o - target).square().mean() + 0.05 * learned.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert learned[0] > learned[1] + 0.1
    assert sparse.retrieval_heads(learned, 0.5).tolist() == [True, False]
    both = sparse.retrieval_heads(torch.tensor([[0.1, 0.8], [0.9, 0.7]]), 0.5)
    assert both.tolist() == [[False, True], [True, False]]


def test_errors():
    q, k, v = qkv(T, HQ, HKV)
    with pytest.raises(RuntimeError, match=r"gate must have shape \[Hkv\] = \[2\], got \[3\]"):
        sparse.duo_attn(q, k, v, torch.rand(3))
    with pytest.raises(RuntimeError, match="q must be the last tokens of the T = 9 of k, got TQ ="):
        sparse.infllm_v2_attn(q, k[:, :9], v[:, :9])
    assert sparse.pooled_attention_map(q[:, :0], k[:, :0], 16).shape == (B, HQ, 0, 0)
