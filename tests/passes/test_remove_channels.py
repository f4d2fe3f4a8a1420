"""Removing what the user names: exactly that, rounded up to units, or refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt as go
from graphopt.errors import GraphoptError
from tests.compare import relative_error
from tests.coupling import nets


def captured(name: str) -> go.Model:
    net, args, _ = nets.build(name)
    return go.capture(net, args)


def test_named_channels_go_everywhere() -> None:
    model = captured("residual")
    small, (report,) = go.run(model, "remove-channels{layer=a,indices=0;7;-1}")
    assert report.findings == {"asked": 3, "removed": [0, 7, 11], "units": 3}
    assert {name: tuple(small.params[name].shape) for name in ("a.weight", "na.weight", "b.weight")} == {
        "a.weight": (9, 8, 3, 3),
        "na.weight": (9,),
        "b.weight": (8, 9, 3, 3),
    }
    kept = [i for i in range(12) if i not in (0, 7, 11)]
    assert torch.equal(small.params["a.bias"], model.params["a.bias"][kept])


def test_the_name_of_a_weight_will_do() -> None:
    _, (report,) = go.run(captured("bare_weight"), "remove-channels{layer=w,indices=1}")
    assert report.findings["removed"] == [1]


@pytest.mark.parametrize(
    ("name", "layer", "indices", "removed"),
    [
        ("attention", "query", "0", 4),  # one feature of every head: 4 of 24, where a head would be 6
        ("attention", "query", "0;1;2;3;4;5", 6),  # the first head
        ("grouped_queries", "query", "0;1;2;3;4;5", 12),  # two heads share their keys
        ("grouped", "mid", "0;1", 4),
    ],
)
def test_a_request_is_rounded_up_to_units(name: str, layer: str, indices: str, removed: int) -> None:
    _, (report,) = go.run(captured(name), f"remove-channels{{layer={layer},indices={indices}}}")
    assert len(report.findings["removed"]) == removed
    assert set(map(int, indices.split(";"))) <= set(report.findings["removed"])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_request_is_met_or_refused(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(("shuffle", "stack", "grouped", "fused", "c2f", "transposed", "rotary")))
    model = captured(name)
    layer = {"fused": "qkv", "c2f": "cv1", "rotary": "key"}.get(name, "first")
    size = len(model.params[f"{layer}.bias"])
    indices = data.draw(st.lists(st.integers(-size - 1, size), min_size=1, max_size=size, unique=True))
    try:
        small, (report,) = go.run(model, f"remove-channels{{layer={layer},indices={';'.join(map(str, indices))}}}")
    except GraphoptError as error:
        assert "has no position" in str(error) or "nothing would be left" in str(error), error
        return
    assert {index % size for index in indices} <= set(report.findings["removed"])
    assert len(small.params[f"{layer}.bias"]) == size - len(report.findings["removed"])


@pytest.mark.parametrize(
    ("layer", "indices", "message"),
    [
        ("a", "12", "'a' has no position 12"),
        ("a", "", "'a' is to lose no position"),
        ("head", "0", "positions of 'head' have to stay"),
        ("aa", "0", "no layer 'aa' makes positions"),
        ("a", "0;1;2;3;4;5;6;7;8;9;10;11", "nothing would be left"),
        ("a", "x", "option 'indices'"),
    ],
)
def test_what_cannot_be_removed(layer: str, indices: str, message: str) -> None:
    with pytest.raises(GraphoptError) as caught:
        go.run(captured("residual"), f"remove-channels{{layer={layer},indices={indices}}}")
    assert message in str(caught.value)
    if layer == "head":
        assert "'linear' in head is an output" in str(caught.value)


def test_a_unit_that_nobody_hears_can_go_for_free() -> None:
    net, args, _ = nets.build("residual")
    with torch.no_grad():
        net.b.weight[:, 3].zero_()
    small, (report,) = go.run(go.capture(net, args), "remove-channels{layer=a,indices=3}")
    assert report.check is not None and report.check.error <= 1e-6
    assert relative_error(small(*args), net(*args)) <= 1e-6
