"""The scripts under examples/ run, and do what they say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file

from lsm_cuda.models import DecoderLM, ModelConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_and_generate(tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    sizes = ["--hidden-size", "16", "--layers", "1", "--context", "32", "--steps", "2"]
    script("train_tiny").main([str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *sizes])
    script("generate").main([str(tmp_path / "run"), "--prompt", "the ", "--tokens", "5"])
    printed = capsys.readouterr().out
    assert "step     2" in printed and "bits per byte" in printed
    assert "\nthe " in printed


def test_fla_checkpoint(tmp_path: Path, capsys) -> None:
    """Names as FLA's GLAForCausalLM writes them, an output layer of its own."""
    torch.manual_seed(0)
    options = {"expand_k": 0.5, "num_kv_heads": 2, "use_short_conv": True, "norm_eps": 1e-6}
    model = DecoderLM(
        ModelConfig(
            vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, mixer_options=options,
            intermediate_size=48,
        )
    ).eval()  # fmt: skip
    head = torch.randn(37, 32)
    theirs = {f"model.{name}": t.clone() for name, t in model.state_dict().items()}
    save_file(theirs | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    config = {
        "model_type": "gla", "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2,
        "num_heads": 4, "hidden_ratio": 4, "intermediate_size": 48, **options,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    example = script("load_fla_checkpoint")
    loaded, own_head = example.load(tmp_path)
    ids = torch.randint(37, (2, 9))
    with torch.no_grad():
        x = model.embeddings(ids)
        for layer in model.layers:
            x = layer(x)
    expected = model.norm(x) @ head.T
    torch.testing.assert_close(example.logits(loaded, own_head, ids), expected)
    example.main([str(tmp_path)])
    assert "parameters" in capsys.readouterr().out
