"""Continues a prompt with a model that examples/train_tiny.py or `lsm train` saved.

python examples/generate.py run --prompt "import "
"""

import argparse
from pathlib import Path

import torch

from lsm_cuda.models import Sampling, load_model
from lsm_cuda.train import pick_device


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", default="import ")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    options = parser.parse_args(arguments)

    device = pick_device()
    model = load_model(options.model, device).eval()
    prompt = torch.tensor([list(options.prompt.encode())], device=device)
    sampling = Sampling(options.temperature, top_k=50)
    print(options.prompt, end="")
    # One token at a time: the cache is a state of fixed size, however long the text.
    for token in model.stream(prompt, options.tokens, sampling):
        print(bytes([int(token)]).decode(errors="replace"), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
