"""RWKV-4 and its kin: definitions, laws, extreme keys."""

from __future__ import annotations

import itertools

import pytest
import torch
import wkv4
from checks import assert_accepted
from impls import Impl, threads

from lsm_cuda import ops, reference


def draw(T: int = 37, D: int = 6, B: int = 2, scale: float = 1.0, N: int = 2):
    w, u = torch.randn(2, D, dtype=torch.float64)
    k, v = torch.randn(2, B, T, D, dtype=torch.float64)
    state = torch.randn(N, D).double(), torch.rand(N, D).double() + 0.5, torch.randn(N, D).double()
    return w - 1, u, scale * k, v, state


def close(got, want, **tolerance) -> None:  # type: ignore[no-untyped-def]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product(wkv4.SHAPES, ["f64", "f32", "bf16", "f16"])],
    ids=str,
)
def test_wkv4_is_its_definition(impl: Impl, shape: wkv4.Shape, dtype: str) -> None:
    x, scale = wkv4.draw(*shape, dtype)
    truth, same = (
        wkv4.results(reference.wkv4, x.map(lambda t, d=d: t.to(d)), scale)
        for d in (torch.float64, torch.float32)
    )

    def call(w, u, k, v, state, cu):  # type: ignore[no-untyped-def]
        return ops.wkv4(w, u, k, v, state, True, cu)

    scale = None if scale is None else scale.to(impl.device)
    with threads(2):
        actual = wkv4.results(call, x.to(impl.device), scale)
    assert_accepted({n: t.cpu() for n, t in actual.items()}, truth, same, x)


test_wkv4_is_its_definition.only_impls = ("cpu", "cuda")


@pytest.mark.parametrize("carried", [False, True])
def test_wkv4_packed_and_split(carried: bool) -> None:
    w, u, k, v, state = draw(B=1, N=4, scale=8)
    cu = torch.tensor([0, 0, 9, 20, 37])
    initial = state if carried else None
    got = ops.wkv4(w, u, k, v, initial, True, cu)
    want = reference.wkv4(w, u, k, v, initial, cu)
    close((got[0],), (want[0],))
    some = slice(None) if carried else slice(1, None)  # the empty sequence has no sums to scale
    close([s[some] for s in got[1]], [s[some] for s in want[1]])
    first, middle = ops.wkv4(w, u, k[:, :20], v[:, :20], output_final_state=True)
    second, _ = ops.wkv4(w, u, k[:, 20:], v[:, 20:], middle)
    close((torch.cat([first, second], 1),), ops.wkv4(w, u, k, v)[:1])


def test_wkv4_step_is_prefill() -> None:
    w, u, k, v, _ = draw(scale=20)
    state = tuple(torch.full((2, 6), x).double() for x in (0.0, 0.0, -torch.inf))
    steps = [ops.wkv4_step(w, u, k[:, t], v[:, t], state) for t in range(37)]
    o, final = ops.wkv4(w, u, k, v, output_final_state=True)
    close((torch.stack(steps, 1), *state), (o, *final))


