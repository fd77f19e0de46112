"""The scan engine: definitions, laws, errors."""

from __future__ import annotations

import re

import pytest
import torch
from impls import IMPLS, Impl, threads
from peers import fla_module
from scans import SCANS, ScanCase, assert_scan, scan_cases

from lsm_cuda import ops, reference


def each_case() -> list:
    rows = []
    for impl in IMPLS.values():
        absent = impl.absent()
        marks = [pytest.mark.gpu] if impl.name == "cuda" else []
        marks += [pytest.mark.skip(reason=absent)] if absent else []
        for op in SCANS:
            for case in scan_cases(op, impl.name)[: 1 if absent else None]:
                rows.append(pytest.param(impl, case, marks=marks, id=f"{impl}-{case}"))
    return rows


@pytest.mark.parametrize(("where", "scan_case"), each_case())
def test_definition(where: Impl, scan_case: ScanCase) -> None:
    assert_scan(where, scan_case)


def arguments(
    T: int = 37, D: int = 12, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    x = torch.randn(2, T, D, dtype=dtype)
    a = torch.rand(2, T, D, dtype=dtype)
    return x, a, torch.randn(2, D, dtype=dtype)


def close(got, want, **tolerance) -> None:  # type: ignore[no-untyped-def]
    torch.testing.assert_close(tuple(got), tuple(want), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_laws(dtype: torch.dtype) -> None:
    x, a, h0 = arguments(dtype=dtype)
    whole = ops.scan(x, a, h0, True)
    first, state = ops.scan(x[:, :20], a[:, :20], h0, True)
    second, state = ops.scan(x[:, 20:], a[:, 20:], state, True)
    close((torch.cat([first, second], 1), state), whole)
    turned = ops.scan(x.flip(1), a.flip(1), h0, True, reverse=True)
    close((turned[0].flip(1), turned[1]), whole)
    order = torch.randperm(37)
    placed = ops.scan(x, a, h0, True, order=order)
    gathered = ops.scan(x[:, order], a[:, order], h0, True)
    close((placed[0][:, order], placed[1]), gathered)
    state = h0.clone()
    steps = [ops.scan_step(x[:, t], a[:, t], state) for t in range(37)]
    close((torch.stack(steps, 1), state), whole)
    close(ops.scan(x, a.log(), h0, True, log=True), whole)
    close(ops.scan(x, a[0, 0], h0, True), ops.scan(x, a[0, 0].expand(x.shape), h0, True))


def test_complex_without_phase_is_real() -> None:
    x, a, h0 = arguments()
    h, state = ops.scan(x.to(torch.complex128), (a.log(), torch.zeros_like(a)), h0 + 0j, True)
    close((h.real, state.real), ops.scan(x, a, h0, True))
    assert not h.imag.any() and not state.imag.any()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", ["token", "constant"])
def test_long_sequences_are_cut_and_joined(form: str, reverse: bool) -> None:
    """One row of few channels on two threads: segments, forwards and backwards."""
    T, D = 40_000, 5
    x = torch.randn(1, T, D, dtype=torch.float64)
    g = -torch.rand_like(x) / 1000
    a = (g[0, 0] if form == "constant" else g).requires_grad_()
    h0 = torch.randn(1, D, dtype=torch.float64, requires_grad=True)
    grad = torch.randn_like(x)
    results = []
    for n in (1, 2):
        with threads(n):
            h, state = ops.scan(x, a, h0, True, log=True, reverse=reverse)
            grads = torch.autograd.grad([h, state], [a, h0], [grad, torch.ones_like(h0)])
            results.append((h.detach(), state.detach(), *grads))
    close(*results)
    assert not torch.equal(results[0][0], results[1][0])  # it was cut


def test_phase_near_the_unit_circle_over_65k_steps() -> None:
    """Against fp64, and no worse than a loop in the same dtype."""
    T, D = 65_536, 8
    theta = torch.linspace(0.01, 3.1, D)
    g = torch.complex(-torch.logspace(-6, -3, D), theta)
    x = torch.zeros(1, T, D, dtype=torch.complex64)
    x[:, 0] = 1
    _, state = ops.scan(x, g, None, True, log=True)
    exact = (g.to(torch.complex128) * (T - 1)).exp()
    step = g.exp().to(torch.complex64)
    loop = torch.ones(D, dtype=torch.complex64)
    for _ in range(T - 1):
        loop = loop * step
    error, of_loop = ((z - exact).abs().max() for z in (state[0], loop))
    assert error <= 2 * of_loop + 1e-6
    wide = ops.scan(x.to(torch.complex128), g.to(torch.complex128), None, True, log=True)[1]
    torch.testing.assert_close(wide[0], exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("per_token", [False, True])
def test_noise_near_the_unit_circle_over_65k_steps(per_token: bool) -> None:
    """Every output and gradient against fp64, errors measured by those of a loop in the same
    dtype."""
    T, D = 65_536, 4
    g = torch.complex(-torch.logspace(-6, -4, D), torch.linspace(0.01, 3.1, D))
    x, grad = torch.randn(2, 1, T, D, dtype=torch.complex64)
    leaves = [x, g.expand(1, T, D).clone() if per_token else g]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in leaves]
        h, _ = ops.scan(*inputs, log=True)
        return [h.detach(), *torch.autograd.grad(h, inputs, grad.to(dtype))]

    truth, found = run(torch.complex128), run(torch.complex64)
    step, h, outputs = g.exp(), torch.zeros(D, dtype=torch.complex64), []
    for t in range(T):
        h = step * h + x[0, t]
        outputs.append(h)

    def error(z: torch.Tensor, exact: torch.Tensor) -> float:
        return ((z - exact).abs().square().mean() / exact.abs().square().mean()).sqrt().item()

    most = 2 * error(torch.stack(outputs)[None], truth[0]) + 1e-6
    assert most < 1e-3
    for name, z, exact in zip(["h", "dx", "dg"], found, truth, strict=True):
        assert error(z, exact) <= most, name


def test_hgrn_is_flas() -> None:
    naive = fla_module("ops/hgrn/naive.py").naive_recurrent_hgrn
    x, a, h0 = arguments(dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, a.log(), h0)]
    upstream = torch.randn_like(x), torch.randn_like(h0)
    results = []
    for call in (ops.chunk_hgrn, naive):
        h, state = call(*leaves, True)
        results.append((h, state, *torch.autograd.grad([h, state], leaves, upstream)))
    close(*results, rtol=1e-4, atol=1e-4)
    close(ops.fused_recurrent_hgrn(*leaves, True), ops.chunk_hgrn(*leaves, True))


@pytest.mark.parametrize("form", ["channel", "token"])
def test_complex_hgrn_is_its_definition(form: str) -> None:
    """The gate turns by theta; without a phase it is the real one, and steps are the whole."""
    x, a, h0 = arguments()
    g, theta = a.log().requires_grad_(), torch.randn(2, 37, 12).double()
    theta = (theta if form == "token" else theta[0, 0]).requires_grad_()
    x, h0 = (t.to(torch.complex128).requires_grad_() for t in (x, h0))
    leaves, upstream = [x, g, h0, theta], [torch.randn_like(x), torch.randn_like(h0)]
    results = []
    for call in (
        lambda: ops.chunk_hgrn(x, g, h0, True, theta=theta),
        lambda: reference.scan(x, torch.exp(g + 1j * theta), h0),
    ):
        y = call()
        results.append((*y, *torch.autograd.grad(y, leaves, upstream)))
    close(*results)
    flat = ops.chunk_hgrn(x, g, h0, True, theta=torch.zeros_like(theta))
    close([t.real for t in flat], ops.chunk_hgrn(x.real, g, h0.real, True))
    with torch.no_grad():
        state, turns = h0.clone(), theta.expand(x.shape)
        steps = [ops.hgrn_step(x[:, t], g[:, t], state, turns[:, t]) for t in range(37)]
    close((torch.stack(steps, 1), state), results[0][:2])


def test_rg_lru_is_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    configuration = pytest.importorskip("transformers").RecurrentGemmaConfig
    unit = modeling.RecurrentGemmaRglru(configuration(lru_width=12, num_attention_heads=2))
    for parameter in unit.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 37, 12, requires_grad=True)
    heads = x.reshape(-1, 2, 6).transpose(0, 1)
    logits = [
        torch.baddbmm(bias[:, None], heads, weight).transpose(0, 1).reshape(2, 37, 12)
        for weight, bias in (
            (unit.input_gate_weight, unit.input_gate_bias),
            (unit.recurrent_gate_weight, unit.recurrent_gate_bias),
        )
    ]
    want = unit(x, torch.arange(37).expand(2, -1))
    got, _ = ops.rg_lru(x, *logits, unit.recurrent_param)
    close((got,), (want,), rtol=1e-4, atol=1e-5)
    leaves = [x, *unit.parameters()]
    upstream = torch.randn_like(want)
    close(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), rtol=1e-3, atol=1e-4)


