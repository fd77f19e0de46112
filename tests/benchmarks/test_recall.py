"""The recall benchmark runs on what ``lsm train`` writes."""

from __future__ import annotations

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
    done = script("recall", tmp_path / "run", "--tokens", 192, "--data", text)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()[2:]]
    share = {row[0].strip(): float(row[2].strip().rstrip("%")) for row in rows}
    assert len(share) == 13 and share["best blocks of rows"] >= share["random blocks"]
