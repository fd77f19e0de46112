"""An operator under measurement: its arguments, and the bytes and FLOPs that no implementation can
avoid."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lsm_cuda
from lsm_cuda import reference
from lsm_cuda.ops.based import cut_features

__all__ = ["BLOCK", "CHOSEN", "MODES", "STRIDE", "WINDOW", "Inputs", "Op", "Shape", "first"]

Inputs = dict[str, Tensor]
MODES = ("forward", "training", "step")  # training: forward and backward; step: one more token
# Of sparse attention: tokens of a block and blocks of a query, and pooled keys to choose them by.
BLOCK, CHOSEN = 64, 16
WINDOW, STRIDE = 32, 16


@dataclass(frozen=True)
class Shape:
    """Sizes by name, as in ``"B8 T4096 H16 K128 V128"``.

    ``packed``: so many sequences of unequal lengths share the T tokens of one row. HV, the value
    heads, and HKV, an attention's key heads, are H unless given; M, the slots, 64; W, the taps, G,
    the gates of an LSTM, and P, parts to merge, 4. N counts states, R windows of WINDOW tokens, F
    features of Based.
    """

    text: str
    packed: int = 0

    def __str__(self) -> str:
        return f"{self.text} packed {self.packed}" if self.packed else self.text

    @property
    def sizes(self) -> dict[str, int]:
        given = {name: int(n) for name, n in re.findall(r"([A-Z]+)(\d+)", self.text)}
        H, N = given.get("H", 1), self.packed or given["B"]
        windows = max(0, (given["T"] - WINDOW) // STRIDE + 1)
        implied = {"HV": H, "HKV": H, "M": 64, "G": 4, "W": 4, "P": 4, "N": N, "R": windows}
        _, parts, width = cut_features(given.get("K", 0), taylor=True)
        implied["F"] = parts * width
        return implied | given

    def __getitem__(self, name: str) -> int:
        return self.sizes[name]

    def dims(self, names: str) -> tuple[int, ...]:
        """Sizes of a tensor whose dimensions are ``names``, as in ``"B T H K"``."""
        return tuple(self[name] for name in names.split())

    def at(self, T: int) -> Shape:
        """The same at another length."""
        return Shape(re.sub(r"T\d+", f"T{T}", self.text), self.packed)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence of a row."""
        cuts = self.cu_seqlens()
        return [self["T"]] if cuts is None else cuts.diff().tolist()

    def cu_seqlens(self) -> Tensor | None:
        """Boundaries of the packed sequences: the n-th is about n times as long as the first."""
        if not self.packed:
            return None
        share = torch.arange(self.packed + 1, dtype=torch.float64).cumsum(0)
        return (share / share[-1] * self["T"]).round().to(torch.int32)


# How values are drawn, by the last word of an argument's dims; and its dtype, or that of the call.
Draw = tuple[Callable[[Tensor], Tensor], torch.dtype | None]
DRAWS: dict[str, Draw] = {
    "normal": (lambda x: x, None),
    "direction": (lambda x: F.normalize(x, dim=-1), None),
    "unit": (torch.sigmoid, None),
    "positive": (torch.exp, None),
    "gate": (lambda x: F.logsigmoid(x) / 16, torch.float32),  # log decays as in trained models
    "logits": (lambda x: x + 3, None),  # of gates that are mostly open
    "shut": (lambda x: x - 3, None),  # of decays, whose softplus then is small
    "rate": (lambda x: -x.exp(), torch.float32),  # A of state space models
    "score": (lambda x: x, torch.float32),  # a log-sum-exp
    "zero": (torch.zeros_like, torch.float32),  # an initial state
    # a matrix [.., K, G, K] that keeps the size of what is multiplied by it
    "matrix": (lambda x: x / x.shape[-1] ** 0.5, torch.float32),
    "step": (lambda x: F.softplus(x - 4), torch.float32),  # dt
}