def test_wkv4_with_keys_of_any_size() -> None:
    w, u, k, v, _ = (x.float() if torch.is_tensor(x) else x for x in draw(T=300))
    k = torch.where(k > 0, 80.0, -80.0).requires_grad_()
    o, state = ops.wkv4(w, u, k, v, output_final_state=True)
    (dk,) = torch.autograd.grad(o.sum() + state[0].sum(), k, retain_graph=True)
    assert o.isfinite().all() and dk.isfinite().all()
    assert all(s.isfinite().all() for s in state)
    wide = [t.detach().double() for t in (w, u, k, v)]
    wide[2].requires_grad_()
    want, _ = reference.wkv4(*wide)
    (dk,), (dk_wide,) = torch.autograd.grad(o.sum(), k), torch.autograd.grad(want.sum(), wide[2])
    close((o, dk), (want.float(), dk_wide.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rate", [0.0, 1e-3, 1.0, 100.0])
def test_wkv4_with_decays_and_keys_of_any_size(rate: float) -> None:
    """e^0 to e^-100 per token, keys from -80 to 80: values and every gradient against fp64."""
    _, u, _, v, _ = draw(T=100)
    k = torch.empty(2, 100, 6, dtype=torch.float64).uniform_(-80, 80)
    w = torch.full((6,), rate).double().log()
    results = []
    for call, kind in ((ops.wkv4, torch.float32), (reference.wkv4, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (w, u, k, v)]
        o, _ = call(*leaves)
        grads = torch.autograd.grad(o.sin().sum(), leaves)
        results.append([t.float() for t in (o, *(grads if rate else grads[1:]))])
    close(*results, rtol=1e-3, atol=1e-4)


def test_wkv4_same_bits_twice_and_close_on_any_number_of_threads() -> None:
    x, scale = wkv4.draw(200, 200, 2, 1.0, True, "f32")

    def call(w, u, k, v, state, cu):  # type: ignore[no-untyped-def]
        return ops.wkv4(w, u, k, v, state, True, cu)

    def run(n: int):  # type: ignore[no-untyped-def]
        with threads(n):
            return list(wkv4.results(call, x, scale).values())

    first, second, single = run(2), run(2), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    close(first, single)


def test_wkv4_operator_is_well_formed() -> None:
    x, scale = wkv4.draw(37, 12, 2, 1.0, True, "f32")
    t = {n: v.requires_grad_() for n, v in x.tensors.items()}
    r = t["w"].exp().detach().requires_grad_()
    inputs = (r, t["u"], t["k"], t["v"], t["numerator"], t["denominator"], scale)
    torch.library.opcheck(torch.ops.lsm.wkv4_fwd, (*inputs, None, True, True))
    torch.library.opcheck(torch.ops.lsm.bi_wkv_fwd, inputs[:4])
    with torch.no_grad():
        one = (r, t["u"], t["k"][:, 0], t["v"][:, 0], *(s.clone() for s in inputs[4:]))
        torch.library.opcheck(torch.ops.lsm.wkv4_step, one)


def test_wkv4_compiles_as_one_graph() -> None:
    leaves = [t.requires_grad_() for t in draw()[:4]]

    def loss(*tensors):  # type: ignore[no-untyped-def]
        o, state = ops.wkv4(*tensors, output_final_state=True)
        return o.square().sum() + state[0].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)))


def test_wkv4_has_no_second_derivative() -> None:
    w, u, k, v, _ = draw()
    k.requires_grad_(), v.requires_grad_()
    (grad,) = torch.autograd.grad(ops.wkv4(w, u, k, v)[0].sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="lsm::wkv4_bwd: the backward pass is itself"):
        torch.autograd.grad(grad.sum(), v)


