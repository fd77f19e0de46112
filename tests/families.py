"""Operators built around the chunk engine: their definitions, and one way to compare them.

Adding one is a row in FAMILIES; test_families.py then holds it to its definition and to the laws.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from checks import assert_accepted
from inputs import Inputs, Tensors, gates
from torch import Tensor
from torch.nn.functional import logsigmoid

from lsm_cuda import ops, reference

Call = Callable[..., tuple[Tensor, Any]]

# Nearer than this, in units of what is compared, bf16 cannot tell the sides: 2.5 of its ulps.
KINK = 1e-2
SIZES = {"B": 2, "H": 2, "HV": 2, "HQ": 2, "K": 12, "V": 10, "M": 9}


@dataclass(frozen=True)
class Family:
    """An operator, its definition, and what its arguments are.

    ``tensors``: differentiable arguments in order, with dims and how their values are drawn:
    normal, gate (a log decay), unit (in 0..1), positive (e to a normal), logits (normal, times 4),
    direction (of length 1), gram (a matrix times its transpose).
    ``kinks``: how far, relatively, arguments are from where the derivative jumps. Arguments nearer
    than half precision can tell are drawn again: there, either derivative is right.
    """

    name: str
    chunk: Call
    step: Callable[..., Tensor]
    definition: Call
    tensors: dict[str, str] = field(hash=False)
    state: tuple[str, ...] = ("N HV K V",)
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    kinks: Callable[[Call_], float] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Call_:
    """Arguments of one call."""

    tensors: Tensors
    states: tuple[Tensor, ...] | None = None
    cu_seqlens: Tensor | None = None


def row(name: str, tensors: dict[str, str], **rest: Any) -> Family:
    """chunk_<name>, <name>_step and the definition <name>, if nothing else is said."""
    options = rest.pop("options", {})
    chunk = partial(rest.pop("chunk", None) or getattr(ops, f"chunk_{name}"), **options)
    step = partial(rest.pop("step", None) or getattr(ops, f"{name}_step"), **options)
    definition = partial(rest.pop("definition", None) or getattr(reference, name), **options)
    label = "-".join([name, *(str(v) for v in options.values())])
    return Family(label, chunk, step, definition, tensors, **rest)


QKV = {"q": "B T H K", "k": "B T H K", "v": "B T HV V"}
SLOTS = {"q": "B T HQ K", "k": "B T H K", "v": "B T H V", "s": "B T H M unit", "g": "B T H M gate"}
RWKV = {"r": "B T H K", "k": "B T H K", "v": "B T HV V", "w": "B T HV K gate", "u": "HV K"}


def stateless(definition: Callable[..., Tensor]) -> Call:
    """A definition that sums over pairs of tokens, which has no state to start from or end with."""

    def call(initial_state=None, **arguments):  # type: ignore[no-untyped-def]
        assert initial_state is None
        return definition(**arguments), None

    return call


FAMILIES = [
    row("rwkv6", RWKV, definition=reference.finch, sizes={"HV": 4}),
    row("rwkv5", RWKV | {"w": "HV K gate", "u": "B HV K"}, definition=reference.finch),
    row("hgrn2", {"q": "B T H K", "v": "B T H V", "g": "B T H K gate"}),
    row("metala", {"q": "B T H K", "v": "B T H V", "g": "B T H K gate", "w_aug": "H K"}),
    row("lightnet", QKV | {"k": "B T H K logits"}, state=("N H K V", "N 1 H K")),
    row(
        "regla",
        QKV | {"k": "B T H K logits", "g": "B T H K logits", "r": "B T H K logits"},
        state=("N H K V", "N H integer"),
    ),
    row(
        "two_sided",
        QKV | {"g": "B T HV K gate", "gv": "B T HV V gate"},
        chunk=ops.chunk_gla,
        step=ops.gla_step,
        definition=reference.two_sided_gated_linear_attention,
        sizes={"HV": 4},
    ),
    row(
        "lcsm",
        {
            "e": "B T H K",
            "i": "B T HV V",
            "s": "B T H K",
            "o": "B T HV K gate",
            "ov": "B T HV V gate",
        },
        sizes={"HV": 4},
    ),
    row("gsa", SLOTS, state=("N H K M", "N H M V"), sizes={"HQ": 4}),
    *(
        row("gsa", SLOTS, state=("N H K M", "N H M V"), options={"activation": activation})
        for activation in ("swish", "relu", "relu2", "none")
    ),
    row(
        "abc",
        {"q": "B T HQ K", "k": "B T H K", "v": "B T H V", "s": "B T H M logits"},
        state=("N H K M", "N H M V", "N 1 H M"),
        sizes={"HQ": 4},
    ),
    row("based", QKV, definition=stateless(reference.based), state=(), sizes={"HV": 4}),
    row("rebased", QKV, definition=stateless(reference.rebased), state=()),
]


def normalized(definition: Callable[..., Any]) -> Call:
    """linear_attn's z ``[N, 1, H, K]`` is one per key head, the definition's one per value head."""

    def call(q, k, v, initial_state=None, **rest):  # type: ignore[no-untyped-def]
        group = v.shape[2] // q.shape[2]
        if initial_state is not None:
            S, z = initial_state
            initial_state = S, z.squeeze(1).repeat_interleave(group, 1)
        o, (S, z) = definition(q, k, v, initial_state=initial_state, **rest)
        return o, (S, z[:, None, ::group])

    return call


def constant(decay: Tensor | None = None) -> Call:
    """simple_gla with one decay per head."""

    def call(q, k, v, g_gamma=decay, **rest):  # type: ignore[no-untyped-def]
        g = g_gamma.to(q.dtype).expand(v.shape[:3])
        return reference.simple_gated_linear_attention(q, k, v, g, **rest)

    return call


def from_bound(input_gate: str, x: Call_) -> float:
    """mLSTM divides by the larger of two numbers; how far from equal they are, over all tokens."""
    q, k, i, f = (x.tensors[name].double() for name in "qkif")
    state = None
    if x.states is not None:
        _, n, m = (s.double() for s in x.states)
        state = (n * m.exp()[..., None] if input_gate == "exp" else n)[..., None]
    weight = i.exp() if input_gate == "exp" else i.sigmoid()
    below, _ = reference.simple_gated_linear_attention(
        q, k, weight[..., None], logsigmoid(f), initial_state=state, cu_seqlens=x.cu_seqlens
    )
    return min((below.abs() - 1).abs().flatten().tolist(), default=1.0)


def rfa(q, k, v, g, **rest):  # type: ignore[no-untyped-def]
    return reference.normalized_linear_attention(q, k, v, g, 1 - g.exp(), **rest)


def ssd(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba-2's names for what other operators call v, g, k, q; ``scan`` in any of its forms."""

    def call(*, initial_state=None, output_final_state=None, state=None, **rest):  # type: ignore[no-untyped-def]
        if state is not None:
            return scan(state, **rest)
        if output_final_state is not None:
            packed = rest.get("cu_seqlens") is not None
            rest["return_varlen_states" if packed else "return_final_states"] = output_final_state
        result = scan(**rest, initial_states=initial_state)
        return result if isinstance(result, tuple) else (result, None)

    return partial(call, dt_softplus=True)