def test_rg_lru_step_is_prefill() -> None:
    x, i, r = torch.randn(3, 2, 9, 12)
    param, h0 = torch.randn(12), torch.randn(2, 12)
    h, final = ops.rg_lru(x, i, r, param, h0, True)
    state = h0.clone()
    steps = [ops.rg_lru_step(x[:, t], i[:, t], r[:, t], param, state) for t in range(9)]
    close((torch.stack(steps, 1), state), (h, final))


def test_lru_is_its_definition() -> None:
    x, nu, theta = torch.randn(2, 9, 4, dtype=torch.complex128), *torch.randn(2, 4).double()
    lam = torch.exp(-nu.exp() + 1j * theta.exp())
    want = reference.scan((1 - lam.abs() ** 2).sqrt() * x, lam)
    close(ops.lru(x, nu, theta, output_final_state=True), want)
    state = torch.zeros(2, 4, dtype=torch.complex128)
    steps = [ops.lru_step(x[:, t], nu, theta, state) for t in range(9)]
    close((torch.stack(steps, 1), state), want)


def test_min_units_and_glru_are_their_definitions() -> None:
    f, i, c, o = torch.randn(4, 2, 9, 4).double()
    wanted = reference.scan(i.sigmoid() * c, f.sigmoid())
    h, state = ops.glru(f.sigmoid(), i.sigmoid(), c, o, output_final_state=True)
    close((h, state), (o * wanted[0], wanted[1]))
    positive = torch.where(c >= 0, c + 0.5, c.sigmoid())
    close(
        ops.min_gru(i, c, output_final_state=True),
        reference.scan(i.sigmoid() * positive, 1 - i.sigmoid()),
    )
    total = f.sigmoid() + i.sigmoid()
    close(
        ops.min_lstm(f, i, c, output_final_state=True, positive=False),
        reference.scan(i.sigmoid() / total * c, f.sigmoid() / total),
    )


