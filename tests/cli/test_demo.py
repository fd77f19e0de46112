"""The demo in small: every part runs, numbers and picture are written."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

from rich.console import Console

from lsm_cuda.cli.demo import DemoConfig, run_demo
from lsm_cuda.models import ModelConfig


def test_demo(tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes(b"all work and no play makes jack a dull boy\n" * 100)
    console = Console(record=True, width=200)
    config = DemoConfig(
        out=tmp_path / "demo",
        data=data,
        seconds=60,
        steps=5,
        batch_size=2,
        context=32,
        model=ModelConfig(hidden_size=32, num_layers=1, num_heads=2),
        contexts=(64, 128, 5000),
        timed_tokens=(2, 2),
        sample_length=20,
    )
    run_demo(config, console)  # its verdict on speed means nothing at two tokens each
    output = console.export_text()
    for part in ("held-out bits per byte: ", "GLA time per token, 5000 over 64", "plot: ", "def "):
        assert part in output
    assert (tmp_path / "demo" / "demo.png").read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert numbers["steps"] == 5 and numbers["contexts"] == [64, 128, 5000]
    gla, attention = numbers["gla"]["bytes"], numbers["attention"]["bytes"]
    assert len(set(gla)) == 1, "the recurrent state does not grow"
    assert attention[2] > attention[1] > attention[0]
    assert all(s > 0 for s in numbers["gla"]["seconds"] + numbers["attention"]["seconds"])