POSITIVE = QKV | {"q": "B T H K positive", "k": "B T H K positive"}
MLSTM = POSITIVE | {"i": "B T HV logits", "f": "B T HV logits"}
SSD = {
    "x": "B T HV V",
    "dt": "B T HV",
    "A": "HV gate",
    "B": "B T H K",
    "C": "B T H K",
    "D": "HV V",
    "z": "B T HV V",
    "dt_bias": "HV",
}

FAMILIES += [
    row(
        "linear_attn",
        POSITIVE,
        definition=normalized(reference.normalized_linear_attention),
        state=("N HV K V", "N 1 H K positive"),
        sizes={"HV": 4},
    ),
    row(
        "rfa",
        POSITIVE | {"g": "B T HV gate"},
        definition=rfa,
        state=("N HV K V", "N HV K positive"),
    ),
    row(
        "simple_gla",
        QKV | {"g": "B T HV gate"},
        definition=reference.simple_gated_linear_attention,
        sizes={"HV": 4},
    ),
    row(
        "simple_gla constant",
        QKV | {"g_gamma": "HV gate"},
        chunk=ops.chunk_simple_gla,
        step=lambda v, g_gamma, **rest: ops.simple_gla_step(
            v=v, g=g_gamma.expand(v.shape[:2]), **rest
        ),
        definition=constant(),
    ),
    row("retention", QKV, definition=constant(ops.retention_log_decay(4)), sizes={"HV": 4}),
    row(
        "lightning_attn",
        QKV,
        chunk=partial(ops.chunk_lightning_attn, layer_idx=1, num_layers=4),
        step=partial(ops.lightning_attn_step, layer_idx=1, num_layers=4),
        definition=constant(-ops.lightning_slopes(2, 1, 4)),
    ),
    *(
        row(
            "mlstm",
            MLSTM,
            state=("N HV K V", "N HV K positive", "N HV"),
            sizes={"HV": 4},
            options={"input_gate": gate},
            kinks=partial(from_bound, gate),
        )
        for gate in ("exp", "sigmoid")
    ),
    row(
        "ssd",
        SSD,
        chunk=ssd(ops.mamba_chunk_scan_combined),
        step=ssd(ops.selective_state_update),
        definition=ssd(reference.mamba2),
        state=("N HV V K",),
        sizes={"HV": 4},
    ),
    row(
        "log_linear_attn",
        QKV | {"g": "B T HV gate", "level_scales": "B T HV L"},
        definition=stateless(lambda **x: reference.log_linear_attention(**x)[0]),
        state=(),
        sizes={"HV": 4, "L": 9},
    ),
]


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gated_delta_net(q, k, v, g, beta, A_log, dt_bias, **rest):  # type: ignore[no-untyped-def]
    g = -A_log.exp() * (g + dt_bias).logaddexp(torch.zeros_like(g))
    return reference.gated_delta_rule(unit(q), unit(k), v, g, 2 * beta.sigmoid(), **rest)


