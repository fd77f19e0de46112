"""State space layers and the sLSTM layer: definitions, steps, padding, other people's code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recurrent_layers import D, close, make, tokens

from lsm_cuda.layers import DSS, LMU, SLSTM
from lsm_cuda.ops import diagonal_kernel, discretize_diagonal, h3


def test_s4d_is_the_published_layer():
    """Its kernel as the authors' minimal code writes it, with the parameters under their names."""
    layer, x = make("s4d"), tokens(2, 11)
    w = layer.state_dict()
    assert set(w) == {
        "D", "kernel.C", "kernel.log_dt", "kernel.log_A_real", "kernel.A_imag",
        "output_linear.0.weight", "output_linear.0.bias",
    }  # fmt: skip
    dt = w["kernel.log_dt"].exp()
    A = -w["kernel.log_A_real"].exp() + 1j * w["kernel.A_imag"]
    dtA = A * dt[:, None]
    C = torch.view_as_complex(w["kernel.C"]) * (dtA.exp() - 1) / A
    K = 2 * torch.einsum("hn,hnl->hl", C, (dtA[..., None] * torch.arange(11)).exp()).real
    u = x.transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(K, 22) * torch.fft.rfft(u, 22), 22)[..., :11]
    y = F.gelu(y + u * w["D"][:, None])
    z = torch.einsum("oh,bht->bot", w["output_linear.0.weight"][..., 0], y)
    y = F.glu(z + w["output_linear.0.bias"][:, None], dim=1)
    close(layer(x)[0], y.transpose(1, 2))


def behind(w: dict, y: torch.Tensor) -> torch.Tensor:
    """GELU and the gated projection, of outputs ``[B, T, H]``."""
    y = F.gelu(y) @ w["output_linear.0.weight"][..., 0].T + w["output_linear.0.bias"]
    return F.glu(y, -1)


