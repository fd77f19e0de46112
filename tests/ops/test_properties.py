"""Random shapes, gates and layouts, shrunk to the smallest that fails."""

from __future__ import annotations

from cases import GLA, Case
from checks import assert_accepted, definition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from impls import IMPLS
from inputs import make_inputs

small = st.integers(1, 20)
GATES = st.one_of(
    st.sampled_from(["mixed", "resets", "positive", "-inf"]),
    st.floats(-100, 0.02).map(lambda x: f"{x:.3g}"),
)


@st.composite
def chunk_cases(draw: st.DrawFn, impl: str) -> Case:
    tensor_cores = impl != "cpu"
    H = draw(st.integers(1, 3))
    dtypes = [*([] if tensor_cores else ["f64"]), "f32", "bf16", "f16", "bf16+f32"]
    return Case(
        GLA,
        T=draw(st.integers(0, 40 if tensor_cores else 90)),
        heads=(H, H * draw(st.integers(1, 3))),
        dims=(draw(small), draw(small)),
        dtype=draw(st.sampled_from(dtypes)),
        gate=draw(GATES),
        batch=draw(st.sampled_from([0, 1, 2, "int32", "int64"])),
        state=draw(st.sampled_from(["none", "initial", "final", "both"])),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "offset"])),
        scale=draw(st.sampled_from([None, 1.0, -0.5])),
    )


def check(impl: str, case: Case) -> None:
    x = make_inputs(case)
    implementation = IMPLS[impl]
    assert_accepted(implementation.run(GLA, x), *definition(GLA, x), x)


def examples(n: int):
    """Derandomised: the same examples in every run."""
    return settings(
        max_examples=n, deadline=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip


def test_any_call(impl) -> None:
    examples(20 if impl.name == "emulator" else 100)(
        given(chunk_cases(impl.name))(lambda case: check(impl.name, case))
    )()
