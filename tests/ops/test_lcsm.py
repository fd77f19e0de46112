"""The switchboard: every setting is the operator that it says, and its definition."""

from __future__ import annotations

import pytest
import torch
from families import Call_, Family, assert_rule, definition, gradients
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid, silu, softplus

from lsm_cuda import ops, reference

B, T, H, HV, K, V = 2, 21, 2, 4, 6, 5
SHAPES = {
    "e": (B, T, H, K),
    "i": (B, T, HV, V),
    "s": (B, T, H, K),
    "head": (HV,),
    "token": (B, T, HV),
    "keys": (B, T, HV, K),
    "values": (B, T, HV, V),
}


def draw(name: str, gate: bool = False) -> Tensor:
    rng = torch.Generator().manual_seed(len(name))
    x = torch.randn(SHAPES[name], generator=rng)
    return -x.abs() / 4 if gate else x


# o, ov; the operator that the setting is, given q, k, v and these gates
SETTINGS = {
    "none": (None, None, lambda q, k, v: ops.chunk_linear_attn(q, k, v, 1.0, normalize=False)),
    "constant": (
        "head",
        None,
        lambda q, k, v, g: ops.chunk_simple_gla(q, k, v, g_gamma=g, scale=1.0),
    ),
    "scalar": ("token", None, lambda q, k, v, g: ops.chunk_simple_gla(q, k, v, g, scale=1.0)),
    "keys": ("keys", None, lambda q, k, v, g: ops.chunk_gla(q, k, v, g, scale=1.0)),
    "values": (None, "values", lambda q, k, v, gv: ops.chunk_gla(q, k, v, gv=gv, scale=1.0)),
    "matrix": (
        "keys",
        "values",
        lambda q, k, v, g, gv: ops.chunk_gla(q, k, v, g, gv=gv, scale=1.0),
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_setting_is_its_operator(setting: str) -> None:
    *names, operator = SETTINGS[setting]
    e, i, s = (draw(n) for n in "eis")
    o, ov = (None if n is None else draw(n, gate=True) for n in names)
    y, _ = ops.chunk_lcsm(e, i, s, o, ov)
    gates = [g for g in (o, ov) if g is not None]
    assert torch.equal(y, operator(s, e, i, *gates)[0])


@pytest.mark.parametrize(
    ("oscillate", "decay"),
    [
        ("sigmoid", sigmoid),
        ("softplus", lambda x: (-softplus(x)).exp()),
        ("exp", lambda x: (-x.exp()).exp()),
    ],
)
@pytest.mark.parametrize("o", ["head", "token", "keys"])
def test_oscillations_and_activations(oscillate: str, decay, o: str) -> None:
    options = {"expand": "silu", "insert": "sigmoid", "shrink": "relu", "oscillate": oscillate}
    functions = {"expand": silu, "insert": sigmoid, "shrink": relu, "oscillate": decay}
    x = Call_({n: draw(n) for n in "eis"} | {"o": draw(o)}, (torch.randn(B, HV, K, V),))
    family = Family(
        "lcsm",
        lambda **rest: ops.chunk_lcsm(**rest, **options, output_final_state=True),
        ops.lcsm_step,
        lambda **rest: reference.lcsm(**rest, **functions),
        {},
    )
    assert_rule(gradients(family.chunk, family, x), definition(family, x), x)


def test_complement_is_hgrn2() -> None:
    q, v, g = draw("s"), draw("i")[:, :, :H], draw("keys")[:, :, :H]
    y, _ = ops.chunk_lcsm(None, v, q, g, oscillate="sigmoid")
    assert torch.equal(y, ops.chunk_hgrn2(q, v, logsigmoid(g), scale=1.0)[0])


def test_errors() -> None:
    e, i, s = (draw(n) for n in "eis")
    with pytest.raises(ValueError, match="oscillate must be one of log, sigmoid, softplus, exp"):
        ops.chunk_lcsm(e, i, s, oscillate="tanh")
    with pytest.raises(ValueError, match="unknown activation 'cube'"):
        ops.chunk_lcsm(e, i, s, expand="cube")
    with pytest.raises(ValueError, match="e None needs o with key channels"):
        ops.chunk_lcsm(None, i, s, draw("token"))
    with pytest.raises(ValueError, match=r"ov needs o with key channels, or none, got \[4\]"):
        ops.chunk_lcsm(e, i, s, draw("head"), draw("values"))
    with pytest.raises(RuntimeError, match=r"o must have shape \[HV\] = \[4\], got \[3\]"):
        ops.chunk_lcsm(e, i, s, torch.zeros(3))
