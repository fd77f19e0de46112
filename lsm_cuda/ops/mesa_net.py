"""MesaNet: every token reads with the least-squares solution of all pairs so far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._chunk import chunk, step
from ._common import (
    accumulation_dtype,
    autocast_dtype,
    check_in_place,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_shape,
    functional,
    no_autocast,
)
from .gates import unit_rows

__all__ = ["chunk_mesa_net", "mesa_net_decoding_one_step", "mesa_net_step"]

States: TypeAlias = tuple[Tensor, Tensor]


def chunk_mesa_net(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk_init: Tensor | None = None,
    h_kv_init: Tensor | None = None,
    output_final_state: bool = False,
    max_CG_iteration: int = 30,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""The Mesa layer over whole sequences.

    ``H_t = e^{g_t} H_{t-1} + β_t k_t k_tᵀ``, ``G_t = e^{g_t} G_{t-1} + β_t k_t v_tᵀ``, ``o_t =
    G_tᵀ (H_t + Diag(λ))⁻¹ q_t``, the inverse by conjugate gradients.

    Args:
        q, k (Tensor): ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        v (Tensor): ``[B, T, H, V]``.
        g (Tensor): log decay ``[B, T, H]``, natural log, ≤ 0.
        beta (Tensor): weight of a pair, ≥ 0, ``[B, T, H]``.
        lamb (Tensor): λ ``[H, K]``, above 0.
        h_kk_init, h_kv_init (Tensor, optional): H ``[N, H, K, K]``, symmetric, and G ``[N, H, K,
            V]``, fp32 (fp64 for fp64 inputs). Default: zeros.
        output_final_state (bool): also return H and G after the last token.
        max_CG_iteration (int): iterations; K of them solve exactly, but for rounding. A token whose
            residual is down to rounding stops changing.
        use_qk_l2norm_in_kernel (bool): divide q and k by ``sqrt(|·|² + 1e-6)`` first.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.

    Returns:
        ``o [B, T, H, V]`` in the dtype of v, and the final H and G, or None and None.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in all tensors but cu_seqlens, by the gradient of the exact solution,
        for which backward solves once more; deterministic. An iteration is one call of the chunk
        engine with the search direction for q, so all tokens iterate together. Computed in fp32
        whatever the inputs: the solver amplifies the rounding of what it is given.

    Source: MesaNet: Sequence Modeling by Locally Optimal Test-Time Training, arXiv:2506.05233.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))
        >>> g, beta = -torch.rand(1, 100, 2), torch.rand(1, 100, 2)
        >>> o, H, G = chunk_mesa_net(
        ...     q, k, v, g, beta, torch.ones(2, 16), output_final_state=True,
        ...     use_qk_l2norm_in_kernel=True,
        ... )
        >>> o.shape, H.shape, G.shape
        (torch.Size([1, 100, 2, 16]), torch.Size([1, 2, 16, 16]), torch.Size([1, 2, 16, 16]))
    """
    op = "chunk_mesa_net"
    check_no_forward_ad(
        op, q=q, k=k, v=v, g=g, beta=beta, lamb=lamb, h_kk_init=h_kk_init, h_kv_init=h_kv_init
    )
    check_rank(op, "q", q, "[B, T, H, K]")
    check_shape(op, "k", k, "[B, T, H, K]", q.shape)
    check_shape(op, "v", v, "[B, T, H, V]", (*q.shape[:-1], *v.shape[-1:]))
    check_shape(op, "g", g, "[B, T, H]", q.shape[:-1])
    check_shape(op, "beta", beta, "[B, T, H]", q.shape[:-1])
    check_shape(op, "lamb", lamb, "[H, K]", q.shape[-2:])
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = N, *q.shape[2:]
    if h_kk_init is not None:
        check_shape(op, "h_kk_init", h_kk_init, "[N, H, K, K]", (*heads, q.shape[-1]))
    if h_kv_init is not None:
        check_shape(op, "h_kv_init", h_kv_init, "[N, H, K, V]", (*heads, v.shape[-1]))
    wide, dtype = accumulation_dtype(q), autocast_dtype(q.device.type)
    dtype = v.dtype if dtype is None or q.dtype == torch.float64 else dtype
    q, k, v, g, beta, lamb = (x.to(wide) for x in (q, k, v, g, beta, lamb))
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    with no_autocast(q):
        weight = beta.unsqueeze(-1)
        x, H = _Solve.apply(
            q, k, weight * k, g, lamb, h_kk_init, cu_seqlens, max_CG_iteration, output_final_state
        )  # type: ignore[no-untyped-call]
        o, G = chunk(
            "simple_gla", x, k, weight * v, g, 1.0, h_kv_init, output_final_state, cu_seqlens
        )
    return o.to(dtype), H if output_final_state else None, G


