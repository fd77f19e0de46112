"""Feature maps as modules: each by name, their definitions, and FLA's own as an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from fla_maps import load_fla_maps, needs_fla

from lsm_cuda import modules
from lsm_cuda.modules import (
    FEATURE_MAPS,
    CosFormerFeatureMap,
    DPFPFeatureMap,
    FocusedFeatureMap,
    HedgehogFeatureMap,
    LearnableOuterProductFeatureMap,
    LearnablePolySketchNonNegativeFeatureMap,
    PerformerFeatureMap,
    RebasedFeatureMap,
    ReGLAFeatureMap,
    ReLUFeatureMap,
    RFAFeatureMap,
    T2RFeatureMap,
    TaylorFeatureMap,
    feature_dim,
)
from lsm_cuda.modules.feature_map import feature_map

D = 6
NEEDED = {"cosformer": {"max_len": 30}, "outer_product": {"feature_dim": 5}}
VARIANTS = {
    **{name: (name, NEEDED.get(name, {})) for name in FEATURE_MAPS},
    "hedgehog exp": ("hedgehog", {"softmax": False}),
    "performer, keys stabilised": ("performer", {"stabilize_keys": True}),
    "polysketch 8": ("polysketch", {"degree": 8, "sketch_size": 4}),
    "rebased affine": ("rebased", {"normalize": False}),
    "rebased plain": ("rebased", {"normalize": False, "use_gamma": False, "use_beta": False}),
    "regla, keys stabilised": ("regla", {"stabilize_keys": True, "feature_dim": 7}),
    "rfa learned": ("rfa", {"learn_sigma": True, "sigma": 0.7, "orthogonal": True}),
    "t2r wide": ("t2r", {"dot_dim": 9, "bias": True}),
}
WIDTHS = {
    **dict.fromkeys(modules.ACT2FN, D),
    "cosformer": 2 * D,
    "dpfp": 8 * D,
    "elementwise_product": D,
    "exp": D,
    "focused": D,
    "hedgehog": 2 * D,
    "hedgehog exp": 2 * D,
    "outer_product": 15,
    "performer": 2 * D,
    "performer, keys stabilised": 2 * D,
    "polysketch": 21,
    "polysketch 8": 10,
    "rebased": 21,
    "rebased affine": 21,
    "rebased plain": 21,
    "regla": D,
    "regla, keys stabilised": 7,
    "rfa": 2 * D,
    "rfa learned": 2 * D,
    "softmax": D,
    "t2r": D,
    "t2r wide": 9,
    "taylor": 28,
}
every = pytest.mark.parametrize(
    ("name", "options", "width"),
    [(*variant, WIDTHS[key]) for key, variant in VARIANTS.items()],
    ids=list(VARIANTS),
)


def make(name: str, options: dict, dtype=torch.float64) -> modules.FeatureMap:
    torch.manual_seed(0)
    f = feature_map(name, D, **options).to(dtype)
    with torch.no_grad():  # away from the identities that maps start with
        for p in f.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return f


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_widths_and_dtypes(name, options, width, dtype):
    f = make(name, options, dtype)
    assert feature_dim(name, D, **options) == width
    for x in (tokens(2, 5, 3), tokens(2, 0, 3), tokens(0, 5, 3)):
        for y in (f.queries(x.to(dtype)), f.keys(x.to(dtype))):
            assert y.shape == (*x.shape[:-1], width) and y.dtype == dtype and y.isfinite().all()


def test_asking_for_a_width_draws_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    feature_dim("performer", 8)
    feature_dim("t2r", 8)
    assert torch.equal(torch.randn(3), expected)


@every
def test_gradients(name, options, width):
    f, x = make(name, options), tokens(1, 2, 2).requires_grad_()
    parameters = [p for p in f.parameters() if p.requires_grad]

    def both(x, *parameters):
        return f.queries(x), f.keys(x)

    assert torch.autograd.gradcheck(both, (x, *parameters))


@every
def test_low_precision_is_near_the_exact_map(name, options, width):
    """Parameters and inputs are the rounded ones, so only what happens inside is measured.

    Maps with a linear layer round its result, at most a few units each; 0.05 is 13 units of bf16.
    """
    f = make(name, options, torch.bfloat16)
    x = tokens(1, 30, 2).to(torch.bfloat16)
    rough = torch.cat([f.queries(x), f.keys(x)], -1).double()
    f.double()
    exact = torch.cat([f.queries(x.double()), f.keys(x.double())], -1)
    assert (rough - exact).norm() <= 0.05 * exact.norm()


@every
def test_autocast(name, options, width):
    f, x = make(name, options, torch.float32), tokens(1, 30, 2).float()
    exact = torch.cat([f.queries(x), f.keys(x)], -1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.cat([f.queries(x), f.keys(x)], -1)
        if any(p.requires_grad for p in f.parameters()):
            rough.float().sum().backward()
    assert (rough - exact).norm() <= 0.05 * exact.norm()
    if not any(p.requires_grad for p in f.parameters()):
        torch.testing.assert_close(rough, exact)  # random features too: no product in bf16


@every
def test_compiles_as_one_graph(name, options, width):
    f = make(name, options, torch.float32)
    x = tokens(2, 5, 3).float()

    def both(x):
        return f.queries(x), f.keys(x)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    for got, expected in zip(compiled, both(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("hedgehog", {}, {"layer.weight": (6, 6), "layer.bias": (6,)}),
        ("t2r", {}, {"layer.weight": (6, 6)}),
        ("t2r", {"bias": True, "dot_dim": 4}, {"layer.weight": (4, 6), "layer.bias": (4,)}),
        ("dpfp", {}, {}),
        (
            "elementwise_product",
            {},
            {
                "layer1.weight": (6, 6),
                "layer1.bias": (6,),
                "layer2.weight": (6, 6),
                "layer2.bias": (6,),
            },
        ),
        (
            "outer_product",
            {"feature_dim": 3},
            {"layer1.weight": (3, 6), "layer2.weight": (3, 6)},
        ),
        (
            "polysketch",
            {"degree": 8, "sketch_size": 4},
            {
                "gamma": (6,),
                "beta": (6,),
                "sketches1.0.weight": (4, 6),
                "sketches1.1.weight": (4, 4),
                "sketches2.0.weight": (4, 6),
                "sketches2.1.weight": (4, 4),
            },
        ),
        ("rebased", {}, {"gamma": (6,), "beta": (6,)}),
        ("rebased", {"use_beta": False}, {"gamma": (6,)}),
        ("taylor", {}, {}),
        ("relu", {}, {}),
        ("performer", {"num_features": 9}, {"projection": (9, 6)}),
        ("rfa", {}, {"projection": (6, 6), "sigma": (6,)}),
        ("regla", {"feature_dim": 4}, {"layer.weight": (4, 6)}),
    ],
)
def test_state_dict(name, options, expected):
    state = feature_map(name, D, **options).state_dict()
    assert {key: tuple(t.shape) for key, t in state.items()} == expected


def test_activations_have_no_width_of_their_own():
    x = torch.randn(2, 11)
    assert torch.equal(ReLUFeatureMap()(x), x.relu())  # FLA constructs it without arguments


def test_learned_maps_are_their_definitions():
    x = tokens(5)
    f = make("hedgehog", {})
    y = x @ f.layer.weight.T + f.layer.bias
    close(f(x), torch.cat([2 * y, -2 * y], -1).softmax(-1))
    f = make("t2r", {"bias": True})
    close(f(x), (x @ f.layer.weight.T + f.layer.bias).clamp(min=0))
    f = make("elementwise_product", {})
    one, two = (x @ g.weight.T + g.bias for g in (f.layer1, f.layer2))
    close(f(x), one * two)
    f = make("outer_product", {"feature_dim": 3})
    one, two = x @ f.layer1.weight.T, x @ f.layer2.weight.T
    close(f(x), torch.stack([one[:, i] * two[:, j] for i in range(3) for j in range(i, 3)], -1))


def test_hedgehog_starts_as_the_identity():
    x = tokens(5)
    close(HedgehogFeatureMap(D).double()(x), torch.cat([2 * x, -2 * x], -1).softmax(-1))


def layer_norm(x: torch.Tensor, f: modules.FeatureMap) -> torch.Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * f.gamma + f.beta


def test_rebased_scores_are_squares():
    f = make("rebased", {})
    q, k = tokens(5), tokens(7)
    s = layer_norm(q, f) @ layer_norm(k, f).T
    close(f(q) @ f(k).T, s**2 / D)
    close(f(q, flatten=False), layer_norm(q, f))
    plain = RebasedFeatureMap(D, use_gamma=False, use_beta=False, normalize=False)
    close(plain(q) @ plain(k).T, (q @ k.T) ** 2 / D)
    shifted = make("rebased", {"normalize": False, "use_gamma": False})
    close(shifted(q, flatten=False), q + shifted.beta)


def test_polysketch_scores():
    f = make("polysketch", {"degree": 8, "sketch_size": 4})

    def sketch(x: torch.Tensor) -> torch.Tensor:
        x = layer_norm(x, f)
        for i in range(2):
            one, two = f.sketches1[i].weight, f.sketches2[i].weight
            x = (x @ one.T) * (x @ two.T) / math.sqrt(D)
        return x

    q, k = tokens(5), tokens(7)
    products = sketch(q)[:, None] * sketch(k)  # [5, 7, M]
    expected = (products.sum(-1) ** 2 + products.square().sum(-1)) / 2
    close(f(q) @ f(k).T, expected)
    assert (expected >= 0).all()


def attend(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return weights @ v / weights.sum(-1, keepdim=True)


def test_performer_approaches_softmax_attention():
    torch.manual_seed(0)  # the variance grows like the exponential of |q + k|²
    q, k, v = tokens(1, 20, 1) / 3, tokens(1, 20, 1) / 3, tokens(20)
    exact = attend((q[0, :, 0] @ k[0, :, 0].T / math.sqrt(D)).exp(), v)

    def error(m: int) -> float:
        """Relative, over 20 draws."""
        f, errors = PerformerFeatureMap(D, m).double(), []
        for _ in range(20):
            f.redraw()
            o = attend(f.queries(q)[0, :, 0] @ f.keys(k)[0, :, 0].T, v)
            errors.append((o - exact).square().sum() / exact.square().sum())
        return torch.stack(errors).mean().sqrt().item()

    few, many = error(64), error(64 * 64)
    assert many < 0.02 and 4 < few / many < 16  # 1 / sqrt(m) says 8


def test_performer_stabilised_attends_the_same():
    """The factors that stabilisation divides by cancel in normalised attention."""
    q, k, v = tokens(1, 20, 1), tokens(1, 20, 1), tokens(20)
    f = PerformerFeatureMap(D).double()
    plain = attend(f(q)[0, :, 0] @ f(k)[0, :, 0].T, v)
    close(attend(f.queries(q)[0, :, 0] @ f.keys(k)[0, :, 0].T, v), plain)
    f.stabilize_keys = True
    close(attend(f.queries(q)[0, :, 0] @ f.keys(k)[0, :, 0].T, v), plain)
    assert f.keys(k).amax() == 1 and torch.equal(
        f.queries(q).amax(-1), torch.ones(1, 20, 1).double()
    )


@pytest.mark.parametrize("name", ["performer", "regla"])
def test_stabilised_keys_have_one_scale_per_sequence_and_head(name):
    f, x = make(name, {"stabilize_keys": True}), tokens(2, 9, 3) * 200
    alone = torch.cat([f.keys(x[b : b + 1, :, h : h + 1]) for b in range(2) for h in range(3)], 2)
    close(f.keys(x).transpose(0, 1).flatten(1, 2)[None], alone)
    assert torch.equal(f.keys(x).amax((1, 3)), torch.ones(2, 3).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["performer", "rfa", "regla", "exp", "hedgehog", "focused"])
def test_extreme_inputs_stay_finite(name, dtype):
    f = make(name, {}, dtype)
    x = tokens(1, 8, 2).to(dtype) * 3e3  # squares and powers leave fp16's range
    assert f.queries(x).isfinite().all() and f.keys(x).isfinite().all()
    assert f.queries(0 * x).isfinite().all() and f.keys(0 * x).isfinite().all()


def test_redraw_changes_the_directions_for_both():
    f = PerformerFeatureMap(D).double()
    q, k = tokens(1, 3, 1), tokens(1, 3, 1)
    before, place = (f.queries(q), f.keys(k)), f.projection.data_ptr()
    f.redraw()
    assert f.projection.data_ptr() == place and f.projection.dtype == torch.float64
    assert not torch.allclose(f.queries(q), before[0]) and not torch.allclose(f.keys(k), before[1])
    assert f.shared and not TaylorFeatureMap(D).shared


@pytest.mark.parametrize("name", ["performer", "rfa"])
def test_a_checkpoint_holds_the_directions(name):
    f, g, x = make(name, {}), feature_map(name, D).double(), tokens(1, 3, 2)
    assert not torch.allclose(f(x), g(x))
    g.load_state_dict(f.state_dict())
    assert torch.equal(f(x), g(x))


def test_rfa_width_of_the_kernel_is_sigma():
    torch.manual_seed(0)
    f = RFAFeatureMap(D, 2**16, sigma=1.3, learn_sigma=True).double()
    with torch.no_grad():
        f.sigma[1:3] = 0.4
    q, k = tokens(4), tokens(4)
    d = f.sigma * (q / q.norm(dim=-1, keepdim=True) - k / k.norm(dim=-1, keepdim=True))
    expected = (-d.square().sum(-1) / 2).exp()
    # One estimate is a cosine, of variance below 1/2: 5 standard errors.
    assert ((f(q) * f(k)).sum(-1) - expected).abs().max() < 5 * math.sqrt(0.5 / 2**16)
    assert not RFAFeatureMap(D).sigma.requires_grad


def test_regla_maps_and_scale():
    f, x = make("regla", {}), tokens(2, 5, 3)
    y = x @ f.layer.weight.T
    close(f.queries(x), (y - y.amax(-1, keepdim=True)).exp())
    close(f.keys(x), y.exp())
    f.stabilize_keys = True
    close(f.keys(x), (y - y.amax((1, 3), keepdim=True)).exp())
    # exp(x) exp(y) is lognormal, of variance e^4 - e^2 for unit normal x and y.
    variance = 4 * (math.e**4 - math.e**2)
    assert ReGLAFeatureMap(4).scale == pytest.approx(variance**-0.5, rel=1e-12)


def test_cosformer_continues_at_an_offset():
    f, x = CosFormerFeatureMap(D, max_len=12), tokens(2, 9, 3)
    whole = f.keys(x)
    close(torch.cat([f.keys(x[:, :4]), f.queries(x[:, 4:], 4)], 1), whole)
    close(f(x, torch.arange(9)), whole)
    close(f(x, torch.arange(9).expand(2, 9)), whole)
    assert not torch.allclose(f(x, 3), whole)


def test_errors():
    with pytest.raises(ValueError, match=r"unknown feature map 'tailor', expected one of.*taylor"):
        feature_map("tailor", D)
    with pytest.raises(ValueError, match=r"feature map 'dpfp'.*unexpected keyword argument 'mu'"):
        feature_map("dpfp", D, mu=2)
    with pytest.raises(ValueError, match=r"feature map 'cosformer'.*max_len"):
        feature_map("cosformer", D)
    with pytest.raises(ValueError, match="T2RFeatureMap: head_dim must be positive, got 0"):
        T2RFeatureMap(0)
    with pytest.raises(ValueError, match="dot_dim must be positive, got -1"):
        T2RFeatureMap(D, -1)
    with pytest.raises(ValueError, match=r"nu must be from 1 to 2 \* head_dim - 1 = 11, got 12"):
        DPFPFeatureMap(D, 12)
    with pytest.raises(ValueError, match="degree must be a power of 2, at least 2, got 6"):
        LearnablePolySketchNonNegativeFeatureMap(D, degree=6)
    with pytest.raises(ValueError, match="feature_dim must be positive, got 0"):
        LearnableOuterProductFeatureMap(D, 0)
    with pytest.raises(ValueError, match=r"power must be at least 1, got 0\.5"):
        FocusedFeatureMap(D, 0.5)
    with pytest.raises(ValueError, match="num_features must be positive, got 0"):
        PerformerFeatureMap(D, 0)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        RFAFeatureMap(D, sigma=0)
    with pytest.raises(ValueError, match="at most max_len = 4 tokens, got 5"):
        CosFormerFeatureMap(D, 4)(tokens(1, 3, 1), 2)
    with pytest.raises(
        ValueError, match=r"positions \[T\] or \[B, T\] of x \[1, 3, 1, 6\], got \[2\]"
    ):
        CosFormerFeatureMap(D, 4)(tokens(1, 3, 1), torch.arange(2))


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in FEATURE_MAPS
        if n not in {*modules.ACT2FN, "exp", "softmax", "focused", "cosformer"}
    ],
)
def test_another_width_is_named(name):
    f = make(name, NEEDED.get(name, {}))
    with pytest.raises(ValueError, match=rf"{type(f).__name__}: x must have head_dim = 6 channels"):
        f.keys(torch.randn(1, 2, 3, 5, dtype=torch.float64))


@needs_fla
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("HedgehogFeatureMap", {}),
        ("T2RFeatureMap", {}),
        ("T2RFeatureMap", {"dot_dim": 9, "bias": True}),
        ("DPFPFeatureMap", {}),
        ("DPFPFeatureMap", {"nu": 2}),
        ("HadamardFeatureMap", {}),
        ("LearnableOuterProductFeatureMap", {"feature_dim": 5}),
        ("LearnablePolySketchNonNegativeFeatureMap", {}),
        ("LearnablePolySketchNonNegativeFeatureMap", {"degree": 4, "sketch_size": 5}),
        ("LearnablePolySketchNonNegativeFeatureMap", {"degree": 16}),
        ("TaylorFeatureMap", {}),
        ("RebasedFeatureMap", {}),
        ("RebasedFeatureMap", {"use_gamma": False, "use_beta": False}),
        ("RebasedFeatureMap", {"use_beta": False, "normalize": False}),
        ("RebasedFeatureMap", {"normalize": False}),
        ("ReLUFeatureMap", None),
        ("SquaredReLUFeatureMap", None),
        ("GELUFeatureMap", None),
        ("SwishFeatureMap", None),
        ("SigmoidFeatureMap", None),
    ],
)
def test_fla_agrees(name, options, monkeypatch):
    """FLA's state dict loads, and gives FLA's features and gradients."""
    torch.manual_seed(0)
    arguments = {} if options is None else {"head_dim": D, **options}
    theirs = getattr(load_fla_maps(monkeypatch), name)(**arguments).double()
    ours = getattr(modules, name)(**arguments).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict())
    x = tokens(2, 5, 3).requires_grad_()
    got, expected = ours(x), theirs(x)
    close(got, expected)
    upstream = torch.randn_like(got)
    wanted = [x, *theirs.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, [x, *ours.parameters()], upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        close(a, b)