@pytest.mark.parametrize("shape", [(), (3, 5)])
def test_gateloop_is_its_definition(shape: tuple[int, ...]) -> None:
    K, V = shape or (1, 1)
    q, k, m, theta = torch.randn(4, 2, 9, 2, K).double()
    v, m = torch.randn(2, 9, 2, V).double(), torch.nn.functional.logsigmoid(m)
    S = torch.randn(2, 2, K, V, dtype=torch.complex128)
    outputs, state = [], S
    for t in range(9):
        gate = torch.exp(m[:, t] + 1j * theta[:, t])
        state = gate[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state.real, q[:, t]))
    want = torch.stack(outputs, 1), state
    if not shape:
        arguments, S = [x.squeeze(-1) for x in (q, k, v, m, theta)], S[..., 0, 0]
        want = want[0].squeeze(-1), state[..., 0, 0]
    else:
        arguments = [q, k, v, m, theta]
    close(ops.gateloop(*arguments, S, True), want)


def draw_named(name: str) -> list[torch.Tensor]:
    """Tensors of tokens ``[2, 12, 3]`` and then of channels, gates where they belong."""
    of_tokens, of_channels = NAMED[name]
    tokens = list(torch.randn(of_tokens, 2, 12, 3).double())
    if name in GATES:
        gate = tokens[GATES[name]].sigmoid()
        tokens[GATES[name]] = gate if name == "glru" else gate.log()
    return [*tokens, *torch.randn(of_channels, 3).double()]


@pytest.mark.parametrize("name", ["chunk_hgrn", "glru", "min_gru", "min_lstm", "gateloop", "lru",
                                  "rg_lru"])  # fmt: skip