def kimi(q, k, v, g, beta, A_log, dt_bias, bound=None, **rest):  # type: ignore[no-untyped-def]
    x, rate = g + dt_bias.view(g.shape[-2:]), A_log.exp().unsqueeze(-1)
    g = -rate * x.logaddexp(torch.zeros_like(x)) if bound is None else bound * (rate * x).sigmoid()
    return reference.kda(unit(q), unit(k), v, g, beta.sigmoid(), **rest)


def product(call: Callable[..., Any], **options: Any) -> Call:
    """A token's micro-steps are a dimension of their own in the tests, n, flat in the operator."""

    def flat_steps(k, v, beta, **rest):  # type: ignore[no-untyped-def]
        k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
        return call(k=k, v=v, beta=beta, num_householder=2, **rest, **options)

    return flat_steps


def rwkv7(r, w, k, v, kk, a, **rest):  # type: ignore[no-untyped-def]
    return reference.dplr(r, k, v, -kk, kk * a, w, scale=1.0, **rest)


def rwkv7_step(kk: Tensor, a: Tensor, **rest: Any) -> Tensor:
    return ops.rwkv7_step(a=-kk, b=kk * a, **rest)


def mesa(initial_state=None, **rest):  # type: ignore[no-untyped-def]
    kk, kv = (None, None) if initial_state is None else initial_state
    o, *states = ops.chunk_mesa_net(h_kk_init=kk, h_kv_init=kv, max_CG_iteration=40, **rest)
    return o, None if states[0] is None else tuple(states)


def fast_weights(q, k, v, beta, **rest):  # type: ignore[no-untyped-def]
    def features(x: Tensor) -> Tensor:
        r = torch.cat([x, -x], -1).relu()
        y = torch.cat([r * r.roll(1, -1), r * r.roll(2, -1)], -1)  # nu = 2
        return y / y.sum(-1, keepdim=True).clamp(min=1e-6)

    return reference.delta_rule(features(q), features(k), v, beta, scale=1.0, **rest)


