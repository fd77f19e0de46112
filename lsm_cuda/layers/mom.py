"""Mixture of memories: a router sends every token to a few of many states."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import FusedRMSNormGated, RMSNorm, ShortConvolution
from ..modules.precision import wide
from ..ops import chunk_gated_delta_rule, fused_gdn_gate
from ._gated import add_convs
from .common import split_heads
from .recurrent import Call, RecurrentLayer, check_mode, width_of

__all__ = ["MomAttention"]


class MomAttention(RecurrentLayer):
    r"""The gated delta rule over several memories, of which every token writes and reads ``topk``.

    Memory m, where chosen, does ``S_m = e^g (1 − β k kᵀ) S_m + β k vᵀ`` with k, v, β, g of its own
    projections and k, q of unit length; elsewhere it stays. Outputs are summed with the router's
    weights.

    Args:
        hidden_size: width of input and output.
        head_dim: query and key channels per head.
        num_heads: heads.
        expand_v: value channels per head in units of ``head_dim``.
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        use_output_gate: multiply the normalised output by SiLU of a projection of the input.
        use_short_conv: put a short causal convolution over the tokens of a memory behind q, k, v;
            without, there is just its SiLU.
        conv_size, conv_bias: its taps, and whether it has a bias.
        layer_idx: place in the cache; needed to use one.
        norm_eps: of the output norm.
        num_memories: memories M to choose from.
        topk: memories per token.
        capacity: taken for FLA's sake, whose layer does not heed it: no token is dropped.
        shared_mem: one more memory that every token uses, with weight 1.
        single_kv_proj: the same projections for all memories.

    The router's logits, for a loss that balances loads, are ``gate(hidden_states)``. States are
    ``[N, M, H, K, V]``; a step copies all of them.

    Raises:
        ValueError: sizes that do not divide, an unknown mode, or ``topk`` not in 1 to M.

    Source: MoM: Linear Sequence Modeling with Mixture-of-Memories, arXiv:2502.13685.

    Example:
        >>> layer = MomAttention(hidden_size=64, head_dim=16, num_heads=2)
        >>> layer(torch.randn(1, 10, 64))[0].shape
        torch.Size([1, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        head_dim: int = 256,
        num_heads: int = 4,
        expand_v: float = 2,
        mode: str = "chunk",
        use_output_gate: bool = True,
        use_short_conv: bool = True,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        num_memories: int = 8,
        topk: int = 2,
        capacity: float = 1.0,
        shared_mem: bool = False,
        single_kv_proj: bool = False,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        if not 1 <= topk <= num_memories:
            raise ValueError(
                f"MomAttention: topk must be in 1 to num_memories = {num_memories}, got {topk}"
            )
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.key_dim = num_heads * head_dim
        self.value_dim = width_of(self, "expand_v", self.key_dim, expand_v, num_heads)
        self.head_v_dim = self.value_dim // num_heads
        self.num_memories = num_memories
        self.topk = topk
        self.shared_mem = shared_mem
        self.single_kv_proj = single_kv_proj
        self.use_output_gate = use_output_gate
        widths = {"k": self.key_dim, "v": self.value_dim, "b": num_heads, "a": num_heads}
        self.q_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.gate = nn.Linear(hidden_size, num_memories, bias=False)
        for name, size in widths.items():
            if single_kv_proj or shared_mem:
                self.add_module(f"shared_{name}", nn.Linear(hidden_size, size, bias=False))
            if not single_kv_proj:
                own = [nn.Linear(hidden_size, size, bias=False) for _ in range(num_memories)]
                self.add_module(f"{name}_proj", nn.ModuleList(own))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        dt = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(dt + (-(-dt).expm1()).log())  # softplus of this is dt
        self.use_short_conv = use_short_conv
        if use_short_conv:
            widths = {"q": self.key_dim, "k": self.key_dim, "v": self.value_dim}
            add_convs(self, widths, conv_size, conv_bias)
        if use_output_gate:
            self.g_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
            self.o_norm: nn.Module = FusedRMSNormGated(self.head_v_dim, eps=norm_eps)
        else:
            self.o_norm = RMSNorm(self.head_v_dim, eps=norm_eps, dtype=torch.float32)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)

    def _mix(self, x: Tensor, call: Call) -> Tensor:
        tokens = x.flatten(0, 1)
        routed = _Routed(*self._route(tokens), self.num_memories + self.shared_mem, x, call)
        q, k, v = self.q_proj(tokens)[routed.token], *self._own("kv", tokens, routed)
        b, a = self._own("ba", tokens, routed)
        q, k, v = (
            routed.convolve(getattr(self, f"{name}_conv1d"), y)
            if self.use_short_conv
            else F.silu(y)
            for name, y in zip("qkv", (q, k, v), strict=True)
        )
        q, k, v = (
            split_heads(y, d)
            for y, d in ((q, self.head_dim), (k, self.head_dim), (v, self.head_v_dim))
        )
        g = fused_gdn_gate(a, self.A_log, self.dt_bias)
        o = routed.sum(routed.attend(q, k, v.to(q), g, wide(b).sigmoid())).view(
            *x.shape[:2], self.num_heads, self.head_v_dim
        )
        if self.use_output_gate:
            o = self.o_norm(o, split_heads(self.g_proj(x), self.head_v_dim))
        else:
            o = self.o_norm(o)
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Memories of each token and their weights, ``[L, topk]``, the shared one last."""
        weights, chosen = wide(self.gate(tokens)).softmax(-1).topk(self.topk)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.shared_mem:
            chosen = F.pad(chosen, (0, 1), value=self.num_memories)
            weights = F.pad(weights, (0, 1), value=1.0)
        return chosen, weights

    def _own(self, names: str, tokens: Tensor, routed: _Routed) -> list[Tensor]:
        """Projections of the routed tokens, each by its memory's weights: ``[E, ..]``."""
        if self.single_kv_proj:
            return [getattr(self, f"shared_{name}")(tokens)[routed.token] for name in names]
        parts, projected = torch.split(tokens[routed.token], routed.sizes()), []
        for name in names:
            modules = list(getattr(self, f"{name}_proj"))
            modules += [getattr(self, f"shared_{name}")] if self.shared_mem else []
            projected.append(torch.cat([m(part) for m, part in zip(modules, parts, strict=True)]))
        return projected


class _Routed:
    """Tokens sorted by memory, then by sequence: M · N packed sequences of E tokens in all.

    Args:
        chosen, weights: memories of each of L tokens, ``[L, k]``.
        memories: their number M.
        x: ``[B, T, D]``, L = B · T.
        call: whose states are ``[N, M, ...]``.
    """

    def __init__(
        self, chosen: Tensor, weights: Tensor, memories: int, x: Tensor, call: Call
    ) -> None:
        B, T, _ = x.shape
        if call.cu_seqlens is None:
            N = B
            owner = torch.arange(B, device=x.device).repeat_interleave(T)
        else:
            N = call.cu_seqlens.shape[0] - 1
            # Counting the ends at or before t also skips empty sequences.
            token = torch.arange(T, device=x.device)
            owner = torch.searchsorted(call.cu_seqlens[1:].long(), token, right=True)
        key, self.order = (chosen * N + owner[:, None]).flatten().sort(stable=True)
        self.token = self.order // max(chosen.shape[1], 1)
        every = torch.arange(memories * N + 1, device=x.device)
        self.cu_seqlens = torch.searchsorted(key, every)
        self.weights, self.call, self.memories, self.sequences = weights, call, memories, N

    def sizes(self) -> list[int]:
        """Tokens of each memory."""
        if not self.sequences:
            return [0] * self.memories
        sizes: list[int] = self.cu_seqlens[:: self.sequences].diff().tolist()
        return sizes

    def convolve(self, conv: ShortConvolution, x: Tensor) -> Tensor:
        """``x [E, D]`` along every sequence of a memory."""

        def routed(
            x: Tensor, cache: Tensor | None, cu_seqlens: Tensor | None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            y, new = conv(x, cache=self._split(cache), cu_seqlens=self.cu_seqlens, **options)
            return y, self._join(new)

        return self.call.convolve(routed, x[None])[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """``[E, H, ..]`` to ``[E, H, V]``."""

        def chunk(
            *tensors: Tensor,
            initial_state: Tensor | None,
            output_final_state: bool,
            cu_seqlens: Tensor | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            q, k, v, g, beta = (x.flatten(0, 1)[None] for x in tensors)
            o, new = chunk_gated_delta_rule(
                q,
                k,
                v,
                g,
                beta,
                use_qk_l2norm_in_kernel=True,
                initial_state=self._split(initial_state),
                output_final_state=output_final_state,
                cu_seqlens=self.cu_seqlens,
            )
            return o, self._join(new)

        def step(*tensors: Tensor, state: Tensor) -> Tensor:
            o, new = chunk(
                *(x[None] for x in tensors), initial_state=state, output_final_state=True
            )
            assert new is not None
            state.copy_(new)
            return o[0]

        # Rows of one token where every sequence has one, so that a step is taken.
        time = 1 if self.call.x.shape[1] == 1 else 0
        tensors = (x.unsqueeze(time) for x in (q, k, v, g, beta))
        return self.call.run(chunk, step, *tensors).flatten(0, 1)

    def sum(self, o: Tensor) -> Tensor:
        """``[E, H, V]`` back to ``[L, H, V]``: the weighted sum over a token's memories."""
        o = o[self.order.argsort()].view(*self.weights.shape, *o.shape[1:])
        return torch.einsum("lk,lkhv->lhv", self.weights.to(o), o)

    def _split(self, state: Tensor | None) -> Tensor | None:
        """``[N, M, ...]`` to ``[M · N, ...]``."""
        return None if state is None else state.transpose(0, 1).flatten(0, 1)

    def _join(self, state: Tensor | None) -> Tensor | None:
        if state is None:
            return None
        state = state.view(self.memories, self.sequences, *state.shape[1:])
        return state.transpose(0, 1).contiguous()
