"""The recall benchmark runs on what ``lsm train`` writes."""

from __future__ import annotations

import json

import torch
from bench_scripts import script

from lsm_cuda.models import DecoderLM, ModelConfig
from lsm_cuda.models.checkpoint import save_model


def test_it_runs(tmp_path):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, mixer="attention")
    save_model(DecoderLM(config), tmp_path / "run")
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy.\n" * 200)
    done = script(
        "recall", tmp_path / "run", "--tokens", 192, "--data", text, "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "recall.json").read_text())
    share = {row["method"]: row["mean"] for row in record["rows"]}
    assert len(share) == 26 and share["best blocks of rows"] >= share["random blocks"]
    read = {row["method"]: row["pairs"] for row in record["rows"] if row["kind"] == "cache"}
    assert len(read) == 12 and all(0 < pairs < 0.9 for pairs in read.values())
    assert all(0 < row["worst"] <= row["mean"] <= 1.0001 for row in record["rows"])
    assert record["model"]["num_layers"] == 1 and record["tokens"] == 192
    assert all(method in done.stdout for method in share)
