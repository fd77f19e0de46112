"""The one acceptance rule, for the tests and for what is timed.

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

import torch
from torch import Tensor

__all__ = ["UNIT_ROUNDOFF", "allowed", "relative_rms"]

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
ULPS = {torch.float64: 16, torch.float32: 16, torch.float16: 4, torch.bfloat16: 4}


def relative_rms(a: Tensor, truth: Tensor) -> float:
    """RMS of a − truth over RMS of truth; 0 if both are zero, inf if only the truth is."""
    a, truth = a.detach().double(), truth.detach().double()
    size = truth.abs().max().item() if truth.numel() else 0.0
    if size == 0.0:
        return 0.0 if not a.any() else float("inf")
    error, truth = (a - truth) / size, truth / size
    return float((error.square().mean() / truth.square().mean()).sqrt())


def allowed(baseline: float, dtype: torch.dtype, result: torch.dtype) -> tuple[float, float]:
    """The error allowed where the recurrence in fp32, rounded to ``result``, is off by
    ``baseline``, and that baseline as it counts; ``dtype``: that of the call."""
    if result == torch.float64:
        baseline *= UNIT_ROUNDOFF[torch.float64] / UNIT_ROUNDOFF[torch.float32]
    return 2 * baseline + ULPS[dtype] * UNIT_ROUNDOFF[dtype], baseline
