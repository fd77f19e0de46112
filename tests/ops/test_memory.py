"""Forward and backward hold little beside their results, at any length, and give it back."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Peak resident memory over what the arguments take, in multiples of q + k + v + g + o. The results
# (o and four gradients) are 1 of it; the rest is workspace.
CPU_PROGRAM = """
import torch, lsm_cuda
from pathlib import Path

torch.set_num_threads(2)
T, H, D, dtype = {T}, 2, 128, torch.{dtype}

def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024

def arguments(T):
    q, k, v, g = (torch.empty(1, T, H, D, dtype=dtype).uniform_(-1, 0) for _ in range(4))
    return [t.requires_grad_() for t in (q, k, v, g)], torch.ones(1, T, H, D, dtype=dtype)

def run(args, grad_o):
    o, _ = lsm_cuda.ops.chunk_gla(*args)
    grads = torch.autograd.grad(o, args, grad_o)
    assert all(t.isfinite().all() for t in (g.sum() for g in grads))

run(*arguments(64))
call = arguments(T)
before = status("VmRSS")
run(*call)
tensors = 5 * T * H * D * call[1].element_size()
print((status("VmHWM") - before) / tensors)

# A leak: what short calls keep, per call, in most of the rounds: an allocator grows and shrinks now
# and then. (Of long calls it keeps some for the next.)
torch.set_num_threads(1)
call, kept = arguments(512), []
for calls in (20, 80, 80, 80, 80, 80):
    before = status("VmRSS")
    for _ in range(calls):
        run(*call)
    kept.append((status("VmRSS") - before) / calls / (call[1].nbytes * 5))
print(sorted(kept[1:])[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpu_peak(dtype: str, tmp_path: Path) -> None:
    program = textwrap.dedent(CPU_PROGRAM).format(T=16384, dtype=dtype)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak, growth = (float(line) for line in done.stdout.split())
    assert peak < 1.5, f"forward and backward take {peak:.2f} x the size of q + k + v + g + o"
    assert peak > 0.9, f"{peak:.2f} x is less than the results alone: the measurement is broken"
    assert growth < 0.02, f"each call keeps {growth:.3f} x the size of q + k + v + g + o"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cuda_peak(dtype: str) -> None:
    import torch
    from impls import IMPLS

    import lsm_cuda

    if absent := IMPLS["cuda"].absent():
        pytest.skip(absent)
    T, H, D = 65536, 8, 128
    args = [
        torch.rand(1, T, H, D, device="cuda", dtype=getattr(torch, dtype)).neg_().requires_grad_()
        for _ in range(4)
    ]
    grad_o = torch.ones_like(args[0]).detach()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = lsm_cuda.ops.chunk_gla(*args)
    torch.autograd.grad(o, args, grad_o)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 1.5 * 5 * grad_o.numel() * grad_o.element_size()
