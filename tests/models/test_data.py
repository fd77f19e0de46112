"""Corpora: what is read, how it is split, and what is refused."""

from __future__ import annotations

import pytest
import torch

from lsm_cuda.data import DataError, load_corpus, sample_batch


def text(corpus_part: torch.Tensor) -> bytes:
    return bytes(corpus_part.tolist())


def test_standard_library_is_large_and_stable():
    corpus = load_corpus(max_bytes=2_000_000)
    assert 1_500_000 < corpus.train.numel() <= 2_001_000
    assert corpus.held_out.numel() > 10_000
    assert b"def " in text(corpus.train) and b'"""' in text(corpus.train)
    assert torch.equal(corpus.train, load_corpus(max_bytes=2_000_000).train)


def test_many_files_are_split_as_wholes(tmp_path):
    contents = [f"file {i} ".encode() * 50 for i in range(200)]
    for i, content in enumerate(contents):
        path = tmp_path / f"folder{i % 7}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    corpus = load_corpus(tmp_path)
    train, held_out = text(corpus.train), text(corpus.held_out)
    for content in contents:
        assert (content in train) != (content in held_out)
    assert 1 <= sum(c in held_out for c in contents) <= 30
    assert corpus.source == str(tmp_path)


def test_few_files_give_up_their_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 100)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "b.txt").write_bytes(b"b" * 200)
    corpus = load_corpus(tmp_path)
    assert sorted(text(corpus.train).split(b"\n")) == [b"a" * 95, b"b" * 190]
    assert sorted(text(corpus.held_out).split(b"\n")) == [b"a" * 5, b"b" * 10]


def test_a_file_may_be_binary_but_folders_are_read_as_text(tmp_path):
    (tmp_path / "image").write_bytes(b"\0" * 100)
    assert load_corpus(tmp_path / "image").train.numel() == 95
    (tmp_path / ".hidden").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="no text in it"):
        load_corpus(tmp_path)


def test_missing_and_empty(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no text in it to train on"):
        load_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty.txt: no text in it to train on"):
        load_corpus(tmp_path / "empty.txt")


def test_batches_are_windows_and_their_successors():
    data = torch.arange(200, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    x, y = sample_batch(data, 300, 8, generator)
    assert x.shape == y.shape == (300, 8) and x.dtype == torch.long
    assert torch.equal(y, x + 1)
    assert x.min() == 0 and y.max() == 199
