"""The command line: what it prints, how it fails, how it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("safetensors")

from typer.testing import CliRunner

import lsm_cuda
from lsm_cuda.cli.app import app

TINY = ["--hidden-size", "32", "--layers", "1", "--heads", "2", "--context", "32"]
TINY += ["--batch-size", "2"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"all work and no play makes jack a dull boy\n" * 100)
    return path


def lsm(*arguments: object):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_help_has_examples():
    assert "train" in lsm("--help").output
    for command in ("info", "train", "generate", "demo"):
        output = lsm(command, "--help").output
        assert f"lsm {command}" in output and "Example" in output, output


def test_info_shows_build_info():
    output = lsm("info").output
    assert "libraries: _C" in output and "loaded" in output
    assert lsm_cuda.build_info()["torch"] in output


def test_train_resume_generate(tmp_path, data):
    out = tmp_path / "run"
    result = lsm("train", "--data", data, "--out", out, "--steps", 20, *TINY)
    assert result.exit_code == 0, result.output
    assert "step 20" in result.output and "tokens/s" in result.output
    assert "held-out bits per byte" in result.output

    result = lsm("train", "--data", data, "--out", out, *TINY)
    assert result.exit_code == 1
    assert "holds a checkpoint; continue it with --resume" in result.stderr

    result = lsm("train", "--resume", "--out", out, "--steps", 25)
    assert result.exit_code == 0 and "step 25" in result.output

    first = lsm("generate", out, "--prompt", "all work", "--tokens", 20, "--seed", 3)
    again = lsm("generate", out, "--prompt", "all work", "--tokens", 20, "--seed", 3)
    other = lsm("generate", out, "--prompt", "all work", "--tokens", 20, "--seed", 4)
    assert first.exit_code == 0 and first.output.startswith("all work")
    assert first.output == again.output != other.output


def one_line(result, text: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert text in result.stderr
    assert "Traceback" not in result.output


def test_bad_input_is_one_line(tmp_path):
    out = ["--out", tmp_path / "run"]
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("hello")
    one_line(lsm("train", *out, "--data", tmp_path / "no"), "no: no such file or folder")
    one_line(lsm("train", *out, "--data", tmp_path / "empty"), "empty: no text in it to train on")
    one_line(lsm("train", *out, "--data", tmp_path / "short"), "bytes of training text, but one")
    one_line(lsm("train", *out, "--mixer", "glaa"), "unknown mixer 'glaa', expected one of")
    one_line(lsm("train", *out, "--device", "tpuu"), "device must be auto, cpu or cuda")
    one_line(lsm("train", *out, "--resume"), "run: no such checkpoint folder")
    one_line(lsm("generate", tmp_path / "no"), "no: no such checkpoint folder")
    one_line(lsm("generate", tmp_path, "--prompt", ""), "the prompt is empty")
    one_line(lsm("generate", tmp_path, "--top-p", "7"), "top_p must be in (0, 1], got 7.0")
    one_line(lsm("demo", "--data", tmp_path / "no"), "no: no such file or folder")
    assert not (tmp_path / "run").exists()


def test_corrupt_checkpoint_is_one_line(tmp_path, data):
    out = tmp_path / "run"
    lsm("train", "--data", data, "--out", out, "--steps", 1, *TINY)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    one_line(lsm("generate", out), "model.safetensors: not a readable safetensors file")
    one_line(lsm("train", "--resume", "--out", out), "not a readable safetensors file")


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_a_checkpoint(tmp_path, data, number):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "lsm_cuda.cli", "train", "--data", str(data)]
    command += ["--out", str(out), "--steps", "1000000", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out / "training.pt").exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)  # from the checkpoint of step 0 on, signals are waited for
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "continue with: lsm train --resume" in output
    from lsm_cuda.data import load_corpus
    from lsm_cuda.train import Trainer

    resumed = Trainer.resume(out, load_corpus)
    done = len(resumed.losses)
    assert done > 0 and not list(out.glob("*.partial"))
    resumed.step()
    assert len(resumed.losses) == done + 1


def test_missing_extra_is_named(tmp_path):
    """Without typer, the entry point says what to install."""
    code = "import sys; sys.modules['typer'] = None; import lsm_cuda.cli as c; sys.exit(c.main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == (
        "lsm: the command line needs the typer package: pip install 'lsm-cuda[cli]'\n"
    )


def test_missing_safetensors_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = lsm("train", "--data", data, "--out", tmp_path / "run", *TINY)
    one_line(result, "safetensors package: pip install 'lsm-cuda[cli]'")
