"""Cache: counting, selecting, copying, memory."""

from __future__ import annotations

import torch

from lsm_cuda.cache import Cache, KVBuffer


def filled() -> Cache:
    cache = Cache()
    cache.update(
        0,
        recurrent_state=torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 5).contiguous(),
        conv_state=(torch.zeros(3, 6, 4), torch.ones(3, 8, 4)),
        offset=7,
    )
    cache.update(1, attn_state=KVBuffer.start(*torch.randn(2, 3, 7, 2, 4)), offset=7)
    return cache


def test_counting_and_access():
    cache = Cache()
    assert len(cache) == 0 and cache.get(0) is None and cache.get_seq_length(3) == 0
    cache = filled()
    cache.update(0, offset=2)
    assert len(cache) == 2
    assert (cache.get_seq_length(), cache.get_seq_length(0), cache.get_seq_length(1)) == (9, 9, 7)


def test_nbytes_counts_every_tensor():
    state, convs, kv = 3 * 2 * 4 * 5, 3 * 6 * 4 + 3 * 8 * 4, 2 * 3 * 7 * 2 * 4
    assert filled().nbytes == 4 * (state + convs + kv)


def test_select_reorders_repeats_and_drops():
    cache = filled()
    keys = cache[1].attn_state.keys
    cache.select(torch.tensor([2, 0, 2, 1]))
    assert cache[0].recurrent_state[:, 0, 0, 0].tolist() == [2, 0, 2, 1]
    assert cache[0].conv_state[1].shape[0] == 4
    assert torch.equal(cache[1].attn_state.keys, keys[[2, 0, 2, 1]])


def test_clone_is_independent():
    cache = filled()
    copy = cache.clone()
    for t in (*copy[0].tensors(), *copy[1].tensors()):
        t.fill_(9)
    copy.update(0, offset=5)
    assert cache[0].recurrent_state.max() == 2 and cache.get_seq_length() == 7
    assert not (cache[1].attn_state.keys == 9).all()


def test_buffers_grow_rarely_and_keep_order():
    x = torch.randn(1, 100, 2, 4)
    kv = KVBuffer.start(x[:, :1], -x[:, :1])
    addresses = set()
    for t in range(1, 100):
        keys, values = kv.append(x[:, t : t + 1], -x[:, t : t + 1])
        addresses.add(kv.keys.data_ptr())
        assert torch.equal(keys, x[:, : t + 1]) and torch.equal(values, -keys)
    assert kv.keys.shape[1] == 128 and len(addresses) <= 8
