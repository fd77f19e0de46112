"""The decoder: every mixer by name, cached decoding, generation."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.models import MIXERS, DecoderLM, ModelConfig, Sampling


def make(mixer: str = "gla", **options) -> DecoderLM:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=48,
        mixer=mixer,
        mixer_options=options,
        initializer_range=0.3,  # far from uniform predictions, so that mistakes show
    )
    model = DecoderLM(config).double()
    with torch.no_grad():  # mixers that begin as nothing
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return model


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape)


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_cached_decoding_is_the_whole(mixer):
    model, x = make(mixer), ids(2, 12)
    whole, none = model(x)
    assert none is None and whole.shape == (2, 12, 256)
    first, cache = model(x[:, :7], use_cache=True)
    pieces = [first]
    for t in range(7, 12):
        pieces.append(model(x[:, t : t + 1], past_key_values=cache, use_cache=True)[0])
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)
    assert len(cache) == 2 and cache.get_seq_length() == 12
    last, _ = model(x, last_only=True)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_generation_with_and_without_cache_agree(mixer):
    model, x = make(mixer), ids(2, 5)
    fast = model.generate(x, 8, temperature=0)
    slow = x
    for _ in range(8):
        slow = torch.cat([slow, model(slow)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_left_padded_prompts_generate_as_alone(mixer, dtype):
    model, x = make(mixer), ids(2, 9)
    mask = torch.ones(2, 9, dtype=dtype)
    mask[0, :5] = 0
    both = model.generate(x, 6, temperature=0, attention_mask=mask)
    alone = model.generate(x[:1, 5:], 6, temperature=0)
    assert torch.equal(both[0, 9:], alone[0, 4:])


def test_generation_is_decided_by_its_seed():
    model, x = make(), ids(3, 4)

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(x, 20, top_k=50, top_p=0.9, generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(draw(1)[:, :4], x)


def test_streaming_leaves_autograd_as_it_was():
    model = make()
    stream = model.stream(ids(1, 3), 4, Sampling(0))
    next(stream)
    assert torch.is_grad_enabled()
    assert len(list(stream)) == 3


def test_generation_stops_at_the_end_token():
    model, x = make(), ids(2, 4)
    free = model.generate(x, 10, temperature=0)[:, 4:]
    end = int(free[0, 2])
    got = model.generate(x, 10, temperature=0, eos_token_id=end)[:, 4:]
    for row, unstopped in zip(got.tolist(), free.tolist(), strict=True):
        until = unstopped.index(end) if end in unstopped else len(unstopped)
        kept = unstopped[: until + 1][: len(row)]
        assert row == kept + [end] * (len(row) - len(kept))


def test_sampling_keeps_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options) -> list[float]:
        drawn = Sampling(generator=generator, **options)(logits)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.05)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.05)
    assert shares(top_p=0.01) == shares(top_k=1) == shares(temperature=0) == [1, 0, 0, 0]
    assert shares(temperature=0.5)[0] > 0.6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1}, "temperature must be >= 0, got -1"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_sampling_errors(options, text):
    with pytest.raises(ValueError, match=text):
        Sampling(**options)


def test_model_errors():
    with pytest.raises(ValueError, match="unknown mixer 'glaa', expected one of attention, gla"):
        make("glaa")
    with pytest.raises(ValueError, match=r"mixer 'gla': .*use_sort_conv"):
        make(use_sort_conv=True)
    with pytest.raises(ValueError, match="unknown config entries: depth"):
        ModelConfig.from_dict({"depth": 3})
    with pytest.raises(ValueError, match=r"T >= 1, got \[1, 0\]"):
        make().generate(ids(1, 0), 3)


def test_embeddings_are_tied_and_start_small():
    model = DecoderLM(ModelConfig(hidden_size=32, num_layers=2, num_heads=2))
    assert not [name for name, _ in model.named_parameters() if "head" in name]
    logits, _ = model(ids(2, 10))
    assert logits.std() < 1


def starts_as_identity(mixer: torch.nn.Module) -> bool:
    maps = [m for m in mixer.modules() if type(m).__name__ == "HedgehogFeatureMap"]
    eye = torch.eye(16, dtype=torch.double)
    return bool(maps) and all(torch.equal(m.layer.weight, eye) for m in maps)


def remembers_at_many_lengths(mixer: torch.nn.Module) -> bool:
    spread = mixer.w_proj.linear.lora[2].bias.sort().values
    return bool(spread[0] == -6 and spread[-1] == -1)


def writes_little_for_long(mixer: torch.nn.Module) -> bool:
    f = mixer.fgate_preact.bias
    return bool((mixer.igate_preact.bias == -10).all() and (f >= 3).all() and (f <= 6).all())


@pytest.mark.parametrize(
    ("mixer", "options", "holds"),
    [
        ("linear_attn", {"feature_map": "hedgehog"}, starts_as_identity),
        ("rwkv6", {}, remembers_at_many_lengths),
        ("mlstm", {}, writes_little_for_long),
    ],
)
def test_a_layer_keeps_its_own_initial_values(mixer, options, holds):
    """After a redraw too, which leaves other projections at the model's scale."""
    model = make(mixer, **options)
    assert all(holds(layer.attn) for layer in model.layers)
    for p in model.layers.parameters():
        p.data.fill_(7)
    model.reset_parameters()
    assert all(holds(layer.attn) for layer in model.layers)
    assert model.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.15, rel=0.1)
