"""Routed, hashed, sorted and clustered attention: each under the mask its assignment means."""

from __future__ import annotations

import pytest
import torch
from dense import dense_attention, qkv, same

from lsm_cuda import sparse

B, T, H, K = 2, 48, 3, 8
F64 = torch.float64


def test_mosa():
    leaves = qkv(T, H, H)
    logits = torch.randn(B, T, H, dtype=F64, requires_grad=True)
    r = logits.sigmoid()
    taken = torch.zeros(B, H, T, dtype=torch.bool)
    taken.scatter_(-1, r.transpose(1, 2).topk(9, -1).indices, True)
    read = taken[..., None, :] & taken[..., None] & torch.ones(T, T, dtype=torch.bool).tril()
    want = dense_attention(*leaves, read.int())[0] * r[..., None]
    same(sparse.mosa_attn(*leaves, r, 9), want, *leaves, logits)


@pytest.mark.parametrize("causal", [True, False])
def test_routing(causal):
    q, k, v = leaves = qkv(T, H, H)
    centroids, window = torch.randn(H, 5, K, dtype=F64), 11
    if causal:
        k, leaves = q, [q, v]

    def member(x):
        fit = torch.einsum("bthd,hcd->bhct", x / x.norm(dim=-1, keepdim=True), centroids)
        chosen = torch.zeros_like(fit, dtype=torch.bool)
        return chosen.scatter_(-1, fit.topk(window, -1).indices, True)

    mine, theirs = member(q), member(k)  # [B, H, C, T]
    parts = []
    for c in range(5):
        read = mine[:, :, c, :, None] & theirs[:, :, c, None]
        if causal:
            read = read & torch.ones(T, T, dtype=torch.bool).tril()
        parts.append(dense_attention(q, k, v, read.int())[0])
    times = mine.sum(2).transpose(1, 2)[..., None]
    want = sum(parts) / times.clamp(min=1)
    same(sparse.routing_attn(q, k, v, centroids, window, causal), want, *leaves)


def test_routing_update_is_k_means():
    q, k, _ = (x.detach() for x in qkv(T, H, H))
    centroids = torch.randn(H, 5, K, dtype=F64)
    for h in range(H):
        want = centroids[h].clone()
        for x in (q, k):
            unit = torch.nn.functional.normalize(x[:, :, h].flatten(0, 1), dim=-1)
            owner = (unit @ centroids[h].T).argmax(-1)
            for c in range(5):
                if (owner == c).any():
                    want[c] += 0.05 * (unit[owner == c].mean(0) - centroids[h, c])
        got = sparse.routing_update(centroids, q, k, 0.9)[h]
        torch.testing.assert_close(got, want)


def test_cluster_attention():
    leaves = qkv(T, 4, 2)
    x, centroids = torch.randn(B, T, 6, dtype=F64), torch.randn(5, 6, dtype=F64)
    cosine = torch.nn.functional.cosine_similarity(x[:, :, None], centroids, dim=-1)
    owner = cosine.argmax(-1)
    read = owner[:, :, None] == owner[:, None]
    want, _ = dense_attention(*leaves, read[:, None].int())
    same(sparse.cluster_attn(*leaves, x, centroids), want, *leaves)
    loss = sparse.cluster_loss(x, centroids)
    torch.testing.assert_close(loss, (1 - cosine.gather(-1, owner[..., None])).mean())


@pytest.mark.parametrize("causal", [True, False])
def test_lsh_is_reformers(causal):
    transformers = pytest.importorskip("transformers")
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=H * K, num_attention_heads=H, attention_head_size=K, num_hashes=3,
        num_buckets=4, lsh_attn_chunk_length=8, hash_seed=3, is_decoder=causal,
        lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = LSHSelfAttention(config, 0).double().eval()
    x = torch.randn(B, T, H * K, dtype=F64, requires_grad=True)
    want = theirs(x).hidden_states.unflatten(-1, (H, K))
    qk, v = (p(x).unflatten(-1, (H, K)) for p in (theirs.query_key, theirs.value))
    torch.manual_seed(3)
    buckets = sparse.lsh_buckets(qk, torch.randn(H, K, 3, 2, dtype=F64))
    same(sparse.lsh_attn(qk, v, buckets, 8, causal), want, x)