def over_time(A, B, C, D, x, pairs: bool = True) -> torch.Tensor:
    """A diagonal system, or with A [H, N, N] a dense one, token by token."""
    state, out = torch.zeros(x.shape[0], *B.shape, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        moved = A * state if A.dim() == 2 else torch.einsum("hmn,bhn->bhm", A, state)
        state = moved + B * x[:, t, :, None]
        out.append((2 if pairs else 1) * (C * state).sum(-1).real + D * x[:, t])
    return torch.stack(out, 1)


def eigenvalues(w: dict, prefix: str = "kernel.") -> tuple[torch.Tensor, torch.Tensor]:
    A = -w[f"{prefix}log_A_real"].exp() + 1j * w[f"{prefix}A_imag"]
    return A, w[f"{prefix}log_dt"].exp()


@pytest.mark.parametrize("basis", ["legs", "fout"])
def test_s4_is_its_definition(basis):
    """The bilinear rule, by an inverse, and the recurrence with the dense matrix."""
    layer, x = make("s4" if basis == "legs" else "s4 fout"), tokens(2, 11)
    w = layer.state_dict()
    lam, dt = eigenvalues(w, "")
    P, B, C = (torch.view_as_complex(w[n]) for n in "PBC")
    A = torch.diag(lam) - P.T @ P.conj()
    half = dt[:, None, None] / 2 * A
    eye = torch.eye(6, dtype=A.dtype)
    inverse = torch.linalg.inv(eye - half)
    y = over_time(inverse @ (eye + half), dt[:, None] * (inverse @ B), C, w["D"], x, pairs=False)
    close(layer(x)[0], behind(w, y))


@pytest.mark.parametrize("variant", ["exp", "softmax"])
def test_dss_is_its_definition(variant):
    layer, x = make("dss" if variant == "exp" else "dss softmax"), tokens(2, 11)
    w = layer.state_dict()
    A, dt = eigenvalues(w)
    step = dt[:, None] * A
    factor = (step.exp() - 1) / A
    if variant == "softmax":
        factor = 1 / (step[..., None] * torch.arange(20)).exp().sum(-1)
    C = torch.view_as_complex(w["kernel.C"])
    close(layer(x)[0], behind(w, over_time(step.exp(), factor, C, w["D"], x, pairs=False)))


def test_liquid_s4_is_its_definition():
    layer, x = make("liquid-s4"), tokens(2, 11)
    w = layer.state_dict()
    A, dt = eigenvalues(w)
    step, C = dt[:, None] * A, torch.view_as_complex(w["kernel.C"])
    B, state, out = (step.exp() - 1) / A, torch.zeros(2, *A.shape, dtype=A.dtype), []
    for t in range(11):
        drive = B * x[:, t, :, None]
        state = (step.exp() + drive) * state + drive
        out.append(2 * (C * state).sum(-1).real + w["D"] * x[:, t])
    close(layer(x)[0], behind(w, torch.stack(out, 1)))


def test_h3_is_its_definition():
    """By the operator, whose shift filter has the taps in the order of time and a skip apart."""
    layer, x = make("h3"), tokens(2, 11)
    w = layer.state_dict()
    q, k, v = (x @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "qkv")
    taps = w["shift.weight"][:, 0].flip(1)
    shift = torch.cat([torch.zeros_like(taps[:, :1]), taps[:, 1:]], 1)
    A, dt = layer.kernel.eigenvalues(), w["kernel.log_dt"].exp()
    log_A, factor = discretize_diagonal(A, dt)
    kernel = diagonal_kernel(log_A, factor * torch.view_as_complex(w["kernel.C"]), 11)
    y = h3(q, k, v, shift, kernel, taps[:, 0], w["D"])
    close(layer(x)[0], y @ w["o_proj.weight"].T + w["o_proj.bias"])


def test_lmu_remembers_a_window():
    """Read with the polynomials' values at an age, a smooth input comes back that much later."""
    theta, N, T, age = 20.0, 10, 60, 8.0
    layer = LMU(1, d_state=N, theta=theta, layer_idx=0).double()
    x = torch.sin(0.1 * torch.arange(T, dtype=torch.float64))[None, :, None]
    legendre, z = [1.0, 2 * age / theta - 1], 2 * age / theta - 1
    for n in range(1, N - 1):
        legendre.append(((2 * n + 1) * z * legendre[n] - n * legendre[n - 1]) / (n + 1))
    with torch.no_grad():
        layer.C.copy_(torch.tensor(legendre)[None])
        layer.D.zero_()
        y = layer._system(x, _Whole())
    # an input held over a step is half a step old
    expected = torch.sin(0.1 * (torch.arange(T, dtype=torch.float64) - age + 0.5))
    torch.testing.assert_close(y[0, 25:, 0], expected[25:], atol=0.02, rtol=0)


class _Whole:
    """A call without a cache."""

    def run(self, chunk, step, *tensors, **options):
        return chunk(*tensors, **options)[0]


def test_slstm_is_the_layer_of_xlstm():
    module = pytest.importorskip("xlstm.blocks.slstm.layer")
    config = module.sLSTMLayerConfig(
        embedding_dim=D, num_heads=2, backend="vanilla", dtype="float32",
        enable_automatic_mixed_precision=False,
    )  # fmt: skip
    theirs, ours = module.sLSTMLayer(config), make("slstm").float()
    state = ours.state_dict()
    # Their plain cell keeps its weights by gate, the CUDA cell as ours.
    cell = {k: state.pop(k) for k in list(state) if k.startswith("slstm_cell")}
    kernel = cell["slstm_cell._recurrent_kernel_"].view(2, D // 2, 4, D // 2)
    plain = {
        "slstm_cell._recurrent_kernel_": kernel.permute(0, 2, 3, 1).reshape(2, -1, D // 2),
        "slstm_cell._bias_": cell["slstm_cell._bias_"].view(2, 4, D // 2).transpose(0, 1).flatten(),
    }
    theirs.load_state_dict({**state, **plain})
    x = torch.randn(2, 9, D)
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="DSS: variant must be exp or softmax, got 'max'"):
        DSS(D, variant="max")
    with pytest.raises(ValueError, match="multiple of num_heads, got 8 and 3"):
        SLSTM(D, num_heads=3)
