"""Known architectures, whole: captured, through every exact pass, trained a step, compiled.

The reference is the user's module in float64. Deep nets with random weights amplify rounding, so an output in
float32 is judged by how far the module itself, in float32, is from that reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt as go
from graphopt.model import Model
from graphopt.printer import operator_name
from graphopt.transform import Report
from graphopt.verify import verify
from tests import zoo
from tests.compare import relative_error

BATCHES = (2, 3)
ROUNDING, AMPLIFIED = 1e-5, 4.0

# Batch norms that no layer can take: those that come before a ReLU, or after a concatenation.
NORMS_LEFT = {"densenet121": 62}

# What the passes have to find, at least: a preset that stopped doing anything would agree with everything.
FOLDED = {
    "vgg11_bn": 8,
    "resnet18": 20,
    "resnext50_32x4d": 53,
    "wide_resnet50_2": 53,
    "densenet121": 59,
    "mobilenet_v2": 52,
    "mobilenet_v3_small": 34,
    "shufflenet_v2_x1_0": 56,
    "mnasnet0_5": 52,
    "efficientnet_b0": 49,
    "regnet_y_400mf": 53,
    "googlenet": 57,
    "inception_v3": 94,
}
MERGED = {"bert": 3, "llama": 6, "vit": 3}


@dataclass
class Case:
    """A net, what was captured of it, and what the exact passes made of that."""

    net: zoo.ZooNet
    model: Model
    exact: Model
    reports: list[Report]
    references: dict[int, Any]
    noise: float

    def assert_close(self, call: Any) -> None:
        """`call` returns what the module does, at sizes other than it was captured at, too."""
        for batch, reference in self.references.items():
            with torch.no_grad():
                output = call(*self.net.args(batch, seed=batch))
            assert relative_error(_in_double(output), reference) <= max(ROUNDING, AMPLIFIED * self.noise)


@pytest.fixture(scope="module", params=zoo.NAMES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    torch.set_num_threads(1)
    net = zoo.build(request.param)
    model = go.capture(net.module, net.args(), dynamic=net.dynamic)
    text, state = str(model), _copy(model.state_dict())
    exact, reports = go.run(model, "exact")
    assert str(model) == text and _equal(model.state_dict(), state), "the passes changed the model they were given"
    wide = copy.deepcopy(net.module).double()
    with torch.no_grad():
        references = {batch: wide(*_in_double(net.args(batch, seed=batch))) for batch in BATCHES}
        outputs = {batch: _in_double(net.module(*net.args(batch, seed=batch))) for batch in BATCHES}
    noise = max(relative_error(outputs[batch], references[batch]) for batch in BATCHES)
    yield Case(net, model, exact, reports, references, noise)


def test_captured_model_is_the_module(case: Case) -> None:
    verify(case.model)
    assert _equal(case.model.state_dict(), case.net.module.state_dict())
    assert [name for name, _ in case.model.named_parameters()] == [n for n, _ in case.net.module.named_parameters()]
    assert case.model.signature.ranges
    case.assert_close(case.model)


def test_exact_passes_keep_the_outputs(case: Case) -> None:
    verify(case.exact)
    case.assert_close(case.exact)
    edits = {name: sum(len(r.edits) for r in case.reports if r.name == name) for name in {r.name for r in case.reports}}
    calls = [operator_name(node.target) for node in case.exact.graph.nodes if node.op == "call_function"]
    before = [operator_name(node.target) for node in case.model.graph.nodes if node.op == "call_function"]
    folded = before.count("batch_norm") - calls.count("batch_norm")
    assert calls.count("batch_norm") == NORMS_LEFT.get(case.net.name, 0)
    assert folded == FOLDED.get(case.net.name, 0) and bool(edits["fold-batch-norm"]) == bool(folded)
    assert calls.count("split_with_sizes") == MERGED.get(case.net.name, 0)
    assert "dropout" not in calls and len(calls) <= len(before)
    again, reports = go.run(case.exact, "exact", check=False)
    assert not any(report.changed for report in reports) and str(again) == str(case.exact)


def test_tensors_that_no_pass_touched_keep_name_and_value(case: Case) -> None:
    before, after = case.model.state_dict(), case.exact.state_dict()
    for name in before.keys() - after.keys():
        owner = case.net.module.get_submodule(name.rpartition(".")[0])
        merged = isinstance(owner, nn.Linear) and case.net.name in MERGED
        assert isinstance(owner, nn.BatchNorm2d) or merged or "layer_scale" in name or "norm" in name, name
    fused = bool(FOLDED.get(case.net.name)) or case.net.name in ("convnext_tiny", "llama")
    changed = [name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])]
    assert bool(changed) == fused
    assert all(name.endswith((".weight", ".bias")) for name in changed)


@pytest.mark.parametrize("which", ["model", "exact"])
def test_model_is_trainable(case: Case, which: str) -> None:
    model = getattr(case, which).clone()
    trained = {name: p for name, p in model.named_parameters() if name not in model.kept and p.requires_grad}
    assert len(trained) >= 2
    before = _loss(model(*case.net.args()))
    before.backward()
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert not missing
    with torch.no_grad():
        norm = torch.cat([parameter.grad.flatten() for parameter in trained.values()]).norm()
        for parameter in trained.values():
            parameter -= 0.01 * before / norm**2 * parameter.grad
        after = _loss(model(*case.net.args()))
    assert after < before


def test_compiled_model_keeps_the_outputs_at_any_batch_size(case: Case) -> None:
    case.assert_close(go.build(case.exact, target="cpu", backend="tvm", threads=1))


def test_a_perturbed_weight_is_noticed(case: Case) -> None:
    """Keeps the comparison above honest: one percent off in one layer in the middle is seen at the output."""
    model = case.exact.clone()
    weights = [parameter for _, parameter in model.named_parameters() if parameter.dim() > 1]
    with torch.no_grad():
        weights[len(weights) // 2].mul_(1.01)
    with pytest.raises(AssertionError):
        case.assert_close(model)


def _loss(output: Any) -> Tensor:
    return sum((leaf.float() ** 2).mean() for leaf in pytree.tree_leaves(output) if leaf.is_floating_point())


def _in_double(tree: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(widen, tree)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
