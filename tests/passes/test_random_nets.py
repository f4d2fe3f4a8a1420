"""Random nets through the passes that fold and merge: the outputs stay what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import graphopt as go
from graphopt.transform import Report
from tests import random_steps as rs
from tests.compare import relative_error
from tests.random_nets import Net
from tests.strategies import nets


def agrees(net: Net, pipeline: str) -> list[Report]:
    """The reports of a pipeline that leaves the outputs alone at two batch sizes, and the model when run again."""
    net = net.double()
    model = go.capture(net, net.args(2, dtype=torch.float64), dynamic={"x": {0: "batch"}})
    after, reports = go.run(model, pipeline, check=False)
    for size in (2, 3):
        args = net.args(size, seed=7, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(after(*args), net(*args)) <= 1e-9
    again, _ = go.run(after, pipeline, check=False)
    assert str(again) == str(after)
    return reports


def sample(strategy: st.SearchStrategy[Net], pipeline: str) -> Counter[str]:
    """The number of edits by pass over fifty nets, all of which agree."""
    edits: Counter[str] = Counter()

    @settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(net: Net) -> None:
        for report in agrees(net, pipeline):
            edits[report.name] += len(report.edits)

    check()
    return edits


def test_random_nets_compute_the_same() -> None:
    edits = sample(nets(max_steps=10), "exact")
    assert edits["fold-batch-norm"] > 5 and edits["remove-identity"] > 5, edits


@st.composite
def foldable_nets(draw: st.DrawFn) -> Net:
    """Convolutions of every kind between norms, scales and shifts, with an activation or a second user now and then."""
    kinds: list[st.SearchStrategy[Callable[[int], rs.Step]]] = [
        st.builds(
            lambda kernel, padding, groups, bias, transposed: lambda x: rs.Conv(
                x, 4, kernel, padding=min(padding, kernel // 2), groups=groups, bias=bias, transposed=transposed
            ),
            st.sampled_from((1, 2, 3)), st.integers(0, 1), st.sampled_from((1, 2, 4)), st.booleans(), st.booleans(),
        ),
        st.builds(lambda affine: lambda x: rs.BatchNorm(x, affine), st.booleans()),
        st.builds(lambda by: lambda x: rs.Scale(x, by), st.sampled_from((2.0, -0.5, 0.0))),
        st.builds(lambda by: lambda x: rs.Shift(x, by), st.sampled_from((1.0, -0.5))),
        st.sampled_from((rs.ChannelScale, rs.ChannelShift)),
        st.sampled_from((rs.Activation, lambda x: rs.Combine(x, x), lambda x: rs.Permute(x, (0, 1, 3, 2)))),
    ]  # fmt: skip
    order = draw(st.lists(st.sampled_from((0, 0, 0, 1, 1, 2, 3, 4, 4, 5)), min_size=2, max_size=8))
    return Net((4, 17, 17), tuple(draw(kinds[kind])(x) for x, kind in enumerate(order)))


def test_random_layers_with_norms_scales_and_shifts_compute_the_same() -> None:
    edits = sample(foldable_nets(), "repeat(fuse-affine,fold-batch-norm)")
    assert edits["fold-batch-norm"] > 10 and edits["fuse-affine"] > 50, edits


@st.composite
def parallel_nets(draw: st.DrawFn) -> Net:
    """A few linear layers on one input, each read by something that cares about the order of elements."""
    widths, biases = st.sampled_from((4, 6, 1, 8)), st.booleans()
    layers = [rs.Linear(0, draw(widths), draw(biases)) for _ in range(draw(st.integers(2, 4)))]
    readers = [draw(st.sampled_from(_readers(x, layer.out))) for x, layer in enumerate(layers, start=1)]
    return Net((5, 8), (*layers, *readers))


def _readers(x: int, width: int) -> list[rs.Step]:
    plain = [kind(x) for kind in (rs.Activation, rs.Flatten, rs.LayerNorm, rs.BatchNorm, rs.Scale)]
    return [*plain, rs.Permute(x, (0, 2, 1)), rs.Unflatten(x, 2, (1, width)), rs.Roll(x, 2, 1)]


def test_random_parallel_layers_compute_the_same() -> None:
    edits = sample(parallel_nets(), "merge-parallel-linear")
    assert edits["merge-parallel-linear"] > 50, edits
