"""Trains a small byte-level model on a text file and saves it.

python examples/train_tiny.py my.txt --out run
"""

import argparse
from pathlib import Path

import torch

from lsm_cuda.data import load_corpus
from lsm_cuda.models import MIXERS, DecoderLM, ModelConfig
from lsm_cuda.train import TrainConfig, Trainer, bits_per_byte, pick_device


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a text file, or a folder of them")
    parser.add_argument("--out", type=Path, default=Path("run"))
    parser.add_argument("--mixer", default="gla", choices=MIXERS)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = DecoderLM(
        ModelConfig(hidden_size=options.hidden_size, num_layers=options.layers, mixer=options.mixer)
    )
    corpus = load_corpus(options.data)
    config = TrainConfig(steps=options.steps, context=options.context)
    trainer = Trainer(model.to(pick_device()), corpus, config)
    trainer.run(
        lambda p: print(f"step {p.step:5d}  loss {p.loss:.3f}  {p.tokens_per_second:.0f}/s")
    )
    bits = bits_per_byte(model, corpus.held_out, options.context)
    print(f"held-out: {bits:.3f} bits per byte")
    trainer.save(options.out)
    print(f"saved to {options.out}")


if __name__ == "__main__":
    main()