def test_reformers_local_attention_is_a_band_of_blocks():
    transformers = pytest.importorskip("transformers")
    from transformers.models.reformer.modeling_reformer import LocalSelfAttention

    config = transformers.ReformerConfig(
        hidden_size=H * K, num_attention_heads=H, attention_head_size=K, is_decoder=True,
        local_attn_chunk_length=16, local_num_chunks_before=1, local_num_chunks_after=0,
        local_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = LocalSelfAttention(config).double().eval()
    x = torch.randn(B, 80, H * K, dtype=F64, requires_grad=True)
    want = theirs(x).hidden_states.unflatten(-1, (H, K))
    q, k, v = (p(x).unflatten(-1, (H, K)) for p in (theirs.query, theirs.key, theirs.value))
    band = sparse.block_streaming(80, 16, sink_blocks=0, local_blocks=2)
    same(band.attend(q, k, v)[0], want, x)


def test_lsh_of_one_bucket_and_chunk_is_dense():
    """All in one chunk, whose neighbour is itself: every key counts twice."""
    qk, _, v = qkv(T, H, H)
    buckets = torch.zeros(B, H, 1, T, dtype=torch.long)
    keys = qk / qk.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    count = 2 * torch.ones(T, T).tril(-1)
    count[0, 0] = 1  # nothing else to read
    want, _ = dense_attention(qk, keys, v, count)
    same(sparse.lsh_attn(qk, v, buckets, T), want, qk, v)


@pytest.mark.parametrize("causal", [False, True])
def test_sinkhorn_attention(causal):
    leaves = q, k, v = qkv(T, H, H)
    block, N = 8, T // 8
    logits = torch.randn(B, H, N, N, dtype=F64, requires_grad=True)
    p = sparse.sinkhorn(logits / 0.75, 5, causal).exp()
    kb, vb = (x.unflatten(1, (N, block)) for x in (k, v))
    mixed = [torch.einsum("bhnm,bmthd->bnthd", p, x) for x in (kb, vb)]
    outputs = []
    for n in range(N):
        at = slice(n * block, (n + 1) * block)
        own = torch.ones(block, block)
        count = [own.tril() if causal else own]
        keys, values = [k[:, at]], [v[:, at]]
        if n or not causal:
            keys.append(mixed[0][:, n])
            values.append(mixed[1][:, n])
            count.append(own)
        args = torch.cat(keys, 1), torch.cat(values, 1), torch.cat(count, 1)
        outputs.append(dense_attention(q[:, at], *args)[0])
    got = sparse.sinkhorn_attn(*leaves, block, logits, iterations=5, causal=causal)
    same(got, torch.cat(outputs, 1), *leaves, logits)


def test_sinkhorn_is_doubly_stochastic_and_causal():
    logits = torch.randn(6, 6, dtype=F64)
    p = sparse.sinkhorn(logits, 50).exp()
    torch.testing.assert_close(p.sum(0), torch.ones(6, dtype=F64))
    torch.testing.assert_close(p.sum(1), torch.ones(6, dtype=F64), atol=1e-4, rtol=0)
    p = sparse.sinkhorn(logits, 8, causal=True).exp()
    assert not p.triu().any() and p[1:].sum(-1).gt(0).all()
    later = logits.clone()
    later[4:] = later[:, 4:] = torch.randn(1, dtype=F64)
    assert torch.equal(sparse.sinkhorn(later, 8, causal=True)[:4, :4].exp(), p[:4, :4])
    q, k, v = (x.detach() for x in qkv(T, H, H))
    o = sparse.sinkhorn_attn(q, k, v, 8, causal=True)
    for x in (q, k, v):
        x[:, 30:] = 7.0
    torch.testing.assert_close(sparse.sinkhorn_attn(q, k, v, 8, causal=True)[:, :30], o[:, :30])


def test_soft_topk():
    scores = torch.randn(3, 40, dtype=F64, requires_grad=True)
    w = sparse.soft_topk(scores, 7, 1.0, 200)
    torch.testing.assert_close(w.sum(-1), torch.full((3,), 7.0, dtype=F64), atol=1e-6, rtol=0)
    assert w.min() >= 0 and w.max() <= 1 + 1e-9
    # where it is not at its bound, w = exp(s + a) with one a
    free = w < 0.999
    a = (w.log() - scores).masked_fill(~free, float("nan"))
    assert (a.nan_to_num(-99).amax(-1) - a.nan_to_num(99).amin(-1)).abs().max() < 1e-6
    assert (w.gather(-1, scores.argsort(-1)).diff() >= 0).all()
    assert torch.autograd.grad(w.square().sum(), scores)[0].isfinite().all()


def test_colt5():
    light, heavy = qkv(T, H, H), qkv(T, 2, 1)
    s_q, s_k = torch.randn(2, B, T, dtype=F64, requires_grad=True)
    near, far = sparse.colt5_attn(tuple(light), tuple(heavy), s_q, s_k, 10, 20, 5)
    t = torch.arange(T)
    want, _ = dense_attention(*light, ((t - t[:, None]).abs() <= 5)[None].int())
    same(near, want, *light)
    taken = [
        torch.zeros(B, T, dtype=torch.bool).scatter_(-1, s.topk(n).indices, True)
        for s, n in ((s_q, 10), (s_k, 20))
    ]
    w_q, w_k = sparse.soft_topk(s_q, 10), sparse.soft_topk(s_k, 20)
    q, k, v = heavy
    read = (taken[0][:, :, None] & taken[1][:, None])[:, None]
    want, _ = dense_attention(q, k, v * w_k[..., None, None], read.int())
    same(far, want * w_q[..., None, None], *heavy, s_q, s_k)


def test_errors():
    q, k, v = qkv(T, H, H)
    with pytest.raises(ValueError, match="block must divide T, got 7 and 48"):
        sparse.sinkhorn_attn(q, k, v, 7)
    with pytest.raises(ValueError, match="chunk_length must divide T, got 7 and 48"):
        sparse.lsh_attn(q, v, torch.zeros(B, H, 1, T, dtype=torch.long), 7)
    with pytest.raises(RuntimeError, match=r"buckets must have shape \[B, H, rounds, T\]"):
        sparse.lsh_attn(q, v, torch.zeros(B, H, 1, T - 1, dtype=torch.long), 6)
    with pytest.raises(RuntimeError, match=r"logits must have shape \[B, H, N, N\]"):
        sparse.sinkhorn_attn(q, k, v, 6, torch.zeros(B, H, 3, 3))
    with pytest.raises(RuntimeError, match=r"router must have shape \[B, T, H\]"):
        sparse.mosa_attn(q, k, v, torch.rand(B, T, 1), 4)
    with pytest.raises(RuntimeError, match=r"centroids must have shape \[H, C, K\]"):
        sparse.routing_attn(q, q, v, torch.rand(H, 4, 3), 4)


def test_no_tokens():
    x = torch.randn(B, 0, H, 4)
    assert sparse.lsh_attn(x, x, torch.zeros(B, H, 2, 0, dtype=torch.long), 4).shape == x.shape
    for causal in (False, True):
        assert sparse.sinkhorn_attn(x, x, x, 4, causal=causal).shape == x.shape