def test_laws_of_the_named_ones(name: str) -> None:
    """Pieces are the whole, with gradients through the state between them; backwards is a flip."""
    leaves, call = [t.requires_grad_() for t in draw_named(name)], getattr(ops, name)

    def part(s: slice) -> list[torch.Tensor]:
        return [t[:, s] if t.dim() == 3 else t for t in leaves]

    whole, final = call(*leaves, output_final_state=True)
    first, middle = call(*part(slice(5)), output_final_state=True)
    second, last = call(*part(slice(5, None)), initial_state=middle, output_final_state=True)
    pieces = torch.cat([first, second], 1)
    close((pieces, last), (whole, final))
    upstream = [torch.randn_like(whole), torch.randn_like(final)]
    close(*(torch.autograd.grad(y, leaves, upstream) for y in ((pieces, last), (whole, final))))
    if name in ("lru", "rg_lru"):
        turned = [t.flip(1) if t.dim() == 3 else t for t in leaves]
        back = call(*turned, output_final_state=True, reverse=True)
        close((back[0].flip(1), back[1]), (whole, final))


def test_gradients_of_wide_gateloop() -> None:
    q, k, m, theta = (t.requires_grad_() for t in torch.randn(4, 1, 4, 1, 2).double())
    v, S = torch.randn(1, 4, 1, 3).double(), torch.randn(1, 1, 2, 3, dtype=torch.complex128)
    leaves = (q, k, v.requires_grad_(), m, theta, S.requires_grad_())

    def call(q, k, v, m, theta, S):  # type: ignore[no-untyped-def]
        return ops.gateloop(q, k, v, torch.nn.functional.logsigmoid(m), theta, S, True)

    assert torch.autograd.gradcheck(call, leaves)


def test_gradients_by_differences() -> None:
    x, a, h0 = (t[:, :4].detach().requires_grad_() for t in arguments(D=3, dtype=torch.complex128))
    h0 = h0.detach()[:, :3].requires_grad_()

    def run(x, a, h0):  # type: ignore[no-untyped-def]
        return ops.scan(x, a, h0, True, log=True)

    assert torch.autograd.gradcheck(run, (x, a, h0))


NAMED = {  # with the number of tensors of tokens and of channels
    "chunk_hgrn": (2, 0),
    "glru": (4, 0),
    "min_gru": (2, 0),
    "min_lstm": (3, 0),
    "gateloop": (5, 0),
    "lru": (1, 2),
    "rg_lru": (3, 1),
    "aft_simple": (3, 0),
}
GATES = {"chunk_hgrn": 1, "glru": 0, "gateloop": 3}  # which is the gate, or its logarithm


@pytest.mark.parametrize("name", NAMED)
def test_gradients_of_the_named_ones(name: str) -> None:
    def call(*x):  # type: ignore[no-untyped-def]
        y = getattr(ops, name)(*x)
        y = y[0] if isinstance(y, tuple) else y
        return torch.view_as_real(y) if y.is_complex() else y

    leaves = [t[:1, :4] if t.dim() == 3 else t for t in draw_named(name)]
    assert torch.autograd.gradcheck(call, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("size", [30.0, 100.0, 1000.0])
def test_rg_lru_with_gates_of_any_size(size: float) -> None:
    """Decays from e^0 to below e^-100, against fp64; slopes of the root up to its bound."""
    x, i, r = torch.randn(3, 1, 70, 24)
    param = torch.linspace(-20, 20, 24)  # -8 softplus from -1e-8 to -160
    leaves = [t.requires_grad_() for t in (x, size * i, size * r, param)]
    leaves = [t.detach().requires_grad_() for t in leaves]
    h, state = ops.rg_lru(*leaves, output_final_state=True)
    grads = torch.autograd.grad(h.sum() + state.sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want, last = ops.rg_lru(*wide, output_final_state=True)
    close((h, state), (want.float(), last.float()), rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in grads)
    rate = -8 * torch.nn.functional.softplus(wide[3])
    close((want, last), reference.rg_lru(*wide[:3], rate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_operator_is_well_formed(dtype: torch.dtype) -> None:
    x, a, h0 = (t.requires_grad_() for t in arguments(T=5, D=4, dtype=dtype))
    cu = torch.tensor([0, 2, 5])
    torch.library.opcheck(torch.ops.lsm.scan_fwd, (x, a, h0, None, None, True, False, True))
    torch.library.opcheck(torch.ops.lsm.scan_fwd, (x[:1], a[:1], h0, cu, None, False, True, False))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.lsm.scan_step, (x[:, 0], a[:, 0], h0.clone(), False))
    if not dtype.is_complex:
        c = -torch.rand(4).requires_grad_()
        torch.library.opcheck(torch.ops.lsm.rg_lru_fwd, (x, a, x, c, h0, None, None, False, True))


def test_compiles_as_one_graph() -> None:
    x, a, h0 = (t.requires_grad_() for t in arguments(dtype=torch.float32))

    def loss(x, a, h0):  # type: ignore[no-untyped-def]
        h, state = ops.scan(x, a, h0, True, reverse=True)
        return h.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(*(torch.autograd.grad(f(x, a, h0), (x, a, h0)) for f in (compiled, loss)))


@pytest.mark.parametrize("name", NAMED)
def test_the_named_ones_compile_as_one_graph(name: str) -> None:
    leaves, call = [t.requires_grad_() for t in draw_named(name)], getattr(ops, name)

    def loss(*tensors):  # type: ignore[no-untyped-def]
        h = call(*tensors)[0]
        return (h * h.conj()).real.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss)))