DELTA = QKV | {"k": "B T H K direction", "beta": "B T HV unit"}
SCALAR = {"g": "B T HV gate"}
CHANNELS = {"g": "B T HV K gate"}
NORM = {"use_qk_l2norm_in_kernel": True}
IN_KERNEL = NORM | {"use_beta_sigmoid_in_kernel": True, "use_gate_in_kernel": True}
LOGITS = QKV | {"g": "B T HV logits", "beta": "B T HV logits", "A_log": "HV", "dt_bias": "HV"}
KIMI = LOGITS | {"g": "B T HV K logits", "dt_bias": "HVK"}
PRODUCT = {"k": "B T n H K direction", "v": "B T n HV V", "beta": "B T n HV unit"}
LONGHORN = QKV | {"beta": "B T HV V positive"}

FAMILIES += [
    row("delta_rule", DELTA, sizes={"HV": 4}),
    row("gated_delta_rule", DELTA | SCALAR, sizes={"HV": 4}),
    row(
        "gated_delta_rule from logits",
        LOGITS,
        chunk=partial(ops.chunk_gated_delta_rule, **IN_KERNEL, allow_neg_eigval=True),
        step=partial(ops.gated_delta_rule_step, **IN_KERNEL, allow_neg_eigval=True),
        definition=gated_delta_net,
    ),
    row("kda", DELTA | CHANNELS, sizes={"HV": 4}),
    *(
        row(
            f"kda from logits, {bound}",
            KIMI,
            chunk=partial(ops.chunk_kda, **IN_KERNEL, lower_bound=bound),
            step=partial(ops.kda_step, **IN_KERNEL, lower_bound=bound),
            definition=partial(kimi, bound=bound),
        )
        for bound in (None, -5.0)
    ),
    row(
        "gated_delta_product",
        {"q": "B T H K"} | PRODUCT | SCALAR,
        chunk=product(ops.chunk_gated_delta_product),
        definition=product(reference.gated_delta_rule),
        sizes={"HV": 4, "n": 2},
    ),
    row(
        "delta_product",
        {"q": "B T H K"} | PRODUCT,
        chunk=product(ops.chunk_gated_delta_product, g=None),
        step=partial(ops.gated_delta_product_step, g=None),
        definition=product(reference.delta_rule),
        sizes={"n": 2},
    ),
    row("comba", DELTA | SCALAR | {"p": "B T H K direction"}, sizes={"HV": 4}),
    row(
        "rwkv7",
        {name: dims for name, dims in RWKV.items() if name != "u"}
        | {"kk": "B T H K direction", "a": "B T H K unit"},
        chunk=ops.fused_mul_recurrent_rwkv7,
        step=rwkv7_step,
        definition=rwkv7,
    ),
    row("longhorn", LONGHORN, sizes={"HV": 4}),
    row("longhorn", LONGHORN, sizes={"HV": 4}, options={"diagonal": True}),
    row(
        "mesa_net",
        {"q": "B T H K", "k": "B T H K direction", "v": "B T H V", "g": "B T H gate"}
        | {"beta": "B T H unit", "lamb": "H K positive"},
        chunk=mesa,
        step=partial(ops.mesa_net_step, max_CG_iteration=40),
        state=("N H K K gram", "N H K V"),
    ),
    row(
        "fwp",
        QKV | {"beta": "B T HV unit"},
        chunk=partial(ops.chunk_fwp, nu=2),
        step=partial(ops.fwp_step, nu=2),
        definition=fast_weights,
        state=("N HV F V",),
        sizes={"HV": 4},
    ),
]


