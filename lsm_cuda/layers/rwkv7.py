"""RWKV-7 time mixing, compatible with FLA's checkpoints."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import Cache
from ..modules.precision import wide
from ..ops import chunk_rwkv7, rwkv7_step
from ..ops.gates import l2norm
from ._gated import GroupNorm, TokenShift
from .common import split_heads, unpad
from .recurrent import CachedLayer, Call, check_mode

__all__ = ["RWKV7Attention"]

_SLOWEST = -0.6065306597126334  # −e^{−1/2}: log decays lie between it and 0


class RWKV7Attention(CachedLayer):
    r"""RWKV-7 (Goose): a diagonal decay and a rank-one correction of the state per token.

    Args:
        mode: ``chunk`` or ``fused_recurrent``: FLA's names, served by one kernel.
        hidden_size: width of input and output, and of the keys of all heads.
        head_dim: key channels per head. None: from ``num_heads``.
        num_heads: heads; decides where ``head_dim`` is None.
        decay_low_rank_dim, gate_low_rank_dim, a_low_rank_dim, v_low_rank_dim: ranks of the
            projections of decay, output gate, learning rate and value mix. Default: by
            ``hidden_size``.
        elementwise_affine, norm_eps: of the output norm, over each head; its eps is ``head_dim``
            times that.
        layer_idx: place in the model and the cache; needed to use one.
        fuse_norm: FLA's fused norms; keys are then divided by ``sqrt(|k|² + 1e-6)``, else by
            ``max(|k|, 1e-12)``.
        value_dim: width of the values of all heads. Default: ``hidden_size``.
        num_hidden_layers: layers of the model, which initial values depend on.

    The first layer's values are mixed into those of the others: ``forward`` takes them as
    ``v_first`` and returns them as a fourth result.

    Raises:
        ValueError: sizes that do not divide, or an unknown mode.

    Source: RWKV-7 "Goose" with Expressive Dynamic State Evolution, arXiv:2503.14456.

    Example:
        >>> layer = RWKV7Attention(hidden_size=64, head_dim=32, layer_idx=0)
        >>> o, _, _, v_first = layer(torch.randn(1, 10, 64))
        >>> o.shape, v_first.shape
        (torch.Size([1, 10, 64]), torch.Size([1, 10, 64]))
    """

    def __init__(
        self,
        mode: str = "chunk",
        hidden_size: int = 1024,
        head_dim: int | None = 64,
        num_heads: int | None = None,
        decay_low_rank_dim: int | None = None,
        gate_low_rank_dim: int | None = None,
        a_low_rank_dim: int | None = None,
        v_low_rank_dim: int | None = None,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        layer_idx: int | None = None,
        fuse_norm: bool = False,
        value_dim: int | None = None,
        num_hidden_layers: int | None = None,
    ) -> None:
        super().__init__(hidden_size, layer_idx)
        self.mode = check_mode(self, mode, ("chunk", "fused_recurrent"))
        if head_dim is None:
            if num_heads is None:
                raise ValueError("RWKV7Attention: give head_dim or num_heads, got neither")
            head_dim = hidden_size // num_heads if num_heads else 0
        if head_dim < 1 or hidden_size % head_dim:
            raise ValueError(
                f"RWKV7Attention: hidden_size must be a multiple of the heads, got {hidden_size} "
                f"and head_dim {head_dim}"
            )
        self.head_dim = head_dim
        self.num_heads = hidden_size // head_dim
        self.key_dim = hidden_size
        self.value_dim = hidden_size if value_dim is None else value_dim
        if self.value_dim % self.num_heads:
            raise ValueError(
                f"RWKV7Attention: value_dim must be a multiple of the {self.num_heads} heads, "
                f"got {self.value_dim}"
            )
        self.head_v_dim = self.value_dim // self.num_heads
        self.fuse_norm = fuse_norm

        def rank(given: int | None, factor: float) -> int:
            size = factor * hidden_size**0.5
            return max(32, int(round(size / 32) * 32)) if given is None else given

        factor = head_dim / 64
        for name in "rwkvag":
            self.register_parameter(f"x_{name}", nn.Parameter(torch.zeros(1, 1, hidden_size)))
        self.k_k = nn.Parameter(torch.zeros(self.key_dim))
        self.k_a = nn.Parameter(torch.zeros(self.key_dim))
        self.r_k = nn.Parameter(torch.zeros(self.num_heads, head_dim))
        self.r_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.w_lora = _LoRA(
            hidden_size, self.key_dim, rank(decay_low_rank_dim, 2.5 * factor), nn.Tanh()
        )
        if layer_idx != 0:
            self.v_lora = _LoRA(hidden_size, self.value_dim, rank(v_low_rank_dim, 1.7 * factor))
        self.a_lora = _LoRA(hidden_size, self.key_dim, rank(a_low_rank_dim, 2.5 * factor))
        self.g_lora = _LoRA(
            hidden_size, self.value_dim, rank(gate_low_rank_dim, 5), nn.Sigmoid(), bias=False
        )
        self.token_shift = TokenShift()
        self.g_norm = GroupNorm(
            self.num_heads, self.value_dim, head_dim * norm_eps, elementwise_affine
        )
        self.num_hidden_layers = num_hidden_layers
        self.init_projections()

    @torch.no_grad()
    def init_projections(self) -> None:
        """The authors' initial values, where the layer's place is known."""
        layers = self.num_hidden_layers
        if self.layer_idx is None or layers is None:
            return
        D = self.hidden_size
        depth = self.layer_idx / max(layers - 1, 1)
        left = 1 - self.layer_idx / layers
        place = torch.arange(D) / D
        ramp = torch.arange(D) / max(D - 1, 1)
        zigzag = 2 * (torch.arange(D) % self.head_dim) / max(self.head_dim - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()
        for name, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            self.get_parameter(f"x_{name}").copy_(1 - place ** (power * left))
        self.k_k.copy_(0.71 - 0.1 * (ramp - 0.5))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        self.w_lora.set_bias(-5.5 + 6 * ramp ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a_lora.set_bias(-0.19 + 0.3 * zigzag + 0.4 * (ramp - 0.5))
        if self.layer_idx and self.value_dim == D:
            self.v_lora.set_bias(0.73 - 0.4 * (ramp - 0.5))
        if self.g_norm.affine:
            self.g_norm.weight.fill_(((self.layer_idx + 1) / layers) ** 0.7)
        for lora in (self.w_lora, self.a_lora, self.g_lora, getattr(self, "v_lora", None)):
            if lora is not None:
                lora.reset_weights()
        for module, gain in ((self.r_proj, 1.0), (self.k_proj, 0.1), (self.v_proj, 1.0)):
            nn.init.orthogonal_(module.weight, gain)
        nn.init.zeros_(self.o_proj.weight)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        v_first: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None, Cache | None, Tensor]:
        """Mix along time.

        Args:
            hidden_states, attention_mask, past_key_values, use_cache, output_attentions,
                cu_seqlens: as other recurrent layers.
            v_first: what the first layer returned ``[B, T, value_dim]``; needed by the others.

        Returns:
            ``o [B, T, hidden_size]``, None, ``past_key_values``, and ``v_first``.

        Raises:
            ValueError: no ``v_first``; or as other recurrent layers.
        """
        call = Call(self, hidden_states, attention_mask, past_key_values, use_cache, cu_seqlens)
        first = None
        if self.layer_idx != 0:
            if v_first is None:
                raise ValueError(
                    "RWKV7Attention: v_first, the values of the layer with layer_idx=0, is needed"
                )
            first, _, _ = unpad(v_first, attention_mask, cu_seqlens)
        o, v = self._time_mix(call.x, call, first)
        v_first = call.repad(v) if v_first is None or first is None else v_first
        return call.finish(o), None, past_key_values, v_first

    def _time_mix(self, x: Tensor, call: Call, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output, and the values before any mixing."""
        delta = call.convolve(self.token_shift, x) - x
        r, w, k, v, a, g = (x + delta * self.get_parameter(f"x_{name}") for name in "rwkvag")
        shifted_v = v
        r, k, v = self.r_proj(r), self.k_proj(k), self.v_proj(v)
        w = split_heads(_SLOWEST * wide(self.w_lora(w)).sigmoid(), self.head_dim)
        own = v
        if first is not None:
            v = torch.lerp(v, first.to(v), self.v_lora(shifted_v).sigmoid())
        a = self.a_lora(a).sigmoid()
        kk = split_heads(k * self.k_k, self.head_dim)
        kk = l2norm(kk) if self.fuse_norm else F.normalize(wide(kk), dim=-1).to(kk.dtype)
        k = k + k * (a - 1) * self.k_a
        r, k, a = (split_heads(y, self.head_dim).to(r.dtype) for y in (r, k, a))
        v = split_heads(v, self.head_v_dim)
        kk, v = kk.to(r.dtype), v.to(r.dtype)
        o = call.run(chunk_rwkv7, rwkv7_step, r, w, k, v, -kk, kk * a)
        o = split_heads(self.g_norm(o.flatten(-2)), self.head_v_dim)
        o = o + (r * k * self.r_k).sum(-1, keepdim=True) * v
        y: Tensor = self.o_proj(o.flatten(-2) * self.g_lora(g))
        return y, own


class _LoRA(nn.Module):
    """``W₂ f(W₁ x) + b`` under FLA's parameter names."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        low_rank_dim: int,
        activation: nn.Module | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.lora = nn.Sequential(
            nn.Linear(input_dim, low_rank_dim, bias=False),
            activation or nn.Identity(),
            nn.Linear(low_rank_dim, output_dim, bias=bias),
        )

    def reset_weights(self) -> None:
        """Without effect at first: zeros, then small orthogonal rows."""
        nn.init.zeros_(self.get_parameter("lora.0.weight"))
        up = self.get_parameter("lora.2.weight")
        nn.init.orthogonal_(up, 0.1 * max(1.0, up.shape[1] / up.shape[0]) ** 0.5)

    def set_bias(self, values: Tensor) -> None:
        self.get_parameter("lora.2.bias").copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lora(x)
        return y
