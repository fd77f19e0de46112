"""The acceptance rule (lsm_cuda/bench/rule.py) on whole calls, gradients included."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from cases import Case, Op
from inputs import Inputs, Tensors, make_inputs
from torch import Tensor

from lsm_cuda.bench.rule import allowed, relative_rms


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
        most, baseline = allowed(baseline, x.dtype, dtype)
        if not error <= most + subnormal:
            worst = (got.double() - want).abs().nan_to_num(0).argmax().item()
            at = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)]
            broken.append(
                f"{name}: relative RMS error {error:.2e}, allowed {most:.2e} "
                f"(2 x {baseline:.2e} of the recurrence + {most - 2 * baseline:.1e}); "
                f"worst at {at}: {got[tuple(at)].item():.6g} for {want[tuple(at)].item():.6g}"
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


def assert_refused(text: str, f: Callable, *args, **kwargs) -> None:
    """A call raises, and the first line says exactly this."""
    import pytest  # which a machine that only runs benchmarks/gpu_checks.py may lack

    with pytest.raises(RuntimeError) as error:
        f(*args, **kwargs)
    assert str(error.value).splitlines()[0] == text
