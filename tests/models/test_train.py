"""Training: it learns, and it continues exactly where it stopped."""

from __future__ import annotations

import math

import pytest
import torch

from lsm_cuda.data import Corpus, DataError
from lsm_cuda.models import CheckpointError, DecoderLM, ModelConfig
from lsm_cuda.train import TrainConfig, Trainer, bits_per_byte, pick_device

pytest.importorskip("safetensors")

TEXT = torch.tensor(list(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8)
CORPUS = Corpus(TEXT, TEXT[:400], "a fox")


def trainer(**options) -> Trainer:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        mixer_options={"use_short_conv": True},
    )
    defaults = {"steps": 12, "batch_size": 4, "context": 32, "warmup": 4, "lr": 1e-2}
    return Trainer(DecoderLM(config), CORPUS, TrainConfig(**{**defaults, **options}))


def test_training_learns():
    run = trainer(steps=60)
    before = bits_per_byte(run.model, CORPUS.held_out, 32)
    run.run()
    after = bits_per_byte(run.model, CORPUS.held_out, 32)
    assert before == pytest.approx(8, abs=1) and after < 3.5
    assert run.finished and len(run.losses) == 60


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole = trainer()
    whole.run()
    first = trainer()
    first.run(stop=lambda: len(first.losses) == 5)
    assert not first.finished
    first.save(tmp_path)
    second = Trainer.resume(tmp_path, lambda data: CORPUS)
    assert second.losses == first.losses and second.seconds == first.seconds
    second.run()
    assert second.losses == whole.losses
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_more_steps_on_resume(tmp_path):
    run = trainer(steps=3)
    run.run()
    run.save(tmp_path)
    assert Trainer.resume(tmp_path, lambda data: CORPUS).finished
    more = Trainer.resume(tmp_path, lambda data: CORPUS, steps=5)
    more.run()
    assert len(more.losses) == 5


def test_time_ends_the_schedule():
    run = trainer(steps=10**6, max_seconds=1e-6)
    run.run()
    assert len(run.losses) == 1


def test_learning_rate_rises_then_falls():
    run, rates = trainer(steps=40), []
    run.run(lambda progress: rates.append(run.optimizer.param_groups[0]["lr"]))
    peak = rates.index(max(rates))
    assert 3 <= peak <= 6
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3, rel=0.1)


def test_bits_per_byte_of_a_uniform_model():
    model = trainer().model
    with torch.no_grad():
        model.embeddings.weight.zero_()
    assert bits_per_byte(model, CORPUS.held_out, 32) == pytest.approx(math.log2(256), abs=1e-5)


def test_damaged_training_state(tmp_path):
    run = trainer(steps=2)
    run.run()
    run.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.pt",
    ]
    state, good = tmp_path / "training.pt", (tmp_path / "training.pt").read_bytes()

    def refuse(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            Trainer.resume(tmp_path, lambda data: CORPUS)

    state.write_bytes(good[: len(good) // 2])
    refuse("training.pt: not a readable training state")
    torch.save([1], state)
    refuse("training.pt: expected a training state, got list")
    torch.save({"config": {}}, state)
    refuse("training.pt: not a training state of this model")
    trainer(steps=2).save(tmp_path / "other")
    state.write_bytes((tmp_path / "other" / "training.pt").read_bytes())
    refuse("training.pt: is of step 0, but model.safetensors of step 2")
    state.unlink()
    refuse("training.pt: missing; this checkpoint holds a model, but no training")


def test_a_save_that_is_cut_off_leaves_the_old_one(tmp_path, monkeypatch):
    run = trainer()
    run.step()
    run.save(tmp_path)
    run.step()

    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        run.save(tmp_path)
    monkeypatch.undo()
    assert len(Trainer.resume(tmp_path, lambda data: CORPUS).losses) == 1


def test_errors():
    with pytest.raises(DataError, match="a fox: 1800 bytes of training text, but one window takes"):
        trainer(context=1800)
    with pytest.raises(DataError, match="a fox: 400 bytes of held-out text"):
        trainer(context=400)
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpuu'"):
        pick_device("tpuu")
    if not torch.cuda.is_available():
        assert pick_device() == torch.device("cpu")
        with pytest.raises(ValueError, match="device cuda: no GPU"):
            pick_device("cuda")
