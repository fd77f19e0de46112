"""The matrix memory of xLSTM: exponential or sigmoid input gate, stabiliser and normaliser."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import (
    accumulation_dtype,
    autocast,
    check_no_forward_ad,
    check_no_gradient,
    check_same_device,
    check_shape,
    no_double_backward,
)
from ._operator import FINISHED, FUSED, VALUES
from ._running import sequence_index
from ._sums import quotient, sums

__all__ = [
    "chunk_mlstm",
    "mlstm_chunkwise",
    "mlstm_recurrent_step",
    "mlstm_siging_chunkwise",
    "mlstm_step",
]

States: TypeAlias = tuple[Tensor, Tensor, Tensor]
InputGate: TypeAlias = Literal["exp", "sigmoid"]


@torch.library.register_fake("lsm::mlstm_step")
def _step_fake(q, k, v, i, f, C, n, m, *_):  # type: ignore[no-untyped-def]
    check_same_device("mlstm_step", q, k=k, v=v, i=i, f=f, C=C, n=n, m=m)
    return v.new_empty(v.shape)


def chunk_mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float | None = None,
    initial_state: States | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    eps: float = 1e-6,
    input_gate: InputGate = "exp",
    normalize: bool = True,
) -> tuple[Tensor, States | None]:
    r"""mLSTM over whole sequences.

    ``C_t = f'_t C_{t-1} + i'_t k_t v_tᵀ``,   ``n_t = f'_t n_{t-1} + i'_t k_t``,
    ``h_t = scale · C_tᵀ q_t / (max(|scale · n_t·q_t|, e^{−m_t}) + eps)``,

    with ``m_t = max(log σ(f_t) + m_{t-1}, i_t)``, ``f'_t = σ(f_t) e^{m_{t-1} − m_t}`` and ``i'_t =
    e^{i_t − m_t}``; for the sigmoid input gate ``m = 0``, ``f' = σ(f)``, ``i' = σ(i)``.

    Args:
        q (Tensor): queries ``[B, T, H, K]``, bf16, fp16 or fp32 (fp64 too on CPU).
        k (Tensor): keys ``[B, T, H, K]``.
        v (Tensor): values ``[B, T, HV, V]``; HV is a multiple of H, and value head ``h`` reads
            query/key head ``h // (HV // H)``.
        i (Tensor): input gate ``[B, T, HV]`` before its activation, any floating dtype; ``-inf``
            writes nothing.
        f (Tensor): forget gate ``[B, T, HV]`` before the sigmoid, any floating dtype.
        scale (float, optional): default ``K ** -0.5``.
        initial_state (tuple, optional): C ``[N, HV, K, V]``, n ``[N, HV, K]``, m ``[N, HV]``, fp32
            (fp64 for fp64 inputs). Default: zeros.
        output_final_state (bool): also return them after the last token.
        cu_seqlens (Tensor, optional): ``[N + 1]`` boundaries of packed sequences, as in
            :func:`chunk_gla`.
        eps (float): added to the denominator.
        input_gate (str): ``"exp"`` or ``"sigmoid"``.
        normalize (bool): False returns ``scale · C_tᵀ q_t``, for the sigmoid gate.

    Returns:
        ``h [B, T, HV, V]`` in the dtype of v, and (C, n, m) or None.

    Raises:
        ValueError: another input gate, or no normalize with the exponential one.
        RuntimeError: a shape, dtype or device that does not fit, or K over 256 on CUDA.

    Note: differentiable once in everything but m: the stabiliser cancels in h but for eps, so no
        gradient flows through it. It is kept in fp64; gate logits up to ±100 over 1e5 tokens stay
        finite and exact. On the CPU, and on CUDA in bf16 with V up to 256, forward and backward are
        a pass of the engine each. Elsewhere on CUDA v is read and written once around the engine
        for i', with eight columns more for n, and fp16 is computed in fp32.

    Source: xLSTM, arXiv:2405.04517, equations 19 to 27; the sigmoid gate: Tiled Flash Linear
        Attention, arXiv:2503.14376, section 4.

    Example:
        >>> q, k, v = (torch.randn(1, 100, 2, 32) for _ in range(3))
        >>> i, f = (torch.randn(1, 100, 2) for _ in range(2))
        >>> h, (C, n, m) = chunk_mlstm(q, k, v, i, f, output_final_state=True)
        >>> C.shape, n.shape, m.shape
        (torch.Size([1, 2, 32, 32]), torch.Size([1, 2, 32]), torch.Size([1, 2]))
    """
    op = "chunk_mlstm"
    _check_input_gate(op, input_gate, normalize)
    check_shape(op, "i", i, "[B, T, HV]", v.shape[:-1])
    check_shape(op, "f", f, "[B, T, HV]", v.shape[:-1])
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    states = (None, None, None) if initial_state is None else initial_state
    rest = scale, states, output_final_state, cu_seqlens, eps, input_gate == "exp", normalize
    run = _in_one_pass if _divides(q, v) else _composed
    return run(q, k, v, i, f, *rest)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: States,
    scale: float | None = None,
    *,
    eps: float = 1e-6,
    input_gate: InputGate = "exp",
    normalize: bool = True,
) -> Tensor:
    r"""One token of :func:`chunk_mlstm`; the states are updated in place.

    Args:
        q, k (Tensor): ``[B, H, K]``.
        v (Tensor): ``[B, HV, V]``, HV a multiple of H.
        i, f (Tensor): gates ``[B, HV]`` before their activation.
        state (tuple): C ``[B, HV, K, V]``, n ``[B, HV, K]``, m ``[B, HV]``, fp32 (fp64 for fp64
            inputs), contiguous.
        scale (float, optional): default ``K ** -0.5``.
        eps, input_gate, normalize: as in :func:`chunk_mlstm`.

    Returns:
        ``h [B, HV, V]`` in the dtype of v.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Example:
        >>> state = torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32), torch.zeros(1, 2)
        >>> q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        >>> mlstm_step(q, k, v, torch.zeros(1, 2), torch.zeros(1, 2), state).shape
        torch.Size([1, 2, 32])
    """
    op = "mlstm_step"
    C, n, m = state
    _check_input_gate(op, input_gate, normalize)
    check_no_gradient(op, "chunk_mlstm", q, k, v, i, f, *state)
    i, f = _gates(q, i, f)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.lsm.mlstm_step(  # type: ignore[no-any-return]
        q, k, v, i, f, C, n, m, scale, eps, input_gate == "exp", normalize
    )


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, States]:
    """:func:`chunk_mlstm` with the arguments of mlstm_kernels' chunkwise kernels, heads first.

    Args:
        q, k (Tensor): ``[B, NH, S, K]``.
        v (Tensor): ``[B, NH, S, V]``.
        i, f (Tensor): ``[B, NH, S]``, before their activation.
        c_initial, n_initial, m_initial (Tensor, optional): ``[B, NH, K, V]``, ``[B, NH, K]``,
            ``[B, NH, 1]``.
        return_last_states (bool): also return the three of them after the last token.
        eps (float): added to the denominator.
        chunk_size (int): without meaning here; any S is taken.

    Returns:
        ``h [B, NH, S, V]``, or that and (C, n, m).

    Example:
        >>> q, k, v = (torch.randn(1, 2, 100, 32) for _ in range(3))
        >>> i, f = (torch.randn(1, 2, 100) for _ in range(2))
        >>> mlstm_chunkwise(q, k, v, i, f).shape
        torch.Size([1, 2, 100, 32])
    """
    return _heads_first(
        q, k, v, i, f, c_initial, n_initial, m_initial, return_last_states, eps, "exp", True
    )


def mlstm_siging_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c_initial: Tensor | None = None,
    n_initial: Tensor | None = None,
    m_initial: Tensor | None = None,
    return_last_states: bool = False,
    eps: float = 1e-6,
    normalize: bool = True,
    chunk_size: int = 128,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """:func:`mlstm_chunkwise` with the sigmoid input gate, as mlstm_kernels has it: m_initial and
    chunk_size are without meaning, and the states are (C, n)."""
    result = _heads_first(
        q, k, v, i, f, c_initial, n_initial, None, return_last_states, eps, "sigmoid", normalize
    )
    return result if isinstance(result, Tensor) else (result[0], result[1][:2])


def mlstm_recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, States]:
    """:func:`mlstm_step` with the arguments of mlstm_kernels' step: i, f and m ``[B, NH, 1]``.
    Returns h and the states it was given, which are updated in place."""
    h = mlstm_step(q, k, v, i.squeeze(-1), f.squeeze(-1), (c, n, m.squeeze(-1)), eps=eps)
    return h, (c, n, m)


def _heads_first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    C: Tensor | None,
    n: Tensor | None,
    m: Tensor | None,
    return_last_states: bool,
    eps: float,
    input_gate: InputGate,
    normalize: bool,
) -> Tensor | tuple[Tensor, States]:
    state = None
    if C is not None and n is not None:
        state = C, n, C.new_zeros(C.shape[:2]) if m is None else m.squeeze(-1)
    q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, f))
    h, last = chunk_mlstm(
        q, k, v, i, f, None, state, return_last_states, eps=eps, input_gate=input_gate,
        normalize=normalize,
    )  # fmt: skip
    h = h.transpose(1, 2)
    return h if last is None else (h, (last[0], last[1], last[2][..., None]))


def _divides(q: Tensor, v: Tensor) -> bool:
    wide = v.shape[-1] > VALUES["cuda"]
    on_tensor_cores = q.device.type in FINISHED and q.dtype == torch.bfloat16 and not wide
    return q.device.type in FUSED or on_tensor_cores


def _in_one_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float,
    states: tuple[Tensor | None, ...],
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    eps: float,
    exponential: bool,
    normalize: bool,
) -> tuple[Tensor, States | None]:
    """By the operator, which weighs and divides where the engine has its tokens at hand."""
    C, n, m = states
    check_no_forward_ad("mlstm_fwd", q=q, k=k, v=v, i=i, f=f, C=C, n=n)
    i, f = _gates(q, i, f)
    C, n, m = (None if s is None else s.to(accumulation_dtype(q)) for s in states)
    h, C, n, m, _ = torch.ops.lsm.mlstm_fwd(
        q, k, v, i, f, C, n, m, cu_seqlens, scale, eps, exponential, normalize, output_final_state
    )
    return h, (C, n, m) if output_final_state else None


def _gates(q: Tensor, i: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """In a dtype that operators take beside q."""
    wide = accumulation_dtype(q)
    if i.dtype != f.dtype or i.dtype not in (q.dtype, wide):
        return i.to(wide), f.to(wide)
    return i, f


def _fwd_fake(*inputs):  # type: ignore[no-untyped-def]
    q, k, v, i, f, C, n, m, cu_seqlens, *_, output_final_state = inputs
    states = {"C": C, "n": n, "m": m, "cu_seqlens": cu_seqlens}
    check_same_device("mlstm_fwd", q, k=k, v=v, i=i, f=f, **states)
    (B, T, HV, V), K, wide = v.shape, q.shape[-1], accumulation_dtype(q)
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    last = ((N, HV, K, V), (N, HV, K), (N, HV)) if output_final_state else ((0,),) * 3
    tokens = (4, B, HV, T)
    return v.new_empty(v.shape), *(q.new_empty(s, dtype=wide) for s in (*last, tokens))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, scale, eps, exponential, normalize, output_final_state = inputs
    h, *_, tokens = output
    ctx.mark_non_differentiable(tokens)
    ctx.save_for_backward(*tensors[:7], cu_seqlens, h, tokens)
    ctx.from_m = tensors[7] is not None
    ctx.options = scale, eps, exponential, normalize, output_final_state
    ctx.set_materialize_grads(False)


def _bwd_fake(*inputs):  # type: ignore[no-untyped-def]
    q, k, v, C, n, cu_seqlens, _, _, _, h, tokens, grad_h, grad_C, grad_n = inputs
    states = {"C": C, "n": n, "cu_seqlens": cu_seqlens, "grad_C": grad_C, "grad_n": grad_n}
    check_same_device("mlstm_bwd", q, k=k, v=v, h=h, tokens=tokens, grad_h=grad_h, **states)
    gate, wide = v.shape[:-1], accumulation_dtype(q)
    d_states = ((0,) if s is None else s.shape for s in (C, n))
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(
        q.new_empty(s, dtype=wide) for s in (gate, gate, *d_states)
    )


def _backward(ctx, grad_h, grad_C, grad_n, grad_m, _):  # type: ignore[no-untyped-def]
    """The stabiliser is a constant where there are tokens to find it from."""
    q, k, v, i, f, C, n, cu_seqlens, h, tokens = ctx.saved_tensors
    scale, eps, exponential, normalize, output_final_state = ctx.options
    if not output_final_state:
        grad_C = grad_n = None
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    dq, dk, dv, da, di, dC, dn = torch.ops.lsm.mlstm_bwd(
        q, k, v, C, n, cu_seqlens, scale, eps, normalize, h, tokens, grad_h, grad_C, grad_n
    )
    if not exponential:  # the logarithm of a sigmoid has the slope 1 − σ
        di = di * (1 - tokens[1].transpose(1, 2))
    df = da * (-f.to(da.dtype)).sigmoid()
    dm = None
    if ctx.from_m and grad_m is not None:
        dm = grad_m
        if exponential and cu_seqlens is not None:
            dm = grad_m.masked_fill((cu_seqlens.diff() > 0)[:, None], 0)
        elif exponential and v.shape[1]:
            dm = None
    dC, dn = None if C is None else dC, None if n is None else dn
    return (dq, dk, dv, di.to(i.dtype), df.to(f.dtype), dC, dn, dm, *(None for _ in range(6)))


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("mlstm_bwd"))


torch.library.register_fake("lsm::mlstm_fwd")(_fwd_fake)
torch.library.register_fake("lsm::mlstm_bwd")(_bwd_fake)
torch.library.register_autograd("lsm::mlstm_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::mlstm_bwd", _refuse_double_backward)


def _composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    scale: float,
    states: tuple[Tensor | None, ...],
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    eps: float,
    exponential: bool,
    normalize: bool,
) -> tuple[Tensor, States | None]:
    """By simple_gla, of weighted values and the weights, between PyTorch's operations."""
    C, n, m = states
    dtype = accumulation_dtype(q)
    bound: Tensor | float
    if exponential:
        g, weight, bound, m = _stabilised(i, f, m, cu_seqlens)
        g, weight, bound = g.to(dtype), weight.to(dtype), bound[..., None].to(dtype)
    else:
        g, weight, bound = logsigmoid(f.to(dtype)), i.to(dtype).sigmoid(), 1.0
        N = i.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        m = g.new_zeros(N, v.shape[2]) if m is None else m
    above, below, state = sums(
        "simple_gla", q, k, v, g, weight, scale, (C, n), output_final_state, cu_seqlens
    )
    h = _normalise(above, below, bound, eps) if normalize else above
    return h.to(v.dtype), None if state is None else (*state, m.to(dtype).contiguous())


