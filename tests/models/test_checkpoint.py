"""Checkpoints: what is saved comes back; what is damaged is named."""

from __future__ import annotations

import json

import pytest
import torch

from lsm_cuda.models import CheckpointError, DecoderLM, ModelConfig, load_model, save_model

pytest.importorskip("safetensors")


@pytest.fixture
def folder(tmp_path):
    config = ModelConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        mixer_options={"use_short_conv": True},
    )
    save_model(DecoderLM(config), tmp_path / "run")
    return tmp_path / "run"


def test_round_trip(folder):
    model = load_model(folder)
    again = folder.parent / "deeper" / "again"
    save_model(model, again)
    copy = load_model(again)
    assert copy.config == model.config
    assert all(
        torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True)
    )
    assert sorted(p.name for p in again.iterdir()) == ["config.json", "model.safetensors"]


def refuse(folder, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_model(folder)


def test_nothing_there(folder):
    refuse(folder / "no", "no: no such checkpoint folder")
    (folder / "model.safetensors").unlink()
    refuse(folder, "model.safetensors: missing")
    (folder / "config.json").unlink()
    refuse(folder, "config.json: missing")


def test_cut_off_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refuse(folder, "model.safetensors: not a readable safetensors file")
    weights.write_bytes(b"")
    refuse(folder, "model.safetensors: not a readable safetensors file")


def test_damaged_config(folder):
    config = folder / "config.json"
    good = config.read_text()
    for bad, text in (
        (good[:-20], "config.json: not valid JSON"),
        ("[1]", "config.json: expected a JSON object, got list"),
        (json.dumps({**json.loads(good), "depth": 1}), "unknown config entries: depth"),
        (json.dumps({**json.loads(good), "mixer": "glu"}), "config.json: unknown mixer 'glu'"),
        (json.dumps({**json.loads(good), "hidden_size": "x"}), "config.json: "),
    ):
        config.write_text(bad)
        refuse(folder, text)


def test_config_and_weights_that_do_not_fit(folder):
    config = folder / "config.json"
    good = json.loads(config.read_text())
    for change, text in (
        ({"num_layers": 2}, r"model.safetensors: lacks layers.1.* and \d+ more"),
        ({"num_layers": 0}, "model.safetensors: has layers.0.*does not ask for"),
        ({"hidden_size": 64}, r"model.safetensors: embeddings.weight has shape \[256, 32\]"),
    ):
        config.write_text(json.dumps({**good, **change}))
        refuse(folder, text)
