"""FLA's feature map file as an oracle, where it is unpacked: its modules without its kernels."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch.nn.functional as F

# fla-core and flash-linear-attention 0.6.0, both unzipped into this folder.
FLA_DIR = os.environ.get("LSM_FLA_DIR", "")

needs_fla = pytest.mark.skipif(not FLA_DIR, reason="LSM_FLA_DIR does not name FLA's sources")


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
    path = Path(FLA_DIR) / "fla" / "modules" / "feature_map.py"
    spec = importlib.util.spec_from_file_location("fla_feature_map", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