def test_no_second_derivative() -> None:
    x, a, _ = (t.requires_grad_() for t in arguments())
    (grad,) = torch.autograd.grad(ops.scan(x, a)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="lsm::scan_bwd: the backward pass is itself not"):
        torch.autograd.grad(grad.sum(), a)


ERRORS = {
    "x must have shape [B, T, D], got [2, 37]": lambda x, a, h: ops.scan(x[..., 0], a),
    "a must have shape [B, T, D] = [2, 37, 12] like x, got [2, 36, 12]": lambda x, a, h: ops.scan(
        x, a[:, :-1]
    ),
    "a must have dtype bfloat16 like x, or float32, got float64": lambda x, a, h: ops.scan(
        x.bfloat16(), a
    ),
    "x must be bfloat16, float16, float32, float64, complex64 or complex128, got int64": (
        lambda x, a, h: ops.scan(x.long(), a.long())
    ),
    "a must be on cpu like x, got meta": lambda x, a, h: ops.scan(x, a.to("meta")),
    "initial_state must have shape [N, D] = [2, 12], got [1, 12]": lambda x, a, h: ops.scan(
        x, a, h[:1]
    ),
    "initial_state must have dtype float64, got float32": lambda x, a, h: ops.scan(x, a, h.float()),
    "order must be a permutation of 0 .. T - 1 = 36, got 0 at position 1": lambda x, a, h: ops.scan(
        x, a, order=torch.zeros(37).long()
    ),
    "order must have shape [T] = [37], got [3]": lambda x, a, h: ops.scan(
        x, a, order=torch.arange(3)
    ),
    "cu_seqlens must end at T = 37, got 36": lambda x, a, h: ops.scan(
        x[:1], a[:1], cu_seqlens=torch.tensor([0, 36])
    ),
    "state is updated in place and must be contiguous": lambda x, a, h: ops.scan_step(
        x[:, 0], a[:, 0], h.T.contiguous().T
    ),
    "r must have dtype float64 like x, got float32": lambda x, a, h: ops.rg_lru(
        x, a, a.float(), h[0]
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_is_wrong(message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ERRORS[message](*arguments())


@pytest.mark.parametrize("kind", ["row", "column", "zigzag", "hilbert"])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 5), (8, 8), (6, 2)])
def test_orders_are_permutations_along_neighbours(kind: str, size: tuple[int, int]) -> None:
    order = ops.scan_order(*size, kind).long()
    assert torch.equal(order.sort().values, torch.arange(size[0] * size[1]))
    rows, columns = order // size[1], order % size[1]
    jumps = rows.diff().abs() + columns.diff().abs()
    if kind == "zigzag" or (kind == "hilbert" and size in ((4, 4), (8, 8))):
        assert (jumps == 1).all()
    assert torch.equal(ops.scan_order(*size, kind, reverse=True).long(), order.flip(0))


def test_an_order_is_a_permuted_copy() -> None:
    x, a, h0 = arguments(T=15)
    order = ops.scan_order(3, 5, "hilbert")
    h, state = ops.scan(x, a, h0, True, order=order, reverse=True)
    back = order.long().flip(0)
    want = ops.scan(x[:, back], a[:, back], h0, True)
    close((h[:, back], state), want)


def test_order_errors() -> None:
    with pytest.raises(ValueError, match="kind must be one of row, column, zigzag, hilbert"):
        ops.scan_order(2, 2, "spiral")
    with pytest.raises(ValueError, match="must have tokens, got 0 x 2"):
        ops.scan_order(0, 2, "row")