def test_wkv4_is_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    leaves = [t.float().requires_grad_() for t in draw()[:4]]
    want, state = modeling.rwkv_linear_attention_cpu(*leaves, return_state=True)
    got, final = ops.wkv4(*leaves, output_final_state=True)
    close((got, *final), (want, *state), rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(want)
    close(*(torch.autograd.grad(o, leaves, upstream) for o in (got, want)), rtol=1e-3, atol=1e-4)


def test_aft_simple_is_its_definition() -> None:
    q, k, v = torch.randn(3, 2, 37, 6, dtype=torch.float64)
    weight = torch.exp(k)
    want = q.sigmoid() * (weight * v).cumsum(1) / weight.cumsum(1)
    close(ops.aft_simple(q, k, v)[:1], (want,))
    first, state = ops.aft_simple(q[:, :20], k[:, :20], v[:, :20], output_final_state=True)
    second, _ = ops.aft_simple(q[:, 20:], k[:, 20:], v[:, 20:], state)
    close((torch.cat([first, second], 1),), (want,))


@pytest.mark.parametrize("causal", [True, False])
def test_aft_full_is_its_definition(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 9, 6, dtype=torch.float64)
    k, pairs = 30 * k, 30 * torch.randn(9, 9).double()
    logits = k[:, None] + pairs[:, :, None]
    if causal:
        logits = logits.masked_fill(~torch.ones(9, 9).tril().bool()[..., None], -torch.inf)
    want = q.sigmoid() * torch.einsum("btsd,bsd->btd", logits.softmax(2), v)
    close((ops.aft_full(q, k, v, pairs, causal),), (want,))


def test_aft_full_of_the_last_queries() -> None:
    """Continued, and with pairs of each row: one hidden, which changes that row alone."""
    q, k, v = torch.randn(3, 2, 9, 6, dtype=torch.float64)
    pairs = torch.randn(9, 9).double()
    want = ops.aft_full(q, k, v, pairs)
    close((ops.aft_full(q[:, 5:], k, v, pairs[5:]),), (want[:, 5:],))
    rows = pairs.repeat(2, 1, 1)
    rows[1, :, 0] = -torch.inf
    got = ops.aft_full(q[:, 5:], k, v, rows[:, 5:])
    close(
        (got[0], got[1]),
        (want[0, 5:], ops.aft_full(q[1:, 5:], k[1:, 1:], v[1:, 1:], pairs[5:, 1:])[0]),
    )
    with pytest.raises(RuntimeError, match="q must be the last tokens of the T = 4 of k"):
        ops.aft_full(q, k[:, :4], v[:, :4], pairs[:, :4])
    with pytest.raises(RuntimeError, match=r"w must have shape \[B, TQ, T\] = \[2, 9, 9\]"):
        ops.aft_full(q, k, v, rows[:1])


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize(("T", "D"), [(1, 3), (31, 8), (65, 70), (200, 17), (0, 8)])
def test_bi_wkv_is_its_definition(impl: Impl, dtype: str, T: int, D: int) -> None:
    x = wkv4.draw_both(T, D, dtype)
    with threads(2):
        got = wkv4.both_results(ops.bi_wkv, x.to(impl.device))
        plain = ops.bi_wkv(*(x.to(impl.device).tensors[n] for n in "wukv"))
    assert torch.equal(got["o"], plain)  # without gradients
    truth, same = wkv4.both_expected(x)
    assert_accepted({n: t.cpu() for n, t in got.items()}, truth, same, x)


test_bi_wkv_is_its_definition.only_impls = ("cpu", "cuda")


def test_bi_wkv_reversed_is_reversed() -> None:
    w, u, k, v, _ = draw(T=100)
    backwards = ops.bi_wkv(100 * w.exp(), u, k.flip(1), v.flip(1)).flip(1)
    close((backwards,), (ops.bi_wkv(100 * w.exp(), u, k, v),))


def test_gradients_of_its_kin() -> None:
    w, u = (t.requires_grad_() for t in torch.randn(2, 3).double())
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 5, 3).double())
    pairs = torch.randn(5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: ops.bi_wkv(*x), (w, u, k, v))
    for causal in (True, False):
        assert torch.autograd.gradcheck(
            lambda *x, causal=causal: ops.aft_full(*x, causal), (q, k, v, pairs)
        )


@pytest.mark.parametrize("call", [ops.wkv4, ops.bi_wkv])
def test_errors(call) -> None:  # type: ignore[no-untyped-def]
    w, u, k, v, _ = draw()
    with pytest.raises(RuntimeError, match=r"v must have shape \[B, T, D\] = \[2, 37, 6\]"):
        call(w, u, k, v[:, 1:])


def test_empty() -> None:
    w, u, k, v, state = draw(T=0)
    o, final = ops.wkv4(w, u, k, v, state, True)
    assert o.shape == (2, 0, 6)
    close(final, state)
