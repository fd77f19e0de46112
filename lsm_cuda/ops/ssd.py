"""State space duality, Mamba-2's mixer, under the names and conventions of mamba_ssm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _chunk
from ._common import (
    accumulation_dtype,
    autocast,
    check_device_like,
    check_no_forward_ad,
    check_no_gradient,
    check_rank,
    check_same_device,
    check_shape,
    in_dtype,
    no_double_backward,
)
from ._operator import FINISHED, FUSED, VALUES, register, sequences
from .conv import convolve
from .selective_scan import selective_step

register("weighted_gla", ("w", "g"), step=False)

__all__ = [
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "selective_state_update",
    "ssd_minimal_discrete",
]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int | None = None,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""Mamba-2 over whole sequences: a state ``h [P, N]`` per head.

    ``h_t = e^{dt_t A} h_{t-1} + dt_t x_t B_tᵀ``,   ``y_t = (h_t C_t + D x_t) · silu(z_t)``.

    Args:
        x (Tensor): ``[B, T, H, P]``, bf16, fp16 or fp32 (fp64 too on CPU).
        dt (Tensor): step sizes ``[B, T, H]``, any floating dtype. dt_bias is added, then softplus
            taken if dt_softplus, then the result kept within dt_limit.
        A (Tensor): ``[H]``, < 0, any floating dtype.
        B, C (Tensor): ``[B, T, G, N]`` in the dtype of x; H is a multiple of G, and head ``h``
            uses group ``h // (H // G)``.
        chunk_size (int, optional): without meaning here.
        D (Tensor, optional): ``[H]`` or ``[H, P]``.
        z (Tensor, optional): ``[B, T, H, P]``.
        dt_bias (Tensor, optional): ``[H]``.
        initial_states (Tensor, optional): ``[B, H, P, N]``; with cu_seqlens one per sequence.
        seq_idx (Tensor, optional): integers ``[B, T]``; where it changes from one token to the
            next, the state is reset. An initial state is that of the first token's sequence. Not
            looked at if there is cu_seqlens.
        cu_seqlens (Tensor, optional): ``[Nseq + 1]`` boundaries of sequences packed into one row,
            as in :func:`chunk_gla`. They separate the sequences with or without seq_idx; mamba_ssm
            wants both.
        return_final_states (bool): also return ``[B, H, P, N]``, the state after the last token.
        return_varlen_states (bool): also return ``[Nseq, H, P, N]``, after the last token of every
            sequence of cu_seqlens.

    Returns:
        ``y [B, T, H, P]`` in the dtype of x, then the states asked for, fp32 (fp64 for fp64
        inputs), views with N rows of P in memory.

    Raises:
        ValueError: return_varlen_states without cu_seqlens.
        RuntimeError: a shape, dtype or device that does not fit, or N over 256 on CUDA.

    Note: differentiable once in every floating tensor. On CUDA in bf16 dt, D and z are part of the
        engine's passes; the forward leaves what z gates for the backward, if there is to be one.
        Elsewhere x is read and written around the engine once for D and twice for z; on CUDA once
        more for dt, which enters that product in the dtype of x.

    Source: Transformers are SSMs, arXiv:2405.21060.

    Example:
        >>> x, z = (torch.randn(1, 100, 4, 32) for _ in range(2))
        >>> B, C = (torch.randn(1, 100, 1, 16) for _ in range(2))
        >>> dt, A = torch.randn(1, 100, 4), -torch.rand(4)
        >>> y, states = mamba_chunk_scan_combined(
        ...     x, dt, A, B, C, D=torch.ones(4), z=z, dt_softplus=True, return_final_states=True)
        >>> y.shape, states.shape
        (torch.Size([1, 100, 4, 32]), torch.Size([1, 4, 32, 16]))
    """
    op = "mamba_chunk_scan_combined"
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(f"lsm::{op}: return_varlen_states needs cu_seqlens, got None")
    x, B, C = autocast(x, B, C)
    check_shape(op, "dt", dt, "[B, T, H]", x.shape[:3])
    dt, g = _discretise(op, x, dt, A, dt_bias, dt_softplus, dt_limit)
    if seq_idx is not None and cu_seqlens is None:
        check_shape(op, "seq_idx", seq_idx, "[B, T]", x.shape[:2])
        changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        g = g.masked_fill(changes[..., None], -torch.inf)
    _check_finish(op, x, D, z)
    wanted = return_final_states or return_varlen_states
    rest = 1.0, initial_states, wanted, cu_seqlens
    if _finishes(x):
        y, states = _in_one_pass(x, dt, g, B, C, D, z, initial_states, wanted, cu_seqlens)
    elif x.device.type in FUSED:
        own = {"w": dt, "g": g}
        y, states = sequences("weighted_gla", C, B, x, own, *rest, state_v_first=True)
        y = _finish(y, x, D, z)
    else:
        v = x * dt[..., None].to(x.dtype)
        y, states = _chunk.chunk("simple_gla", C, B, v, g, *rest, state_v_first=True)
        y = _finish(y, x, D, z)
    results = [y]
    if return_final_states and states is not None:
        results.append(states if cu_seqlens is None else states[-1:])
    if return_varlen_states and states is not None:
        results.append(states)
    return tuple(results) if len(results) > 1 else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    r"""One token of :func:`mamba_chunk_scan_combined`; ``state`` is updated in place.

    With a state of three dimensions one token of :func:`selective_scan_fn` (Mamba-1): state ``[B,
    D, N]`` in the dtype of its states, contiguous; x, dt, z ``[B, D]``; A ``[D, N]``; B, C ``[B,
    N]`` or ``[B, G, N]``; D, dt_bias ``[D]``. Else:

    Args:
        state (Tensor): ``[B, H, P, N]`` fp32 (fp64 for fp64 inputs), contiguous or with its last
            two dimensions transposed in memory, as the states of mamba_chunk_scan_combined are.
        x (Tensor): ``[B, H, P]``.
        dt (Tensor): ``[B, H]``, or that expanded to ``[B, H, P]``.
        A (Tensor): ``[H]``, or that expanded to ``[H, P, N]``.
        B, C (Tensor): ``[B, G, N]``.
        D (Tensor, optional): ``[H]`` or ``[H, P]``.
        z (Tensor, optional): ``[B, H, P]``.
        dt_bias (Tensor, optional): ``[H]``, or that expanded to ``[H, P]``.
        dt_softplus (bool): as in mamba_chunk_scan_combined.

    Returns:
        ``y [B, H, P]`` in the dtype of x.

    Raises:
        ValueError: A, dt or dt_bias with values per channel (Mamba-1).
        RuntimeError: a shape, dtype or device that does not fit, or an argument that requires grad.

    Source: as :func:`mamba_chunk_scan_combined`.

    Example:
        >>> state = torch.zeros(1, 4, 32, 16)
        >>> x, dt, A = torch.randn(1, 4, 32), torch.randn(1, 4), -torch.rand(4)
        >>> B, C = (torch.randn(1, 1, 16) for _ in range(2))
        >>> selective_state_update(state, x, dt, A, B, C, dt_softplus=True).shape
        torch.Size([1, 4, 32])
    """
    op = "selective_state_update"
    if state.dim() == 3:
        return selective_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    check_rank(op, "state", state, "[B, H, P, N]")
    A, dt = _per_head(op, "A", A, 1), _per_head(op, "dt", dt, 2)
    dt_bias = None if dt_bias is None else _per_head(op, "dt_bias", dt_bias, 1)
    given = (t for t in (state, x, dt, A, B, C, D, z, dt_bias) if t is not None)
    check_no_gradient(op, "mamba_chunk_scan_combined", *given)
    z = None if z is None else in_dtype(z, x.dtype)
    dt_, A_, D_, bias = (_beside(x, t) for t in (dt, A, D, dt_bias))
    return torch.ops.lsm.ssd_step(  # type: ignore[no-any-return]
        x, dt_, A_, B, C, state, D_, z, bias, dt_softplus
    )