def first(result: Any) -> Tensor:
    """The output, of functions that return states beside it."""
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@dataclass(frozen=True)
class Op:
    """An operator: its names in ``lsm_cuda.ops`` and ``lsm_cuda.reference``, and its arguments.

    ``inputs``: arguments in order, with their dims and, where it is not normal, how they are drawn;
    those with N are initial states, which a step has anyway. ``qkv``: which of them are queries,
    keys and values, if there are such. ``state``: dims of each state, matrices with four; in fp32,
    or in the dtype of the input ``state_like``. ``options``, ``step_options``: further arguments of
    ``chunk`` and ``step``; ``step_names``: names that differ in ``step``. ``adapt``: gives
    ``reference`` our arguments where it has others.
    """

    name: str
    chunk: str  # whole sequences
    step: str  # one token; empty if there is no such thing
    reference: str
    inputs: dict[str, str] = field(hash=False)
    qkv: tuple[str, ...] = ("q", "k", "v")
    output: str = "B T HV V"
    state: tuple[str, ...] = ("N HV K V",)
    state_like: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    step_options: dict[str, Any] = field(default_factory=dict, hash=False)
    step_names: dict[str, str] = field(default_factory=dict, hash=False)
    adapt: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda definition: definition
    engine: str = "chunk"  # whose SETS apply
    matrix: str = ""  # dims of what each token is multiplied by, of the engine slstm
    per_element: tuple[int, int] = (0, 0)  # FLOPs of an element of the first input, and backward
    result: Callable[[Any], Tensor] = first  # the output, of what ``chunk`` returns
    packs: bool = True  # whether it takes cu_seqlens
    cached = False  # whether a step reads T tokens
    trained = True

    @property
    def available(self) -> bool:
        """Whether this lsm_cuda has the operator; an older one, under comparison, may not."""
        return hasattr(lsm_cuda.ops, self.chunk) and hasattr(lsm_cuda.ops, self.step or self.chunk)

    @property
    def modes(self) -> tuple[str, ...]:
        """Of MODES, those there are."""
        there = {"forward": True, "training": self.trained, "step": bool(self.step)}
        return tuple(mode for mode in MODES if there[mode])

    def definition(self, x: Inputs) -> Tensor:
        """The output, by the reference."""
        return first(self.adapt(getattr(reference, self.reference))(**x))

    def dims(self, name: str) -> tuple[str, Draw]:
        """Dims of an input, and how it is drawn."""
        *names, last = self.inputs[name].split()
        if last in DRAWS:
            return " ".join(names), DRAWS[last]
        return self.inputs[name], DRAWS["normal"]

    def per_token(self, name: str) -> bool:
        return "T" in self.inputs[name].split()

    def is_state(self, name: str) -> bool:
        return "N" in self.inputs[name].split()

    def first_token(self, x: Tensor, dims: str) -> Tensor:
        """Of a tensor with such dims, time among them."""
        return x.select(dims.split().index("T"), 0)

    def stepped(self, output: Tensor) -> Tensor:
        """What a step gives, of the output of a sequence."""
        return self.first_token(output, self.output)

    def make(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
        """Arguments by name."""
        generator = torch.Generator(device).manual_seed(seed)
        made = {}
        for name in self.inputs:
            dims, (draw, own) = self.dims(name)
            x = torch.randn(shape.dims(dims), generator=generator, device=device)
            made[name] = draw(x).to(own or dtype)
        if (cu_seqlens := shape.cu_seqlens()) is not None:
            made["cu_seqlens"] = cu_seqlens.to(device)
        return made

    def sequence(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        """Arguments of ``chunk``."""
        return {**x, **self.options}

    def token(self, x: Inputs, shape: Shape) -> dict[str, Any]:
        """Arguments of ``step``: the first token of each input, and states of zeros."""
        token = {
            self.step_names.get(n, n): self.first_token(x[n], self.dims(n)[0]).contiguous()
            if self.per_token(n)
            else x[n]
            for n in self.inputs
            if not self.is_state(n)
        }
        return {**token, "state": self.states(x, shape), **self.step_options}

    def states(self, x: Inputs, shape: Shape) -> Tensor | tuple[Tensor, ...]:
        """One of zeros, or a tuple of them."""
        dtype = x[self.state_like].dtype if self.state_like else torch.float32
        device = next(iter(x.values())).device
        made = tuple(torch.zeros(shape.dims(d), device=device, dtype=dtype) for d in self.state)
        return made if len(made) > 1 else made[0]

    def affordable(self, shape: Shape, numbers: int) -> int:
        """Tokens whose states, which autograd keeps, are so many numbers; 1024 at most."""
        state = sum(prod(shape.dims(dims)) for dims in self.state) // shape["N"] * shape["B"]
        return min(1024, numbers // max(1, state))

    def minimal_bytes(self, shape: Shape, dtype: torch.dtype, mode: str) -> int:
        """Every input read once, every output written once, states of a step read and written.

        A backward reads the inputs and the gradient of the output and writes one gradient per
        input; training is forward and backward.
        """
        if mode == "training":
            return sum(self.minimal_bytes(shape, dtype, m) for m in ("forward", "backward"))
        step = mode == "step"
        token = shape.at(1) if step else shape
        read = sum(
            prod(token.dims(dims)) * (own or dtype).itemsize
            for name, (dims, (_, own)) in ((name, self.dims(name)) for name in self.inputs)
            if not (step and self.is_state(name))
        )
        output = prod(token.dims(self.output)) * dtype.itemsize
        if mode == "backward":
            return 2 * read + output
        states = sum(prod(token.dims(dims)) for dims in self.state) if step else 0
        return read + output + 2 * (dtype.itemsize if self.state_like else 4) * states

    def minimal_flops(self, shape: Shape, mode: str) -> int:
        """The fewer of two forms' multiply-adds, for each matrix state: by it, or by all pairs of
        tokens.

        By a state [K, V], a token is written to it and reads from it, 2 KV each; a backward
        rebuilds the state, keeps that of the gradients, and reads dq, dk and dv. By pairs, scores
        cost 2 K and outputs 2 V for each of the (T + 1) / 2 keys of a token; a backward makes
        scores, their gradients, dq, dk and dv. Scaling by decays is of lower order in either form.

        A delta rule's token reads the state once more, for what it erases: 2 KV, and 6 in a
        backward (again, its gradient, and what that takes from the state's); by pairs, scores with
        what is erased, and a sum of values for each, 2 K + 2 V, and 6 K + 6 V in a backward.

        The scan engine's states are numbers: each takes a multiply-add per token, and in a backward
        three, for itself, its gradient and the gate's (of a convolution, whose states are taps: its
        sum again, the input's and the tap's). What makes gates is not counted. An sLSTM's token is
        multiplied by ``matrix``, and in a backward its gradient is, and the matrix has one.
        """
        if mode == "training":
            return self.minimal_flops(shape, "forward") + self.minimal_flops(shape, "backward")
        tokens = shape["B"] * (1 if mode == "step" else shape["T"])
        if self.engine == "scan":
            numbers = sum(prod(shape.dims(dims.removeprefix("N "))) for dims in self.state)
            return tokens * numbers * (6 if mode == "backward" else 2)
        if self.matrix:
            return tokens * prod(shape.dims(self.matrix)) * (4 if mode == "backward" else 2)
        if any(self.per_element):
            elements = prod(shape.dims(self.dims(next(iter(self.inputs)))[0]))
            return elements * self.per_element[mode == "backward"]
        T = shape["T"] // max(1, shape.packed)  # a packed sequence, on average
        flops = 0
        for _, heads, K, V in (shape.dims(dims) for dims in self.state if len(dims.split()) == 4):
            erased = 1 if self.engine == "delta" else 0
            by_state, by_pairs = {
                "forward": ((4 + 2 * erased) * K * V, (1 + erased) * (T + 1) * (K + V)),
                "backward": (
                    (10 + 6 * erased) * K * V,
                    (T + 1) * (3 * (1 + erased) * K + (2 + 3 * erased) * V),
                ),
                "step": ((4 + 2 * erased) * K * V, (4 + 2 * erased) * K * V),
            }[mode]
            flops += tokens * heads * min(by_state, by_pairs)
        return flops
