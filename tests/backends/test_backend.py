"""What all backends share: the registry, the call structure, input checks, timing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt.backend import Artifact, Timing, backend_names, get_backend
from graphopt.errors import InputError, UsageError
from graphopt.target import Target
from tests.compare import relative_error

BACKENDS = ("reference", "onnxruntime", "tvm")


class Nested(nn.Module):
    """Takes and returns nested structures, with a constant among the inputs and one among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, more: dict[str, Tensor], double: bool = False) -> dict[str, object]:
        y = self.linear(x) + more["bias"]
        return {"y": y, "both": [more["gain"] * y, (y * 2 if double else y * 3, None)]}


def _nested() -> tuple[Nested, tuple[Tensor, dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Nested().eval(), (torch.randn(2, 4), {"bias": torch.randn(3), "gain": torch.randn(3)})


@pytest.fixture(scope="module", params=BACKENDS)
def nested(request: pytest.FixtureRequest) -> Artifact:
    net, args = _nested()
    return go.build(go.capture(net, args), backend=request.param, threads=1)


def test_the_call_structure_is_the_models(nested: Artifact) -> None:
    net, args = _nested()
    assert relative_error(nested(*args), net(*args)) < 1e-6


def test_numpy_in_numpy_out(nested: Artifact) -> None:
    net, args = _nested()
    result = nested(*pytree.tree_map(lambda t: t.numpy(), args))
    expected = net(*args)
    assert isinstance(result["y"], np.ndarray)
    assert result["both"][1][1] is None
    np.testing.assert_allclose(result["both"][1][0], expected["both"][1][0].detach().numpy(), rtol=1e-5)


def test_tensors_by_position_and_by_name(nested: Artifact) -> None:
    net, (x, more) = _nested()
    names = [spec.name for spec in nested.signature.tensor_inputs]
    flat = [x, more["bias"], more["gain"]]
    expected = net(x, more)
    assert relative_error(nested(*flat), expected) < 1e-6
    assert relative_error(nested(flat[0], **dict(zip(names[1:], flat[1:], strict=True))), expected) < 1e-6


def test_wrong_inputs_are_refused_before_anything_runs(nested: Artifact) -> None:
    _, (x, more) = _nested()
    with pytest.raises(InputError, match="has shape"):
        nested(x[:, :2], more)
    with pytest.raises(InputError, match="has dtype float64"):
        nested(x.double(), more)
    with pytest.raises(InputError, match="is a dict of 1"):
        nested(x, {"bias": more["bias"]})
    with pytest.raises(InputError, match="some inputs are torch tensors"):
        nested(x.numpy(), more)
    with pytest.raises(InputError, match="takes a tensor"):
        nested("x", more)
    odd = SimpleNamespace(shape=[2, 4], dtype="float32")  # an array of a package that has lists for shapes
    with pytest.raises(InputError):
        nested(odd, more["bias"], more["gain"])


def test_inputs_like_earlier_ones_are_not_looked_at_again(nested: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all others are: what was accepted once says nothing about another dtype, shape, order or kind."""
    net, (x, more) = _nested()
    flat, expected = (x, more["bias"], more["gain"]), net(x, more)
    nested(*flat)
    asked: list[object] = []
    check = type(nested.signature).check
    monkeypatch.setattr(type(nested.signature), "check", lambda self, given: asked.append(given) or check(self, given))
    assert all(relative_error(nested(*flat), expected) < 1e-6 for _ in range(3))
    assert not asked
    wrong = [
        (x.double(), *flat[1:]),
        (x[:1], *flat[1:]),
        (flat[1], x, flat[2]),
        (x.numpy(), *flat[1:]),
        flat[:2],
        (1, 2, 3),
    ]
    for inputs in wrong:
        with pytest.raises(InputError):
            nested(*inputs)
    assert isinstance(nested(*(tensor.numpy() for tensor in flat))["y"], np.ndarray) and asked


def test_results_do_not_change_when_it_runs_again(nested: Artifact) -> None:
    _, (x, more) = _nested()
    first = nested(x, more)
    kept = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, first)
    nested(x * 100, more)
    assert relative_error(first, kept) == 0


def test_training_afterwards_does_not_change_an_artifact() -> None:
    net, args = _nested()
    model = go.capture(net, args)
    expected = net(*args)
    artifacts = [go.build(model, backend=name, threads=1) for name in BACKENDS]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for artifact in artifacts:
        assert relative_error(artifact(*args), expected) < 1e-6


def test_dynamic_sizes_stay_dynamic_in_every_backend() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(2, 3, 9, 9)
    model = go.capture(net, (x,), dynamic={0: {0: "batch"}})
    for name in BACKENDS:
        artifact = go.build(model, backend=name, threads=2)
        for batch in (1, 2, 5):
            more = torch.randn(batch, 3, 9, 9)
            assert relative_error(artifact(more), net(more)) < 1e-6, (name, batch)


@dataclass
class Pair:
    left: Tensor
    right: Tensor


pytree.register_dataclass(Pair, serialized_type_name="tests.backends.Pair")


class TakesPair(nn.Module):
    def forward(self, pair: Pair) -> Pair:
        return Pair(pair.left + 1, pair.right * 2)


def test_containers_that_torch_knows() -> None:
    pair = Pair(torch.randn(2), torch.randn(2))
    result = go.build(go.capture(TakesPair(), (pair,)), threads=1)(pair)
    assert isinstance(result, Pair)
    assert torch.equal(result.left, pair.left + 1)


def test_unknown_backend_offers_the_nearest() -> None:
    assert set(BACKENDS) <= set(backend_names())
    with pytest.raises(UsageError, match="did you mean onnxruntime"):
        get_backend("onnxruntme")


@pytest.mark.parametrize("threads", [0, -2, 1025, True, 1.5])
def test_numbers_of_threads_that_are_none_are_refused(threads: int) -> None:
    net, args = _nested()
    with pytest.raises(UsageError, match=f"on {threads} threads"):
        go.build(go.capture(net, args), threads=threads)


def test_a_target_of_too_many_cores_needs_a_number_of_threads() -> None:
    net, args = _nested()
    model, many = go.capture(net, args), replace(Target.parse("cpu"), cores=5000)
    with pytest.raises(UsageError, match="on 5000 threads"):
        go.build(model, target=many)
    assert go.build(model, target=many, backend="reference", threads=2).threads == 2


def test_timing_counts_calls_and_orders_quartiles() -> None:
    calls = []
    timing = Timing.measure(lambda: calls.append(1), rounds=7, warmup=2)
    assert len(calls) == 9
    assert timing.rounds == 7
    assert 0 <= timing.q1 <= timing.median <= timing.q3
    assert Timing.measure(lambda: None, rounds=1, warmup=0).q1 > 0
    with pytest.raises(UsageError):
        Timing.measure(lambda: None, rounds=0, warmup=0)


def test_bench_runs_on_the_models_inputs(nested: Artifact) -> None:
    _, args = _nested()
    assert nested.bench(*args, rounds=3, warmup=1).median > 0
