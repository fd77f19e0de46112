"""FLA's feature map file as an oracle, where FLA is: its modules without its kernels."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch.nn.functional as F
from peers import fla_folder

FLA = fla_folder()
needs_fla = pytest.mark.skipif(FLA is None, reason="flash-linear-attention not found")


def load_fla_maps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``fla.modules.feature_map``, with PyTorch for the Triton functions it imports."""
    stand_ins = {
        "fla": {},
        "fla.modules": {},
        "fla.modules.activations": {
            "fast_gelu_impl": lambda x: F.gelu(x, approximate="tanh"),
            "sigmoid": F.sigmoid,
            "sqrelu": lambda x: F.relu(x).square(),
            "swish": F.silu,
        },
        "fla.modules.layernorm": {
            "layer_norm": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias)
        },
        "fla.utils": {"checkpoint": lambda f: f},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    assert FLA is not None
    path = FLA / "modules" / "feature_map.py"
    spec = importlib.util.spec_from_file_location("fla_feature_map", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