@torch.library.register_fake("lsm::ssd_step")
def _step_fake(x, dt, A, B, C, state, D, z, dt_bias, _):  # type: ignore[no-untyped-def]
    tensors = {"dt": dt, "A": A, "B": B, "C": C, "state": state, "D": D, "z": z}
    check_device_like("ssd_step", "x", x, tensors | {"dt_bias": dt_bias})
    return x.new_empty(x.shape)


def ssd_minimal_discrete(
    X: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    block_len: int | None = None,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The bare scan of the Mamba-2 paper's listing: ``h_t = e^{A_t} h_{t-1} + X_t B_tᵀ``, ``Y_t =
    h_t C_t``.

    Args:
        X (Tensor): ``[B, T, H, P]``, dt applied already.
        A (Tensor): log decay ``[B, T, H]``, dt applied already.
        B, C (Tensor): ``[B, T, G, N]``, H a multiple of G (the listing has G = H).
        block_len (int, optional): without meaning here; T need not be a multiple.
        initial_states (Tensor, optional): ``[B, 1, H, P, N]``.

    Returns:
        ``Y [B, T, H, P]`` and the final state ``[B, H, P, N]``.

    Source: Transformers are SSMs, arXiv:2405.21060, listing 1.

    Example:
        >>> X, A = torch.randn(1, 100, 4, 32), -torch.rand(1, 100, 4)
        >>> B, C = (torch.randn(1, 100, 4, 16) for _ in range(2))
        >>> ssd_minimal_discrete(X, A, B, C, 64)[1].shape
        torch.Size([1, 4, 32, 16])
    """
    h0 = None if initial_states is None else initial_states.squeeze(1)
    Y, state = _chunk.chunk("simple_gla", C, B, X, A, 1.0, h0, True, None, state_v_first=True)
    assert state is not None
    return Y, state


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything of a Mamba-2 block behind its input projection: short convolution, scan, gated
    norm, output projection.

    Args:
        zxbcdt (Tensor): ``[B, T, 2·dim + 2·G·N + H]``, ``dim = H · P``.
        conv1d_weight (Tensor): ``[dim + 2·G·N, W]``, the last tap weighs the current token.
        conv1d_bias (Tensor, optional): ``[dim + 2·G·N]``.
        dt_bias, A (Tensor): ``[H]``; softplus is applied to ``dt + dt_bias``.
        D (Tensor): ``[H]``, which needs headdim, or ``[H, P]``.
        chunk_size (int, optional): without meaning here.
        initial_states, seq_idx, dt_limit: as in :func:`mamba_chunk_scan_combined`; the
            convolution does not look across a change of seq_idx either.
        return_final_states (bool): also return ``[B, H, P, N]``.
        activation (str, optional): of the convolution, ``silu``, ``swish`` or None.
        rmsnorm_weight (Tensor, optional): ``[dim]``; the norm takes groups of ``dim / G`` channels.
            Without it ``y · silu(z)`` is not normalised.
        rmsnorm_eps (float): added to the mean square.
        outproj_weight, outproj_bias (Tensor, optional): ``[out, dim]``, ``[out]``.
        headdim (int, optional): P.
        ngroups (int): G.
        norm_before_gate (bool): ``norm(y) · silu(z)`` rather than ``norm(y · silu(z))``.

    Returns:
        ``[B, T, dim]``, or ``[B, T, out]`` with outproj_weight, and the final states if asked for.

    Raises:
        ValueError: D ``[H]`` without headdim, another activation, or a width that does not fit.

    Note: separate PyTorch operations around the engine, each reading and writing its tensor: the
        memory that mamba_ssm's recomputation saves is not saved here.
    """
    op = "mamba_split_conv1d_scan_combined"
    if activation not in ("silu", "swish", None):
        raise ValueError(f"lsm::{op}: activation must be silu, swish or None, got {activation!r}")
    H = D.shape[0]
    if D.dim() == 1 and headdim is None:
        raise ValueError(f"lsm::{op}: D of shape [H] = {[H]} needs headdim, got None")
    P = D.shape[1] if headdim is None else headdim
    dim, groups = H * P, zxbcdt.shape[-1] - 2 * H * P - H
    if groups <= 0 or groups % (2 * ngroups):
        raise ValueError(
            f"lsm::{op}: zxbcdt must have 2·{dim} + 2·{ngroups}·N + {H} columns, "
            f"got {zxbcdt.shape[-1]}"
        )
    z, xBC, dt = torch.split(zxbcdt, [dim, dim + groups, H], -1)
    if seq_idx is not None:
        check_shape(op, "seq_idx", seq_idx, "[B, T]", xBC.shape[:2])
    xBC, _ = convolve(
        xBC, conv1d_weight, conv1d_bias, None, None, seq_idx, activation is not None, 0
    )
    x, B, C = torch.split(xBC, [dim, groups // 2, groups // 2], -1)
    x, z, B, C = (
        _split_last(x, H),
        _split_last(z, H),
        _split_last(B, ngroups),
        _split_last(C, ngroups),
    )
    result = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z if rmsnorm_weight is None else None, dt_bias,
        initial_states, seq_idx, None, True, dt_limit, return_final_states,
    )  # fmt: skip
    y, *states = result if isinstance(result, tuple) else (result,)
    y, z = y.flatten(2), z.flatten(2)
    if rmsnorm_weight is not None:
        y = gated_norm(y, z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states[0]) if states else y


def _split_last(t: Tensor, parts: int) -> Tensor:
    return t.view(*t.shape[:-1], parts, t.shape[-1] // parts)


def _per_head(op: str, name: str, t: Tensor, dims: int) -> Tensor:
    """The first ``dims`` dimensions of a tensor that is constant along the rest."""
    for d in range(dims, t.dim()):
        if t.stride(d) != 0 and t.shape[d] != 1:
            raise ValueError(
                f"lsm::{op}: {name} must be one value per head, [H] expanded where it has more "
                f"dimensions, got shape {[*t.shape]} with strides {[*t.stride()]}"
            )
    return t.flatten(dims)[..., 0] if t.dim() > dims else t


def _beside(x: Tensor, t: Tensor | None) -> Tensor | None:
    """In a dtype that operators take beside x."""
    wide = accumulation_dtype(x)
    return t if t is None or t.dtype in (x.dtype, wide) else t.to(wide)


def _discretise(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The step sizes and the log decays ``dt · A``, in the dtype of states."""
    H = x.shape[-2:-1]
    check_shape(op, "A", A, "[H]", H)
    dtype = accumulation_dtype(x)
    dt = dt.to(dtype)
    if dt_bias is not None:
        check_shape(op, "dt_bias", dt_bias, "[H]", H)
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = F.softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")):
        dt = dt.clamp(*dt_limit)
    return dt, dt * A.to(dtype)


def _check_finish(op: str, x: Tensor, D: Tensor | None, z: Tensor | None) -> None:
    if D is not None and D.shape not in (x.shape[-2:-1], x.shape[-2:]):
        raise RuntimeError(
            f"lsm::{op}: D must have shape [H] = {[x.shape[-2]]} or [H, P] = "
            f"{[*x.shape[-2:]]}, got {[*D.shape]}"
        )
    if z is not None:
        check_shape(op, "z", z, "[..., H, P]", x.shape)


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = torch.addcmul(y, x, (D if D.dim() == 2 else D[:, None]).to(x.dtype))
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y


def _finishes(x: Tensor) -> bool:
    wide = x.shape[-1] > VALUES["cuda"]
    return x.device.type in FINISHED and x.dtype == torch.bfloat16 and not wide


def _in_one_pass(
    x: Tensor,
    dt: Tensor,
    g: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    h0: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """By the operator that weighs values by dt and finishes outputs with D and z."""
    z = None if z is None else in_dtype(z, x.dtype)
    D = _beside(x, D)
    if h0 is not None:
        h0 = h0.transpose(-1, -2)
        h0 = h0.float() if h0.dtype in (torch.bfloat16, torch.float16) else h0
    named = {"q": C, "k": B, "v": x, "w": dt, "g": g, "D": D, "z": z, "initial_state": h0}
    check_no_forward_ad("ssd_fwd", **named)
    given = (t for t in named.values() if t is not None)
    keep = z is not None and torch.is_grad_enabled() and any(t.requires_grad for t in given)
    y, state, _ = torch.ops.lsm.ssd_fwd(*named.values(), cu_seqlens, 1.0, output_final_state, keep)
    return y, state.transpose(-1, -2) if output_final_state else None


def _fwd_fake(q, k, v, w, g, D, z, h0, cu_seqlens, _, output_final_state, keep):  # type: ignore[no-untyped-def]
    named = {"k": k, "v": v, "w": w, "g": g, "D": D, "z": z, "initial_state": h0}
    check_same_device("ssd_fwd", q, **named, cu_seqlens=cu_seqlens)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (N, v.shape[2], q.shape[3], v.shape[3]) if output_final_state else (0,)
    ungated = v.shape if keep and z is not None else (0,)
    wide = accumulation_dtype(q)
    return v.new_empty(v.shape), q.new_empty(state, dtype=wide), v.new_empty(ungated)


def _bwd_fake(q, k, v, w, g, D, z, ungated, h0, cu_seqlens, _, grad_o, grad_state):  # type: ignore[no-untyped-def]
    named = {"k": k, "v": v, "w": w, "g": g, "D": D, "z": z, "ungated": ungated}
    named |= {"initial_state": h0, "cu_seqlens": cu_seqlens, "grad_o": grad_o}
    check_same_device("ssd_bwd", q, **named, grad_final_state=grad_state)
    nothing = q.new_empty((0,)), w.new_empty((0,))
    dD = nothing[1] if D is None else D.new_empty(D.shape)
    dz = nothing[0] if z is None else z.new_empty(z.shape)
    dh0 = nothing[1] if h0 is None else h0.new_empty(h0.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v, w, g)), dD, dz, dh0


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, cu_seqlens, scale, output_final_state, keep = inputs
    z, ungated = tensors[6], output[2]
    ctx.mark_non_differentiable(ungated)
    ctx.save_for_backward(*tensors, cu_seqlens, ungated if keep and z is not None else None)
    ctx.scale, ctx.output_final_state = scale, output_final_state
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_state, _):  # type: ignore[no-untyped-def]
    *tensors, h0, cu_seqlens, ungated = ctx.saved_tensors
    grad_o = torch.zeros_like(tensors[2]) if grad_o is None else grad_o
    grad_state = grad_state if ctx.output_final_state else None
    grads = torch.ops.lsm.ssd_bwd(*tensors, ungated, h0, cu_seqlens, ctx.scale, grad_o, grad_state)
    given = zip(grads, (*tensors, h0), strict=True)
    return *(None if x is None else d for d, x in given), *(None for _ in range(4))


def _refuse_double_backward(ctx, *grads):  # type: ignore[no-untyped-def]
    raise RuntimeError(no_double_backward("ssd_bwd"))


torch.library.register_fake("lsm::ssd_fwd")(_fwd_fake)
torch.library.register_fake("lsm::ssd_bwd")(_bwd_fake)
torch.library.register_autograd("lsm::ssd_fwd", _backward, setup_context=_setup_context)
torch.library.register_autograd("lsm::ssd_bwd", _refuse_double_backward)


def gated_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool
) -> Tensor:
    dtype, wide = y.dtype, accumulation_dtype(y)
    gate = F.silu(z.to(wide))
    y = y.to(wide) if norm_before_gate else y.to(wide) * gate
    y = F.rms_norm(_split_last(y, groups), (y.shape[-1] // groups,), eps=eps).flatten(-2)
    y = y * weight.to(wide)
    return (y * gate if norm_before_gate else y).to(dtype)
