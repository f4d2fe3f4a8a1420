"""Mixtures that stay as they are, each with its reason, and merges that go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import GraphoptError
from tests.passes.apply import reasons
from tests.passes.mixtures import SIZE, Computed, Dense, Indexed, Mlp, capture, count_of, data, layer, merged, softmax


def refusal(net: nn.Module, text: str = "experts=1") -> str:
    _, report = merged(capture(net), text, data(torch.float32))
    assert not report.edits and report.findings["layers"] == []
    return "\n".join(reasons(report))


class Changed(Dense):
    """A dense mixture with something else about it."""

    def __init__(self, change: Callable[[Any, list[Tensor], list[Tensor], Tensor], Tensor], count: int = 2) -> None:
        super().__init__([Mlp() for _ in range(count)])
        self.change, self.norm = change, nn.BatchNorm1d(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        columns = self.columns(softmax(self.router(x)))
        return self.last(self.change(self, columns, [expert(x) for expert in self.experts], x))


WRONG: dict[str, tuple[Callable[[Any, list[Tensor], list[Tensor], Tensor], Tensor], str]] = {
    "a result is used elsewhere": (lambda m, g, y, x: (g[0] * y[0] + g[1] * y[1]) * y[0].tanh(), "is also used by"),
    "a term is used elsewhere": (lambda m, g, y, x: (t := g[0] * y[0]) + g[1] * y[1] + t.tanh(), "not into one sum"),
    "twice in the sum": (lambda m, g, y, x: torch.add(g[0] * y[0], g[1] * y[1], alpha=2), "not into one sum"),
    "a difference": (lambda m, g, y, x: g[0] * y[0] - g[1] * y[1], "not into one sum"),
    "something is added": (lambda m, g, y, x: (g[0] * y[0] + 1) + g[1] * y[1], "adds 1 to"),
    "stacked": (lambda m, g, y, x: torch.stack([g[0] * y[0], g[1] * y[1]]).sum(0), "not into one sum"),
    "broadcast": (lambda m, g, y, x: g[0] * y[0] + (g[1] * y[1] + x.mean(-1, keepdim=True)), "of another shape"),
    "two products of a column": (lambda m, g, y, x: g[0] * y[0] + g[1] * y[1] + g[1] * y[0], "multiplied with several"),
    "built differently": (lambda m, g, y, x: g[0] * y[0].relu() + g[1] * y[1].tanh(), "are built differently"),
    "other numbers": (lambda m, g, y, x: g[0] * (y[0] + 1) + g[1] * (y[1] + 2), "1 in one is 2 in the other"),
    "statistics": (lambda m, g, y, x: g[0] * m.norm(y[0]) + g[1] * F.dropout(y[1]), "built differently"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_mixture(case: str) -> None:
    change, reason = WRONG[case]
    assert reason in refusal(Changed(change))


def test_a_column_that_is_used_otherwise() -> None:
    net = Changed(lambda m, g, y, x: g[0] * y[0] + g[1] * y[1] + g[2].exp() * x, count=3)
    assert "column 2 of 'softmax' is used otherwise" in refusal(net)


def test_experts_of_other_sizes_and_with_weights_in_common() -> None:
    assert "differ in shape" in refusal(Dense([Mlp(6), Mlp(7)]))
    net = Dense([Mlp(), Mlp()])
    net.experts[1].up.weight = net.experts[0].up.weight
    small, report = merged(capture(net), "experts=1,align=false", data(torch.float32))  # what is one needs no average
    assert layer(report)["after"] == 1 and count_of(small, "up.weight") >= 1
    net = Dense([Mlp(SIZE), Mlp(SIZE)])
    net.last.weight = nn.Parameter(torch.randn(3, SIZE))
    net.experts[1].up.weight = net.stem_like = nn.Parameter(torch.randn(SIZE, SIZE))
    net.router = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2))
    net.router[0].weight = net.experts[1].up.weight
    assert "is tied to" in refusal(net) or "also used by" in refusal(net)


def test_norms_with_statistics_and_masks_stay() -> None:
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(SIZE, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, SIZE))

    assert "is no parameter" in refusal(Dense([Normed(), Normed()]))
    model = capture(Dense([Mlp(), Mlp()]))
    model.params.masks["experts.0.up.weight"] = torch.ones(7, SIZE, dtype=torch.bool)
    _, report = merged(model, "experts=1", data(torch.float32))
    assert not report.edits and any("the mask of 'experts.0.up.weight'" in why for why in reasons(report))


def test_stacks_that_are_no_experts_or_cannot_change() -> None:
    net = Indexed([Mlp() for _ in range(3)])
    net.table = nn.Parameter(torch.randn(4, SIZE))
    forward = Indexed.forward
    net.forward = lambda x: forward(net, x) + (net.table[x.argmax(-1)] @ net.last.weight.t())  # type: ignore[method-assign]
    _, report = merged(capture(net), "experts=2", data(torch.float32))
    assert layer(report)["layer"] and not report.misses  # a table of something else is nobody's candidate
    net = Indexed([Mlp() for _ in range(3)])
    net.forward = lambda x: forward(net, x) * net.w1.sum()  # type: ignore[method-assign]
    assert "'w1' is also used by" in refusal(net)

    with_stack = Changed(lambda m, g, y, x: (torch.stack(y, -1) * torch.cat(g, -1)[:, None]).sum(-1))
    assert "are stacked; if they are experts" in refusal(with_stack)
    assert "with fewer experts it would fail" in refusal(Computed([Mlp() for _ in range(3)], "expanded"))
    assert "no router weights what 'w1' makes" in refusal(Computed([Mlp() for _ in range(3)], "left apart"))


def failure(model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None) -> str:
    with pytest.raises(GraphoptError) as caught:
        go.run(model, f"merge-experts{{{text}}}", calib=data(torch.float32) if calib is None else calib)
    return str(caught.value)


def test_wrong_options() -> None:
    model = capture(Dense([Mlp(), Mlp()]))
    assert "experts is 0, it has to be at least 1" in failure(model, "experts=0")
    assert "experts" in failure(model, "align=true")
    assert "needs calibration data" in failure(model, "experts=1", [])
    assert "evaluation mode" in failure(model.clone().train(), "experts=1")
    assert "did you mean experts" in failure(model, "experts=1,only=expert")
    assert "holds NaN" in failure(model, "experts=1", [[torch.full((2, 4), torch.nan)]])
    assert "has 2 experts already" in refusal(Dense([Mlp(), Mlp()]), "experts=2")
    model.params["router.weight"].data.fill_(torch.nan)
    assert "is not finite" in refusal_on(model, data(torch.float32))
    assert "no mixture of experts is called 'x'" in failure(capture(nn.Linear(4, 4)), "experts=1,only=x")
    _, report = merged(capture(nn.Linear(4, 4)), "experts=1", data(torch.float32))
    assert not report.edits and not report.misses and report.findings["layers"] == []


def refusal_on(model: go.Model, calib: Sequence[Sequence[Tensor]]) -> str:
    _, report = merged(model, "experts=1", calib)
    assert not report.edits
    return "\n".join(reasons(report))


def test_layers_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Dense([Mlp(), Mlp()]), Indexed([Mlp(), Mlp()], best=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model, calib = capture(Two()), data(torch.float32)
    _, report = merged(model, "experts=1", calib)
    assert [row["layer"] for row in report.findings["layers"]] == ["a.experts", "b"]
    _, report = merged(model, "experts=1,only=a", calib)
    assert layer(report)["layer"] == "a.experts"
    _, report = merged(model, "experts=1,leave=a.experts", calib)
    assert layer(report)["layer"] == "b"


def test_a_wrong_merge_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none: forget the gate of an expert that has gone."""
    from graphopt.passes._expert_sums import WeightedSum

    def wrong(self: WeightedSum, rw: Any, aligned: Any) -> None:
        term, gate, _ = self.terms[1]
        rw.replace_input(term, gate, self.terms[0][1], "a mistake")

    monkeypatch.setattr(WeightedSum, "merge", wrong)
    assert "of the largest reference output" in failure(capture(Dense([Mlp(), Mlp()])), "experts=1")
