"""What passes did is re-discovered from the two models alone; ONNX files are matched with what they came from."""

from __future__ import annotations

import pytest

import graphopt as go
from benchmarks.diff_history import PIPELINES, nets, rediscovered
from benchmarks.diff_onnx import exported, parametric
from benchmarks.diff_speed import edited
from benchmarks.long_graph import long_graph
from tests.diff.consistent import assert_consistent
from tests.diff.nets import NETS, captured


@pytest.mark.parametrize("name", nets())
def test_the_journal_is_rediscovered(name: str) -> None:
    net, inputs = nets(small=True)[name]()
    model = go.capture(net, inputs)
    for pipeline, least in zip(PIPELINES, (20, 20, 5), strict=False):
        after, reports = go.run(model, pipeline, check=False)
        right, edits, missed = rediscovered(model, after, reports)
        assert edits >= least and right >= 0.95 * edits, missed


@pytest.mark.parametrize(("name", "optimize"), [("mobile", False), ("transformer", True)])
def test_an_onnx_file_against_its_module(name: str, optimize: bool) -> None:
    import torch

    make, shape = NETS[name]
    net, x = make().eval(), torch.randn(shape)
    found = go.diff(go.capture(net, (x,)), exported(net, (x,), optimize=optimize), run=True)
    assert_consistent(found)
    matched, _, total, left = parametric(found)
    assert total >= 20 and matched >= 0.98 * total, left
    assert found.numbers.outputs[0] < 1e-4


def test_without_a_history_there_are_no_passes() -> None:
    model = captured("resnet")
    folded, _ = go.run(model, "fold-batch-norm")
    folded.history = ()
    assert {entry.passes for entry in go.diff(model, folded).entries} == {()}
    folded.history = ("a-pass-of-another-package{speed=2}",)
    assert {entry.passes for entry in go.diff(model, folded).entries} == {("a-pass-of-another-package",)}


def test_many_edits_in_a_long_graph() -> None:
    model = long_graph(800)
    other, done = edited(model, 40)
    found = go.diff(model, other, cost=False)
    assert_consistent(found)
    assert len(done) == len(found.entries) == 40
    assert found.counts() == {"removed": 10, "inserted": 10, "changed": 20}
