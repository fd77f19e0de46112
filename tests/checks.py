"""The one acceptance rule.

A result passes if its relative RMS error against the fp64 recurrence is at most

    2 x the error of the same recurrence run by PyTorch in the promised dtypes  +  a few ulp.

The promise: inputs and results in the dtype of q, state and accumulation in fp32 (fp64 for fp64).
So the recurrence takes the same rounded inputs, runs in fp32 (fp64) and rounds what it returns;
for half precision this is far stricter than a recurrence with a half-precision state would be.
For fp64 the truth itself is such a recurrence; how far off it may be, the fp32 run tells, scaled.
Factor 2: two orders of summation may each be unlucky. The few ulp are, in unit roundoffs u of the
dtype of q:

- fp32, fp64: 16 u (1e-6, 1.8e-15). A sum of n terms in another order differs by about
  0.3 sqrt(n) u; n goes up to some thousand tokens or columns, which the recurrence's own error
  covers only where it sums as many terms.
- bf16, fp16: 4 u (1.6e-2, 2e-3). Tensor cores take products of operands rounded up to three times
  (0.4 u RMS each), and gate gradients are sums of differences of such products; a CPU kernel stays
  near the recurrence's 0.4 u.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from cases import Case, Op
from inputs import Inputs, Tensors, make_inputs
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
ULPS = {torch.float64: 16, torch.float32: 16, torch.float16: 4, torch.bfloat16: 4}


def differentiate(forward: Callable[[Inputs], tuple[Tensor, Tensor | None]], x: Inputs) -> Tensors:
    """Results of a forward function and the gradients of its arguments, by autograd."""
    x = x.leaves()
    o, final_state = forward(x)
    results = {"o": o} if final_state is None else {"o": o, "final_state": final_state}
    upstream = {"o": x.grad_o, "final_state": x.grad_final_state}
    leaves = {f"d{name}": t for name, t in x.tensors.items()}
    if x.initial_state is not None:
        leaves["dinitial_state"] = x.initial_state
    grads = torch.autograd.grad(
        list(results.values()), list(leaves.values()), [upstream[n] for n in results],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    detached = {name: t.detach() for name, t in results.items()}
    return detached | dict(zip(leaves, grads, strict=True))


def recurrence(op: Op, x: Inputs, dtype: torch.dtype) -> Tensors:
    """The reference and its gradients, all in ``dtype``, from copies of the rounded inputs."""

    def forward(y: Inputs) -> tuple[Tensor, Tensor | None]:
        o, state = op.reference(
            **y.tensors, scale=y.scale, initial_state=y.initial_state, cu_seqlens=y.cu_seqlens
        )
        if not o.numel():  # no token: constants, which an empty sum ties to the arguments
            nothing = sum(t.sum() for t in y.tensors.values())
            o, state = o + nothing, state + nothing
        return o, state if y.output_final_state else None

    return differentiate(forward, x.map(lambda t: t.to(dtype)))


def definition(op: Op, x: Inputs) -> tuple[Tensors, Tensors]:
    """The truth, and the recurrence in fp32 (unrounded)."""
    return recurrence(op, x, torch.float64), recurrence(op, x, torch.float32)


@functools.lru_cache(maxsize=2)
def expected(case: Case) -> tuple[Inputs, Tensors, Tensors]:
    """Inputs of a case, the truth, and the recurrence in fp32."""
    x = make_inputs(case)
    return x, *definition(case.op, x)


def relative_rms(a: Tensor, truth: Tensor) -> float:
    """RMS of a − truth over RMS of truth; 0 if both are zero, inf if only the truth is."""
    a, truth = a.double(), truth.double()
    size = truth.abs().max().item() if truth.numel() else 0.0
    if size == 0.0:
        return 0.0 if not a.any() else float("inf")
    error, truth = (a - truth) / size, truth / size
    return (error.square().mean() / truth.square().mean()).sqrt().item()


def result_dtype(x: Inputs, name: str) -> torch.dtype:
    if name.startswith(("final_state", "dinitial_state", "lse")):
        return x.state_dtype
    if name == "o":  # an argument may have that name too
        return x.dtype
    argument = x.tensors.get(name.removeprefix("d"))
    return x.dtype if argument is None else argument.dtype


def verdicts(actual: Tensors, truth: Tensors, same: Tensors, x: Inputs) -> list[str]:
    """One line per result that breaks the rule."""
    broken = []
    if actual.keys() != truth.keys():
        return [f"results {sorted(actual)}, expected {sorted(truth)}"]
    slack = ULPS[x.dtype] * UNIT_ROUNDOFF[x.dtype]
    for name, got in actual.items():
        want, dtype = truth[name], result_dtype(x, name)
        got, rounded = got.cpu(), same[name].to(dtype)
        if got.shape != want.shape or got.dtype != dtype:
            broken.append(f"{name}: {got.dtype} {[*got.shape]}, expected {dtype} {[*want.shape]}")
            continue
        if not torch.equal(got.isfinite(), rounded.isfinite()):
            bad = (got.isfinite() != rounded.isfinite()).nonzero()
            broken.append(f"{name}: {len(bad)} values not finite, first at {bad[0].tolist()}")
            continue
        ok = got.isfinite()
        error, baseline = (relative_rms(t[ok], want[ok]) for t in (got, rounded))
        # Subnormal numbers have an absolute spacing; a gradient through a gate of -80 may be one.
        spacing = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        size = want[ok].double().square().mean().sqrt().item() if ok.any() else 0.0
        subnormal = spacing / size if size else 0.0
        if dtype == torch.float64:
            baseline *= UNIT_ROUNDOFF[torch.float64] / UNIT_ROUNDOFF[torch.float32]
        if not error <= 2 * baseline + slack + subnormal:
            worst = (got.double() - want).abs().nan_to_num(0).argmax().item()
            at = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)]
            broken.append(
                f"{name}: relative RMS error {error:.2e}, allowed {2 * baseline + slack:.2e} "
                f"(2 x {baseline:.2e} of the recurrence + {slack:.1e}); worst at {at}: "
                f"{got[tuple(at)].item():.6g} for {want[tuple(at)].item():.6g}"
            )
    return broken


def assert_accepted(actual: Tensors, truth: Tensors, same: Tensors, x: Inputs) -> None:
    broken = verdicts(actual, truth, same, x)
    assert not broken, "\n".join(["", *broken])


def assert_same_bits(a: Tensors, b: Tensors) -> None:
    """Equal to the last bit, NaN included."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = (t[name].contiguous().cpu() for t in (a, b))
        assert x.dtype == y.dtype and x.shape == y.shape, name
        same = torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if x.numel() else True
        assert same, f"{name}: {(x != y).sum().item()} of {x.numel()} values differ"
