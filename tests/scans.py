"""The scan engine's operators for the tests: rows, drawn cases, one way to run them anywhere."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from cases import DTYPES, pairwise
from checks import assert_accepted, differentiate
from impls import Cuda, Emulator, Impl, threads
from inputs import Inputs, Tensors, boundaries, gates, lay_out
from torch import Tensor

from lsm_cuda import reference
from lsm_cuda.ops import _scan

COMPLEX = {"c64": torch.complex64, "c128": torch.complex128}


@dataclass(frozen=True)
class ScanOp:
    """An operator of the engine. ``tensors``: its arguments in order, with dims and how they are
    drawn: normal, gate (of the case's pattern), or rate (negative, per channel)."""

    name: str
    reference: Callable
    tensors: dict[str, str] = field(hash=False)
    options: tuple[str, ...] = ()
    complex_too: bool = False

    def raw(self, kind: str, namespace: str = "lsm"):
        return getattr(getattr(torch.ops, namespace), f"{self.name}_{kind}").default

    def __str__(self) -> str:
        return self.name


SCAN = ScanOp(
    "scan",
    reference.scan,
    {"x": "B T D normal", "a": "B T D gate"},
    ("log", "reverse"),
    complex_too=True,
)
RG_LRU = ScanOp(
    "rg_lru",
    reference.rg_lru,
    {"x": "B T D normal", "i": "B T D normal", "r": "B T D normal", "c": "D rate"},
    ("reverse",),
)
SCANS = [SCAN, RG_LRU]


@dataclass(frozen=True)
class ScanCase:
    op: ScanOp
    T: int = 65
    D: int = 20
    dtype: str = "f32"  # "bf16+f32" has gates in float32
    gate: str = "mixed"
    form: str = "token"  # of the gate: token, constant
    log: bool = True
    batch: int | str = 1  # rows, or the dtype of cu_seqlens
    state: str = "none"
    layout: str = "contiguous"
    reverse: bool = False
    order: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return (DTYPES | COMPLEX)[self.dtype.split("+")[0]]

    @property
    def state_dtype(self) -> torch.dtype:
        wide = self.torch_dtype.is_complex or self.dtype == "f64"
        return self.torch_dtype if wide else torch.float32

    def __str__(self) -> str:
        values = (getattr(self, f) for f in self.__dataclass_fields__)
        return "-".join(str(v) for v in values)


AXES = {
    "T": [1, 7, 31, 63, 65, 130, 700],
    "D": [1, 8, 33, 64, 70, 200],
    "dtype": ["f32", "bf16", "f16", "f64", "bf16+f32", "c64", "c128"],
    "gate": ["0", "-1e-3", "-1", "-8", "-100", "-inf", "mixed", "resets", "positive"],
    "form": ["token", "constant"],
    "log": [True, False],
    "batch": [1, 2, "int32", "int64"],
    "state": ["none", "initial", "final", "both"],
    "layout": ["contiguous", "sliced", "offset", "expanded"],
    "reverse": [False, True],
    "order": [False, True],
}
EMULATOR_AXES = AXES | {
    "T": [1, 7, 33, 65, 130],
    "D": [1, 8, 33, 72],
    "dtype": ["f32", "bf16", "f16", "bf16+f32", "c64"],
}
PAIRS = [
    ("T", "batch"),
    ("T", "dtype"),
    ("D", "dtype"),
    ("gate", "dtype"),
    ("gate", "form"),
    ("dtype", "form"),
    ("dtype", "layout"),
    ("log", "gate"),
    ("batch", "state"),
    ("reverse", "batch"),
    ("reverse", "state"),
    ("order", "batch"),
    ("order", "reverse"),
]


@functools.cache
def scan_cases(op: ScanOp, impl: str) -> list[ScanCase]:
    axes = EMULATOR_AXES if impl == "emulator" else AXES
    if impl == "cuda":
        axes = axes | {"dtype": [d for d in axes["dtype"] if d not in ("f64", "c128")]}
    if not op.complex_too:
        plain = [d for d in axes["dtype"] if not d.startswith("c") and "+" not in d]
        axes = axes | {"dtype": plain, "form": ["token"], "log": [True], "gate": ["mixed"]}
    edges = [
        ScanCase(op, T=0, state="both", batch=2),
        ScanCase(op, T=0, state="both", batch="int64"),
        ScanCase(op, batch=0, state="both"),
    ]

    def legal(row: dict) -> bool:
        # One channel's dc is one sum, whose cancellation no average over channels hides.
        if op is RG_LRU and row["D"] == 1 and row["dtype"] in ("f16", "bf16"):
            return False
        return not (row["form"] == "constant" and (row["gate"] == "resets" or "+" in row["dtype"]))

    return edges + [ScanCase(op, **row) for row in pairwise(axes, PAIRS, legal)]


def draw_scan(case: ScanCase) -> tuple[Inputs, dict]:
    """Inputs of a case, and its options."""
    rng = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))
    packed = isinstance(case.batch, str)
    cu = boundaries(case.T, getattr(torch, case.batch)) if packed else None
    sizes = {"B": 1 if packed else case.batch, "T": case.T, "D": case.D}
    N = sizes["B"] if cu is None else len(cu) - 1
    is_complex = case.torch_dtype.is_complex

    def normal(*shape: int) -> Tensor:
        dtype = torch.complex128 if is_complex else torch.float64
        return torch.randn(shape, generator=rng, dtype=dtype)

    def make(name: str, dims: str) -> Tensor:
        *names, kind = dims.split()
        shape = tuple(sizes[n] for n in names)
        if kind == "rate":
            return -8 * torch.rand(shape, generator=rng, dtype=torch.float64)
        if kind == "normal":
            return normal(*shape)
        shape = shape[2:] if case.form == "constant" else shape
        g = gates(case.gate, shape, rng)
        if is_complex:
            g = torch.complex(g, 2 * torch.randn(shape, generator=rng, dtype=torch.float64))
        if case.log and is_complex and case.gate == "-inf":
            g = g.real.to(g.dtype)  # an infinite complex number has no phase
        return g if case.log else g.exp() if case.gate != "-inf" else torch.zeros_like(g)

    tensors = {}
    for name, dims in case.op.tensors.items():
        x = make(name, dims)
        dtype = case.torch_dtype
        if name == "a" and "+" in case.dtype:
            dtype = torch.float32
        dtype = case.state_dtype if x.dim() == 1 else dtype
        layout = "contiguous" if case.layout == "expanded" and name != "x" else case.layout
        if layout == "expanded":
            tensors[name] = x[:, :1].to(dtype).expand(x.shape) if x.shape[1] else x.to(dtype)
        else:
            tensors[name] = lay_out(x.to(dtype), layout if x.dim() > 1 else "contiguous")
    initial, final = case.state in ("initial", "both"), case.state in ("final", "both")
    x = Inputs(
        tensors,
        grad_o=normal(sizes["B"], case.T, case.D).to(case.torch_dtype),
        initial_state=normal(N, case.D).to(case.state_dtype) if initial else None,
        cu_seqlens=cu,
        grad_final_state=normal(N, case.D).to(case.state_dtype) if final else None,
    )
    options = {name: getattr(case, name) for name in case.op.options}
    options["order"] = torch.randperm(case.T, generator=rng) if case.order else None
    return x, options


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def real_inputs(x: Inputs) -> Inputs:
    return replace(x, tensors={name: real(t) for name, t in x.tensors.items()})


def wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    if not t.is_complex():
        return t.to(dtype)
    return t.to(torch.complex128 if dtype == torch.float64 else torch.complex64)


def scan_definition(op: ScanOp, x: Inputs, options: dict, dtype: torch.dtype) -> Tensors:
    def forward(y: Inputs) -> tuple[Tensor, Tensor | None]:
        h, state = op.reference(
            **y.tensors, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens, **options
        )
        nothing = 0 if h.numel() else sum(0 * t.sum() for t in y.tensors.values())
        return h + nothing, state + nothing if y.output_final_state else None

    return differentiate(forward, x.map(lambda t: wide(t, dtype)))


def run_scan(impl: Impl, op: ScanOp, x: Inputs, options: dict) -> Tensors:
    """Results and gradients."""
    order = options["order"]
    flags = tuple(options[name] for name in op.options)
    if isinstance(impl, Emulator):

        def call() -> Tensors:
            tensors = tuple(x.tensors.values())
            common = (*tensors, x.initial_state, x.cu_seqlens, order, *flags)
            h, state = impl.raw(op, "fwd")(*common, x.output_final_state)
            *grads, dh0 = impl.raw(op, "bwd")(*common, h, x.grad_o, x.grad_final_state)
            results = {"o": h} | ({"final_state": state} if x.output_final_state else {})
            results |= {f"d{name}": d for name, d in zip(x.tensors, grads, strict=True)}
            return results if x.initial_state is None else results | {"dinitial_state": dh0}

        return impl.under_every_seed(call)

    def forward(y: Inputs) -> tuple[Tensor, Tensor | None]:
        moved = order if order is None else order.to(y.grad_o.device)
        return _scan.run(
            op.name, tuple(y.tensors.values()), y.initial_state, y.cu_seqlens, moved, flags,
            y.output_final_state,
        )  # fmt: skip

    device = "cuda" if isinstance(impl, Cuda) else "cpu"
    with threads(2):
        return {name: t.cpu() for name, t in differentiate(forward, x.to(device)).items()}


def assert_scan(impl: Impl, case: ScanCase) -> None:
    """The acceptance rule of checks.py."""
    x, options = draw_scan(case)
    truth, same = (scan_definition(case.op, x, options, d) for d in (torch.float64, torch.float32))
    actual = run_scan(impl, case.op, x, options)
    assert_accepted(*({n: real(t) for n, t in r.items()} for r in (actual, truth, same)),
                    real_inputs(x))  # fmt: skip