def draw(
    family: Family,
    T: int = 37,
    dtype: torch.dtype = torch.float32,
    gate: str = "mixed",
    cu_seqlens: Sequence[int] | None = None,
    states: bool = True,
    **sizes: int,
) -> Call_:
    """Seeded arguments; gates in fp32 where queries are in half precision."""
    N = None if cu_seqlens is None else len(cu_seqlens) - 1
    sizes = SIZES | family.sizes | sizes | {"T": T, "1": 1}
    if N is not None:
        sizes["B"] = 1
    sizes["N"] = sizes["B"] if N is None else N
    sizes |= {"HVK": sizes["HV"] * sizes["K"], "F": 4 * sizes["K"]}
    rng = torch.Generator().manual_seed(zlib.crc32(f"{family} {T} {gate} {N}".encode()))
    boundaries = None if cu_seqlens is None else torch.tensor(cu_seqlens)

    def make(dims: str, dtype: torch.dtype) -> Tensor:
        *names, kind = dims.split() if dims.split()[-1] not in sizes else [*dims.split(), "normal"]
        shape = tuple(sizes[n] for n in names)
        if kind == "gate":
            return gates(gate, shape, rng).to(torch.promote_types(dtype, torch.float32))
        if kind == "unit":
            return torch.rand(shape, generator=rng, dtype=torch.float64).to(dtype)
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        if kind == "positive":
            return x.exp().to(dtype)
        if kind == "direction":
            return (x / x.norm(dim=-1, keepdim=True)).to(dtype)
        if kind == "gram":
            return (x @ x.mT).to(dtype)
        if kind == "integer":
            return (4 * x).round().to(dtype)
        return (4 * x if kind == "logits" else x).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    while True:
        tensors = {name: make(dims, dtype) for name, dims in family.tensors.items()}
        initial = None
        if states and family.state:
            initial = tuple(make(dims, wide) for dims in family.state)
        x = Call_(tensors, initial, boundaries)
        if family.kinks is None or family.kinks(x) > KINK:
            return x


def flat(state: Any) -> tuple[Tensor, ...]:
    return () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)


def packed(family: Family, states: tuple[Tensor, ...] | None) -> Any:
    """As the operator takes it: one tensor, or a tuple."""
    return None if states is None else states[0] if len(family.state) == 1 else states


def upstream(name: str, like: Tensor) -> Tensor:
    """A seeded gradient of the result ``name``, in values that every dtype has."""
    rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(like.shape, generator=rng, dtype=torch.float32).bfloat16()
    return values.to(like.device, like.dtype)


def gradients(call: Call, family: Family, x: Call_, dtype: torch.dtype | None = None) -> Tensors:
    """Results of ``call`` and the gradients of all arguments; in ``dtype`` if given."""

    def leaf(t: Tensor) -> Tensor:
        t = t.detach() if dtype is None else t.detach().to(dtype)
        return t.requires_grad_()

    tensors = {name: leaf(t) for name, t in x.tensors.items()}
    states = None if x.states is None else tuple(leaf(s) for s in x.states)
    o, final = call(**tensors, initial_state=packed(family, states), cu_seqlens=x.cu_seqlens)
    results = {"o": o} | {f"final_state {i}": s for i, s in enumerate(flat(final))}
    leaves = {f"d{name}": t for name, t in tensors.items()}
    leaves |= {f"dinitial_state {i}": s for i, s in enumerate(states or ())}
    ends = {name: t for name, t in results.items() if t.requires_grad}
    grads = torch.autograd.grad(
        list(ends.values()), list(leaves.values()), [upstream(n, t) for n, t in ends.items()],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    detached = {name: t.detach() for name, t in results.items()}
    return detached | dict(zip(leaves, grads, strict=True))


def definition(family: Family, x: Call_) -> tuple[Tensors, Tensors]:
    """The truth, in fp64, and the same in fp32."""
    truth, same = (
        gradients(family.definition, family, x, d) for d in (torch.float64, torch.float32)
    )
    return truth, same


def operator(family: Family) -> Call:
    """The operator, with final states where its definition has some."""
    return partial(family.chunk, output_final_state=bool(family.state))


def assert_rule(actual: Tensors, expected: tuple[Tensors, Tensors], x: Call_) -> None:
    """The acceptance rule of checks.py, for the results that are there."""
    truth, same = ({name: t[name] for name in actual} for t in expected)
    assert_accepted(actual, truth, same, Inputs(x.tensors, grad_o=truth["o"]))