def _normalise(above: Tensor, below: Tensor, bound: Tensor | float, eps: float) -> Tensor:
    size = below.to(accumulation_dtype(below)).abs()
    size = size.clamp(min=bound) if isinstance(bound, float) else torch.maximum(size, bound)
    return quotient(above, (size + eps).to(above.dtype))


def _stabilised(
    i: Tensor, f: Tensor, m0: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log decay, write weight and ``e^{−m}`` of every token, ``[B, T, HV]``, and the last m of
    every sequence, all fp64.

    ``m_t = max(a_t + m_{t-1}, i_t)`` with ``a = log σ(f)`` is the largest of ``i_s + A_t − A_s``,
    s ≤ t, where A sums a. The first token of a sequence takes m0 into its i and, among packed
    sequences, an a so low that nothing before it counts. A is the sum of its parts on a grid, exact
    in fp64 like differences of it, and of small remainders, so long or packed sequences cost m
    nothing.
    """
    B, T, HV = i.shape
    i, a = i.double(), logsigmoid(f.double())
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    m0 = i.new_zeros(N, HV) if m0 is None else m0.double()
    if T == 0:
        return a, i, i, m0
    with torch.no_grad():
        if cu_seqlens is None:
            first = torch.arange(T, device=i.device)[:, None] == 0
            start = m0[:, None]
        else:
            owner, first = sequence_index(T, cu_seqlens)
            first, start = first[:, None], m0[owner]
        # NaN spoils its own sequence through the decays and the weights, not the others' m
        level = torch.where(first, torch.maximum(i, a + start), i).nan_to_num(0, 1e4, -1e4)
        fall = a.nan_to_num(0).clamp(min=-3e4)
        if cu_seqlens is not None:
            fall = torch.where(first, (level.amin(1) - level.amax(1) - 1).floor(), fall)
        # scans along the last dimension are the fast ones on a GPU
        level, fall = (x.transpose(1, 2).contiguous() for x in (level, fall))
        on_grid = (fall * 2**20).round() / 2**20
        A = torch.stack([on_grid, fall - on_grid]).cumsum(-1)
        best = (level - A.sum(0)).cummax(-1).indices
        since = A - A.gather(-1, best.expand_as(A))
        m = (level.gather(-1, best) + since[0] + since[1]).transpose(1, 2)
        before = torch.where(first, start, m.roll(1, 1))
        last = m[:, -1]
    if cu_seqlens is not None:
        ends = (cu_seqlens[1:] - 1).clamp(0, T - 1)
        last = torch.where((cu_seqlens.diff() > 0)[:, None], m[0, ends], m0)
    return a + (before - m), (i - m).exp(), (-m).exp(), last


def _check_input_gate(op: str, input_gate: str, normalize: bool) -> None:
    if input_gate not in ("exp", "sigmoid"):
        raise ValueError(f"lsm::{op}: input_gate must be exp or sigmoid, got {input_gate!r}")
    if input_gate == "exp" and not normalize:
        raise ValueError(f"lsm::{op}: normalize=False needs input_gate='sigmoid', got 'exp'")
