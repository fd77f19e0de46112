"""State space layers and the sLSTM layer: definitions, steps, padding, other people's code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lsm_cuda.cache import Cache
from lsm_cuda.layers import DSS, S4, S4D, SLSTM

D = 8
LAYERS = {
    "s4d": (S4D, {"d_state": 6}),
    "s4d bilinear": (S4D, {"d_state": 6, "init": "legs", "disc": "bilinear"}),
    "dss": (DSS, {"d_state": 5}),
    "dss softmax": (DSS, {"d_state": 5, "variant": "softmax", "max_length": 20}),
    "s4": (S4, {"d_state": 6}),
    "s4 fout": (S4, {"d_state": 6, "basis": "fout"}),
    "slstm": (SLSTM, {"num_heads": 2}),
    "slstm bare": (SLSTM, {"num_heads": 1, "conv1d_kernel_size": 0}),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    cls, options = LAYERS[name]
    layer = cls(hidden_size=D, layer_idx=0, **options).double()
    if isinstance(layer, SLSTM):
        with torch.no_grad():
            layer.slstm_cell._recurrent_kernel_.normal_(std=0.3)
            layer.group_norm.weight.normal_(std=0.3)
    return layer


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@every_layer
@torch.no_grad()
def test_steps_and_pieces_are_the_whole(name):
    layer, x, cache = make(name), tokens(2, 12), Cache()
    whole = layer(x)[0]
    parts = [
        layer(x[:, a:b], past_key_values=cache, use_cache=True)[0]
        for a, b in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12))
    ]
    close(torch.cat(parts, 1), whole)
    assert cache.get_seq_length() == 12


@every_layer
@torch.no_grad()
def test_padding_and_packing_change_nothing(name):
    layer, x = make(name), tokens(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :4] = 0
    padded, cache = Cache(), Cache()
    y = layer(x, attention_mask=mask, past_key_values=padded, use_cache=True)[0]
    close(y[:1, 4:], layer(x[:1, 4:])[0])
    close(y[1:], layer(x[1:])[0])
    layer(x[1:], past_key_values=cache, use_cache=True)
    for a, b in zip(padded[0].tensors(), cache[0].tensors(), strict=True):
        close(a[1:], b)
    packed = torch.cat([x[:1, 4:], x[1:]], 1)
    out = layer(packed, cu_seqlens=torch.tensor([0, 5, 14]))[0]
    close(out, torch.cat([y[:1, 4:], y[1:]], 1))


@every_layer
def test_gradients_reach_every_parameter(name):
    layer = make(name)
    layer(tokens(2, 7))[0].square().sum().backward()
    for key, p in layer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


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
