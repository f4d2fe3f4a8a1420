"""Pipelines: text form, verification, numeric check, fixed points, failures that leave nothing behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt import registry
from graphopt.check import relative_error, tolerance
from graphopt.errors import CheckFailed, PassFailed, UsageError, VerifyError
from graphopt.instruments import DumpAfter, PrintAfter, TimingTree
from graphopt.pipeline import Pipeline
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class ScaleWeights(Pass):
    """Multiplies every conv weight; a wrong pass when the factor is not 1."""

    name: ClassVar[str] = "scale-weights"
    factor: float = 1.0
    only: str | None = None
    sizes: tuple[int, ...] = ()

    def run(self, rw: Rewriter) -> None:
        for conv in rw.find(aten.conv2d.default):
            weight = rw.argument(conv, "weight")
            if not rw.params[str(weight.target)].is_floating_point():
                rw.skip(conv, "not a floating-point weight")
                continue
            rw.set_tensor(weight, rw.params[str(weight.target)] * self.factor, f"times {self.factor}")


@dataclass(frozen=True)
class Roughly(ScaleWeights):
    """The same under a contract that allows it."""

    name: ClassVar[str] = "roughly"
    contract: ClassVar[Contract] = Contract.CLOSE(0.2)


@dataclass(frozen=True)
class Sneaky(Pass):
    """Edits past the rewriter."""

    name: ClassVar[str] = "sneaky"

    def run(self, rw: Rewriter) -> None:
        for conv in rw.find(aten.conv2d.default):
            conv.args = (*conv.args[:3], [1, 1], [0, 0], [1, 1], 1)


@dataclass(frozen=True)
class Breaks(Pass):
    """Leaves a graph that is invalid."""

    name: ClassVar[str] = "breaks"

    def run(self, rw: Rewriter) -> None:
        for conv in rw.find(aten.conv2d.default):
            rw.call(aten.relu.default, conv, before=conv.next)


@dataclass(frozen=True)
class Needs(Pass):
    """Has an option that has to be given."""

    name: ClassVar[str] = "needs"
    ratio: float

    def run(self, rw: Rewriter) -> None:
        """Nothing."""


PASSES = {cls.name: cls for cls in (ScaleWeights, Roughly, Sneaky, Breaks, Needs)}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known, find = registry.pass_names(), registry.get_pass
    for module in (registry, go.pipeline if hasattr(go, "pipeline") else __import__("graphopt.pipeline").pipeline):
        monkeypatch.setattr(module, "pass_names", lambda: sorted([*known, *PASSES]))
        monkeypatch.setattr(module, "get_pass", lambda name: PASSES.get(name) or find(name))


def make() -> go.Model:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    return go.capture(net, (torch.randn(2, 3, 8, 8),), dynamic={0: {0: "batch"}})


@pytest.mark.parametrize(
    "text",
    [
        "scale-weights",
        "scale-weights{factor=2.0},roughly",
        "repeat(scale-weights,repeat(roughly))",
        "scale-weights{factor=0.5,only=conv,sizes=1;2;3}",
        "needs{ratio=0.25}",
    ],
)
def test_text_round_trips(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    assert Pipeline.parse(f" {text} ") == pipeline


def test_all_problems_at_once_with_the_nearest_names() -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse("scale-wieghts,roughly{facter=2,factor=much},needs")
    text = str(caught.value)
    for words in (
        "no pass 'scale-wieghts': did you mean scale-weights",
        "no option 'facter': did you mean factor",
        "option 'factor' of 'roughly' is a float, not 'much'",
        "'needs' needs the option 'ratio'",
    ):
        assert words in text


@pytest.mark.parametrize("text", ["", ",", "a,,b", "repeat(roughly", "roughly{factor=1", "roughly;sneaky", "roughly)"])
def test_bad_syntax_shows_the_place(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Pipeline.parse(text)
    assert "^" in str(caught.value)


def test_result_is_new_and_shares_nothing() -> None:
    model = make()
    result, (report,) = go.run(model, "roughly{factor=1.02}")
    assert len(report.edits) == 2 and report.changed and result.history == ("roughly{factor=1.02}",)
    assert not {id(t) for t in result.params.values()} & {id(t) for t in model.params.values()}
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.zero_()
    assert model.params["0.weight"].abs().sum() > 0
    assert report.cost_before is not None and report.cost_before.macs == report.cost_after.macs
    json.dumps(report.to_json())


def test_numeric_check_catches_one_percent() -> None:
    model = make()
    with pytest.raises(PassFailed) as caught:
        go.run(model, "scale-weights{factor=1.01}")
    assert isinstance(caught.value.__cause__, CheckFailed) and "exact allows 1e-05" in str(caught.value)
    result, _ = go.run(model, "scale-weights{factor=1.01}", check=False)
    assert relative_error(result(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8))) > 1e-3
    _, (report,) = go.run(model, "roughly{factor=1.01}")
    assert report.check is not None and 1e-3 < report.check.error < report.check.limit == 0.2


def test_edits_past_the_rewriter_fail() -> None:
    with pytest.raises(PassFailed, match="arguments of 'conv2d' were changed"):
        go.run(make(), "sneaky")


def test_invalid_result_fails_with_the_invariant_and_leaves_a_reproducer(tmp_path: Path) -> None:
    model = make()
    secret = model.params["0.weight"].clone()
    with pytest.raises(PassFailed, match="I5") as caught:
        go.run(model, "roughly{factor=1.0},breaks", repro=tmp_path / "repro")
    assert isinstance(caught.value.__cause__, VerifyError)
    assert "after roughly" in str(caught.value) and "-> %relu" in str(caught.value)
    facts = json.loads((tmp_path / "repro" / "repro.json").read_text())
    assert facts["pipeline"] == "roughly,breaks" and facts["passes_done"] == 1
    again = go.load(tmp_path / "repro" / "model.gopt")
    assert not torch.equal(again.params["0.weight"], secret)
    with pytest.raises(PassFailed, match="I5"):
        go.run(again, facts["pipeline"])


def test_passes_that_undo_each_other_are_stopped() -> None:
    with pytest.raises(PassFailed, match="fixed point"):
        go.run(make(), "repeat(scale-weights)", check=False)


def test_limit_counts_edits() -> None:
    _, reports = go.run(make(), "roughly{factor=1.001},roughly{factor=1.001}", limit=3)
    assert [len(report.edits) for report in reports] == [2, 1]


def test_instruments(tmp_path: Path) -> None:
    lines: list[str] = []
    timing = TimingTree()
    go.run(
        make(),
        "roughly{factor=1.02},needs{ratio=1.0}",
        instruments=[PrintAfter("change", lines.append), DumpAfter(tmp_path), timing],
    )
    assert len(lines) == 1 and lines[0].startswith("// after roughly{factor=1.02}\nmodel (")
    assert [path.name for path in tmp_path.iterdir()] == ["000-roughly.txt"]
    assert [child.name for child in timing.root.children] == ["roughly{factor=1.02}", "needs{ratio=1.0}"]
    assert timing.root.edits == 2 and "2 edits" in str(timing)


def test_training_mode_keeps_running_statistics() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()).train()
    model = go.capture(net, (torch.randn(4, 3, 8, 8),))
    before = model.params["1.running_mean"].clone()
    result, _ = go.run(model, "roughly{factor=1.0}")
    assert torch.equal(before, model.params["1.running_mean"]) and torch.equal(before, result.params["1.running_mean"])
    assert result.mode == "train"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_error_measure_is_strict(bad: float) -> None:
    reference = torch.tensor([1.0, 2.0])
    assert relative_error(torch.tensor([1.0, bad]), reference) == float("inf")
    assert relative_error(reference, torch.tensor([1.0, bad])) == float("inf")
    assert relative_error(torch.tensor([1.0, bad]), torch.tensor([1.0, bad])) == 0
    assert relative_error(torch.tensor([0.0, 0.1]), torch.zeros(2)) == float("inf")
    assert relative_error(torch.tensor([1.0, 2.02]), reference) == pytest.approx(0.01)
    assert tolerance(Contract.EXACT, torch.int64) == 0 and tolerance(Contract.LOSSY("top1"), torch.float32) > 1e9


def test_a_reproducer_replaces_only_a_reproducer(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not replaced"):
        go.run(make(), "breaks", repro=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    for _ in range(2):
        with pytest.raises(PassFailed):
            go.run(make(), "breaks", repro=tmp_path / "repro")