def mesa_net_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    state: States,
    max_CG_iteration: int = 30,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    r"""One token of :func:`chunk_mesa_net`; both states are updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, H, V]``.
        g, beta (Tensor): ``[B, H]``.
        lamb (Tensor): ``[H, K]``.
        state (tuple): H ``[B, H, K, K]`` and G ``[B, H, K, V]``, fp32 (fp64 for fp64 inputs),
            contiguous.
        max_CG_iteration, use_qk_l2norm_in_kernel: as in :func:`chunk_mesa_net`.

    Returns:
        ``o [B, H, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16)
        >>> q, k, v = (torch.randn(1, 2, 16) for _ in range(3))
        >>> g, beta, lamb = -torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 16)
        >>> mesa_net_step(q, k, v, g, beta, lamb, state).shape
        torch.Size([1, 2, 16])
    """
    op = "mesa_net_step"
    h_kk, h_kv = state
    check_no_gradient(op, "chunk_mesa_net", q, k, v, g, beta, lamb, h_kk, h_kv)
    check_rank(op, "q", q, "[B, H, K]")
    check_shape(op, "k", k, "[B, H, K]", q.shape)
    check_shape(op, "v", v, "[B, H, V]", (*q.shape[:-1], *v.shape[-1:]))
    check_shape(op, "g", g, "[B, H]", q.shape[:-1])
    check_shape(op, "beta", beta, "[B, H]", q.shape[:-1])
    check_shape(op, "lamb", lamb, "[H, K]", q.shape[-2:])
    check_in_place(op, "H", h_kk, "[B, H, K, K]", (*q.shape, q.shape[-1]), q)
    check_in_place(op, "G", h_kv, "[B, H, K, V]", (*q.shape, v.shape[-1]), q)
    dtype, wide = v.dtype, h_kk.dtype
    q, k, v, g, beta, lamb = (x.to(wide) for x in (q, k, v, g, beta, lamb))
    if use_qk_l2norm_in_kernel:
        q, k = unit_rows(q, k)
    weight = beta.unsqueeze(-1)
    with no_autocast(q):
        step("simple_gla", q, k, weight * k, g, h_kk, 1.0, "chunk_mesa_net")
        x = _conjugate_gradients(
            lambda p: (p.unsqueeze(-2) @ h_kk).squeeze(-2) + lamb * p, q, max_CG_iteration
        )
        return step("simple_gla", x, k, weight * v, g, h_kv, 1.0, "chunk_mesa_net").to(dtype)


def mesa_net_decoding_one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    lamb: Tensor,
    beta: Tensor,
    prev_h_kk: Tensor,
    prev_h_kv: Tensor,
    max_CG_iteration: int = 30,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`mesa_net_step` with FLA's arguments: returns o and the new states, and leaves the ones
    it was given alone."""
    state = prev_h_kk.clone(), prev_h_kv.clone()
    return mesa_net_step(q, k, v, g, beta, lamb, state, max_CG_iteration), *state


class _Solve(torch.autograd.Function):
    """``x_t = (H_t + Diag(λ))⁻¹ q_t`` and the last H.

    Backward: with ``u = (H + Diag(λ))⁻¹ dx``, of which H and λ see ``−u xᵀ`` and q sees u. The
    engine has the gradients of ``H_tᵀ x_t`` for an upstream −u, which are those of H.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        w: Tensor,
        g: Tensor,
        lamb: Tensor,
        h0: Tensor | None,
        cu_seqlens: Tensor | None,
        iterations: int,
        output_final_state: bool,
    ) -> tuple[Tensor, Tensor]:
        x = _conjugate_gradients(_matvec(k, w, g, lamb, h0, cu_seqlens), q, iterations)
        state = q.new_empty(0)
        if output_final_state:
            state = torch.ops.lsm.simple_gla_fwd(q, k, w, g, h0, cu_seqlens, 1.0, True)[1]
        return x, state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, *saved, ctx.iterations, ctx.output_final_state = inputs
        ctx.save_for_backward(output[0], *saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, k, w, g, lamb, h0, cu_seqlens = ctx.saved_tensors
        matvec = _matvec(k, w, g, lamb, h0, cu_seqlens)
        u = _conjugate_gradients(matvec, grad_x.contiguous(), ctx.iterations)
        _, dk, dw, dg, dh0 = torch.ops.lsm.simple_gla_bwd(
            x, k, w, g, h0, cu_seqlens, 1.0, -u, grad_state if ctx.output_final_state else None
        )
        dlamb = -(u * x).sum((0, 1))
        return u, dk, dw, dg, dlamb, None if h0 is None else dh0, None, None, None


def _matvec(
    k: Tensor,
    w: Tensor,
    g: Tensor,
    lamb: Tensor,
    h0: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """``(H_t + Diag(λ)) p_t`` of all tokens."""

    def matvec(p: Tensor) -> Tensor:
        y, _ = torch.ops.lsm.simple_gla_fwd(p, k, w, g, h0, cu_seqlens, 1.0, False)
        return torch.addcmul(y, lamb, p)

    return matvec


def _conjugate_gradients(matvec: Callable[[Tensor], Tensor], q: Tensor, iterations: int) -> Tensor:
    """The solution of a symmetric positive definite system for every row of q, from zero."""
    x, r, p = torch.zeros_like(q), q, q
    size = (r * r).sum(-1, keepdim=True)
    least = size * torch.finfo(q.dtype).eps ** 2
    # Only where it is known without waiting whether all are done.
    known = q.device.type == "cpu" and not torch.compiler.is_compiling() and not functional()
    for _ in range(iterations):
        done = size <= least
        if known and bool(done.all()):
            break
        y = matvec(p)
        a = torch.where(done, 0, size / (p * y).sum(-1, keepdim=True))
        x, r = x + a * p, r - a * y
        new = (r * r).sum(-1, keepdim=True)
        p = r + torch.where(done, 0, new / size) * p
        size = new
    return x
