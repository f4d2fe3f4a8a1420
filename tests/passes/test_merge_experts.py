"""Mixtures with fewer experts: which are merged, what they become, what stays exact, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from benchmarks.torchvision_ops import define_missing
from graphopt.errors import GraphoptError
from graphopt.passes._experts import Hidden, average, groups_of, matching
from tests.compare import relative_error
from tests.passes.apply import gradients, reasons

SIZE = 5


class Mlp(nn.Module):
    """Two layers, or with `gated` the product of two in front of the last."""

    def __init__(self, units: int = 7, gated: bool = False, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, units), nn.Linear(units, SIZE)
        self.gate = nn.Linear(SIZE, units) if gated else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h if self.gate is None else h * self.gate(x))


def permuted(expert: Mlp, order: Tensor) -> Mlp:
    """The same function with its hidden units in another order."""
    twin = copy.deepcopy(expert)
    with torch.no_grad():
        for layer in (twin.up, twin.gate):
            if layer is not None:
                layer.weight.copy_(layer.weight[order])
                layer.bias.copy_(layer.bias[order])
        twin.down.weight.copy_(twin.down.weight[:, order])
    return twin


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def masked(logits: Tensor) -> Tensor:
    """The two largest, the others zero."""
    best = logits.topk(2, -1).indices
    mask = torch.zeros_like(logits).scatter(-1, best, 1.0)
    return logits.softmax(-1) * mask


def scattered(logits: Tensor) -> Tensor:
    values, best = logits.softmax(-1).topk(2, -1)
    return torch.zeros_like(logits).scatter(-1, best, values / values.sum(-1, keepdim=True))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "masked": masked,
    "scattered": scattered,
}
COLUMNS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "slice": lambda g: [g[..., i : i + 1] for i in range(g.shape[-1])],
    "select": lambda g: [g[..., i, None] for i in range(g.shape[-1])],
    "select, view": lambda g: [g[..., i].view(-1, 1) for i in range(g.shape[-1])],
    "from the end": lambda g: [g[..., i - g.shape[-1]].unsqueeze(-1) for i in range(g.shape[-1])],
    "split": lambda g: list(g.split(1, -1)),
    "chunk": lambda g: list(g.chunk(g.shape[-1], 1)),
    "unbind": lambda g: [one.unsqueeze(1) for one in g.unbind(-1)],
}
SUMS: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "python": lambda terms, x: sum(terms),  # type: ignore[dict-item,return-value]  # starts from 0
    "from the last": lambda terms, x: sum(terms[-2::-1], terms[-1]),
    "into the stream": lambda terms, x: sum(terms, x),
    "in pairs": lambda terms, x: (terms[0] + terms[1]) + sum(terms[3:], terms[2]),
}


class Dense(nn.Module):
    """A mixture between two layers, of which all experts are computed."""

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gates: Callable[[Tensor], Tensor] = softmax,
        columns: Callable[[Tensor], list[Tensor]] = COLUMNS["slice"],
        total: Callable[[list[Tensor], Tensor], Tensor] = SUMS["python"],
    ) -> None:
        super().__init__()
        self.stem, self.router, self.last = nn.Linear(4, SIZE), nn.Linear(SIZE, len(experts)), nn.Linear(SIZE, 3)
        self.experts = nn.ModuleList(experts)
        self.gates, self.columns, self.total = gates, columns, total

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        columns = self.columns(self.gates(self.router(x)))
        return self.last(self.total([g * expert(x) for g, expert in zip(columns, self.experts, strict=True)], x))


class Indexed(nn.Module):
    """A mixture whose experts are stacked, and taken by the indices that the router selects, in several ways."""

    def __init__(self, experts: Sequence[Mlp], form: str = "bmm", best: int = 2) -> None:
        super().__init__()
        self.form, self.best, self.gated = form, best, experts[0].gate is not None
        self.stem, self.router, self.last = nn.Linear(4, SIZE), nn.Linear(SIZE, len(experts)), nn.Linear(SIZE, 3)
        into = [torch.cat((e.up.weight, e.gate.weight)) if e.gate is not None else e.up.weight for e in experts]
        bias = [torch.cat((e.up.bias, e.gate.bias)) if e.gate is not None else e.up.bias for e in experts]
        if form == "interleaved":
            into, bias = ([torch.stack(one.chunk(2), 1).flatten(0, 1) for one in both] for both in (into, bias))
        out = [e.down.weight for e in experts]
        turned = form == "turned"
        self.w1 = nn.Parameter(torch.stack([w.t() if turned else w for w in into]).detach().contiguous())
        self.w2 = nn.Parameter(torch.stack([w.t() if turned else w for w in out]).detach().contiguous())
        self.b1, self.b2 = (
            nn.Parameter(torch.stack(bias).detach()),
            nn.Parameter(torch.stack([e.down.bias for e in experts]).detach()),
        )

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        match self.form:
            case "turned":
                return torch.bmm(x.unsqueeze(1), weight).squeeze(1)
            case "einsum":
                return torch.einsum("si,soi->so", x, weight)
            case "matmul":
                return (weight @ x[..., None])[..., 0]
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        values, best = self.router(x).softmax(-1).topk(self.best, -1)
        ids = best.reshape(-1)
        h = self._times(x.repeat_interleave(self.best, 0), self.w1[ids]) + self.b1[ids]
        if self.gated:
            up, gate = (h[:, ::2], h[:, 1::2]) if self.form == "interleaved" else h.chunk(2, -1)
            h = torch.tanh(up) * gate
        else:
            h = torch.tanh(h)
        made = (self._times(h, self.w2[ids]) + self.b2[ids]) * values.reshape(-1, 1)
        return self.last(made.view(x.shape[0], self.best, SIZE).sum(1))


class Computed(Indexed):
    """All stacked experts are computed, and weighted."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gates = self.router(x).softmax(-1)
        if self.form == "einsum":
            h = torch.tanh(torch.einsum("si,eoi->seo", x, self.w1) + self.b1)
            made = torch.einsum("seo,eio->sei", h, self.w2) + self.b2
            return self.last(torch.einsum("se,sei->si", gates, made))
        many = x.expand(len(self.w1), -1, -1) if self.form == "expanded" else x
        h = torch.tanh(many @ self.w1.transpose(1, 2) + self.b1.unsqueeze(1))
        made = h @ self.w2.transpose(1, 2) + self.b2.unsqueeze(1)
        if self.form == "left apart":
            return self.last(made).sum(0)
        return self.last((made * gates.t().unsqueeze(-1)).sum(0))


def capture(net: nn.Module) -> go.Model:
    x = torch.randn(6, 4, dtype=next(net.parameters()).dtype)
    return go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})


def data(dtype: torch.dtype = torch.float64, count: int = 2) -> list[list[Tensor]]:
    return [[torch.randn(16, 4, dtype=dtype, generator=torch.Generator().manual_seed(s))] for s in range(count)]


def merged(model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None) -> tuple[go.Model, go.Report]:
    small, (report,) = go.run(model, f"merge-experts{{{text}}}", calib=data() if calib is None else calib)
    json.dumps(report.to_json())
    return small, report


def layer(report: go.Report) -> dict[str, Any]:
    (row,) = report.findings["layers"]
    return row


def distance(small: go.Model, net: nn.Module) -> float:
    """At two batch sizes."""
    with torch.no_grad():
        return max(relative_error(small(x[:size]), net(x[:size])) for size in (16, 5) for (x,) in data())


def count_of(model: go.Model, suffix: str) -> int:
    return sum(name.endswith(suffix) for name in model.state_dict())


def copies(count: int, units: int = 7, gated: bool = False) -> list[Mlp]:
    """One expert, its hidden units in several orders."""
    first = Mlp(units, gated)
    return [first, *(permuted(first, torch.randperm(units)) for _ in range(count - 1))]


def favour(net: nn.Module, classes: Sequence[int]) -> None:
    """Router logits that are alike within a class, whose first expert is used more than the others."""
    with torch.no_grad():
        net.router.bias.zero_()
        net.router.weight.zero_()
        net.stem.bias.fill_(0.5)
        for expert, number in enumerate(classes):
            net.router.weight[expert, number] = 1.0 if number in classes[:expert] else 4.0


# What is equal stays equal


@pytest.mark.parametrize("columns", COLUMNS)
def test_columns(columns: str) -> None:
    net = Dense(copies(3), columns=COLUMNS[columns]).double()
    small, report = merged(capture(net), "experts=1")
    assert layer(report)["before"] == 3 and layer(report)["after"] == 1 and layer(report)["layer"] == "experts"
    assert distance(small, net) <= 1e-10 and not report.misses
    assert count_of(small, "up.weight") == 1 and report.findings["output error"] <= 1e-10


@pytest.mark.parametrize(
    ("gates", "total"), [*((gates, "python") for gates in GATES), *(("masked", total) for total in [*SUMS][1:])]
)
def test_gates_and_sums(gates: str, total: str) -> None:
    net = Dense([*copies(2), *copies(2, gated=False)], GATES[gates], total=SUMS[total]).double()
    favour(net, (0, 0, 1, 1))
    small, report = merged(capture(net), "experts=2")
    assert sorted(map(sorted, layer(report)["groups"])) == [[0, 1], [2, 3]]
    assert distance(small, net) <= 1e-10
    assert count_of(small, "up.weight") == 2
    assert all(g is not None and g.isfinite().all() for g in gradients(small, data()[0]).values())


@pytest.mark.parametrize(
    ("form", "gated"),
    [("bmm", False), ("bmm", True), ("turned", True), ("einsum", False), ("matmul", True), ("interleaved", True)],
)
def test_stacks(form: str, gated: bool) -> None:
    net = Indexed([*copies(2, gated=gated), *copies(2, gated=gated)], form).double()
    favour(net, (0, 0, 1, 1))
    model = capture(net)
    small, report = merged(model, "experts=2")
    assert sorted(map(sorted, layer(report)["groups"])) == [[0, 1], [2, 3]]
    assert distance(small, net) <= 1e-10
    state = small.state_dict()
    assert [len(state[name]) for name in ("w1", "b1", "w2", "b2")] == [2] * 4
    assert state["merged"].tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    assert len([edit for edit in report.edits if "are 2" in edit.why]) == 8
    assert all(g is not None and g.isfinite().all() for g in gradients(small, data()[0]).values())
    again, second = merged(small, "experts=2")
    assert not second.edits and str(again) == str(small)


@pytest.mark.parametrize("form", ["einsum", "matmul"])
def test_stacks_that_are_all_computed(form: str) -> None:
    net = Computed([*copies(2), *copies(2)], form).double()
    favour(net, (0, 0, 1, 1))
    model = capture(nn.Sequential(net, nn.Linear(3, 4), copy.deepcopy(net)).double())  # 4 rows that are no experts
    small, report = merged(model, "experts=2")
    assert [row["layer"] for row in report.findings["layers"]] == ["0", "2"] and not report.misses
    assert all(sorted(map(sorted, row["groups"])) == [[0, 1], [2, 3]] for row in report.findings["layers"])
    with torch.no_grad():
        assert max(relative_error(small(x[:n]), model(x[:n])) for (x,) in data() for n in (16, 5)) <= 1e-10
    assert [len(small.state_dict()[f"2.{name}"]) for name in ("w1", "b1", "w2", "b2", "router.weight")] == [2] * 4 + [4]
    again, second = merged(small, "experts=2")
    assert not second.edits and str(again) == str(small)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    count=st.integers(2, 4),
    units=st.integers(2, 9),
    gated=st.booleans(),
    stacked=st.booleans(),
    differs=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equal_but_for_the_order_of_units(
    count: int, units: int, gated: bool, stacked: bool, differs: bool, seed: int
) -> None:
    """Merging is exact then; where one unit of one expert differs it is exactly the average."""
    torch.manual_seed(seed)
    experts = [one.double() for one in copies(count, units, gated)]
    if differs:
        with torch.no_grad():
            experts[-1].up.weight[0] += 0.01
    net = (Indexed(experts, best=1) if stacked else Dense(experts)).double()
    small, report = merged(capture(net), "experts=1")
    assert layer(report)["groups"] and len(layer(report)["groups"][0]) == count and not report.misses
    if not differs:
        assert distance(small, net) <= 1e-10
        return
    usage, (first, *_) = layer(report)["usage"], layer(report)["groups"][0]
    reference = [parameter.detach() for parameter in experts[first].parameters()]
    ordered = [_nearest(expert, experts[first]) for expert in experts]
    means = [sum(u * t for u, t in zip(usage, ts, strict=True)) for ts in zip(*ordered, strict=True)]
    assert max(float((a - b).abs().max()) for a, b in zip(means, reference, strict=True)) <= 0.011
    expected = copy.deepcopy(net)
    _fill(expected, means)
    assert distance(small, expected) <= 1e-10
    assert distance(small, net) > 0 or usage[-1] in (0.0, 1.0)


def _nearest(expert: Mlp, reference: Mlp) -> list[Tensor]:
    """The parameters with every hidden unit where the reference has the nearest, tried one by one."""
    differences = [(expert.down.weight[:, :, None] - reference.down.weight[:, None]).abs().sum(0)]
    order = torch.stack(differences).sum(0).argmin(0)
    return [parameter.detach() for parameter in permuted(expert, order).parameters()]


def _fill(net: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Give all experts the same parameters."""
    one = Mlp(tensors[0].shape[0], len(tensors) == 6).double()
    with torch.no_grad():
        for parameter, value in zip(one.parameters(), tensors, strict=True):
            parameter.copy_(value)
        if isinstance(net, Dense):
            net.experts = nn.ModuleList([one] * len(net.experts))
        else:
            other = Indexed([one] * len(net.w1), net.form, net.best)
            for name in ("w1", "w2", "b1", "b2"):
                getattr(net, name).copy_(getattr(other, name))


# What differs is averaged


def test_groups_are_made_around_the_most_used() -> None:
    similarity = torch.tensor([[1.0, 0.1, 0.9, 0.2], [0.1, 1.0, 0.3, 0.8], [0.9, 0.3, 1.0, 0.0], [0.2, 0.8, 0.0, 1.0]])
    assert groups_of(torch.tensor([5.0, 4.0, 1.0, 2.0]), similarity, 2) == ((0, 2), (1, 3))
    assert groups_of(torch.tensor([1.0, 4.0, 5.0, 2.0]), similarity, 2) == ((1, 3), (2, 0))
    assert groups_of(torch.tensor([1.0, 1.0, 1.0, 1.0]), similarity, 3) == ((0,), (1, 3), (2,))
    assert groups_of(torch.tensor([1.0, 4.0, 5.0, 2.0]), similarity, 1) == ((2, 0, 1, 3),)


def test_alignment_and_average_by_hand() -> None:
    hidden = Hidden(3, (0, 0, 1, None))
    a = [torch.randn(3, 2), torch.randn(3), torch.randn(2, 3), torch.randn(2)]
    order = torch.tensor([2, 0, 1])
    b = hidden.permuted(a, order)
    assert torch.equal(b[0], a[0][order]) and torch.equal(b[2], a[2][:, order]) and b[3] is a[3]
    back = matching(hidden, a, b)
    assert torch.equal(order[back], torch.arange(3))
    b[0] = b[0] + 1.0
    for found, x, y in zip(average([a, b], [3.0, 1.0], hidden), a, hidden.permuted(b, back), strict=True):
        assert relative_error(found, 0.75 * x + 0.25 * y) <= 1e-6
    for found, x, y in zip(average([a, b], [0.0, 0.0], None), a, b, strict=True):
        assert relative_error(found, 0.5 * x + 0.5 * y) <= 1e-6


def test_two_positions_for_a_unit() -> None:
    weight = torch.arange(8.0)[:, None]
    order = torch.tensor([1, 0, 3, 2])
    assert Hidden(4, (0,)).permuted([weight], order)[0].flatten().tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    pairs = Hidden(4, (0,), interleaved=True)
    assert pairs.permuted([weight], order)[0].flatten().tolist() == [2, 3, 0, 1, 6, 7, 4, 5]
    assert Hidden(4, (0,)).rows([weight]).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert pairs.rows([weight]).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_usage_and_error_are_those_of_the_data() -> None:
    net = Dense([Mlp() for _ in range(3)])
    calib = data(torch.float32)
    small, report = merged(capture(net), "experts=2", calib)
    with torch.no_grad():
        gates = torch.cat([net.router(net.stem(x).relu()).softmax(-1) for (x,) in calib])
        logits = torch.cat([net.router(net.stem(x).relu()) for (x,) in calib])
        pairs = [(small(x), net(x)) for (x,) in calib]
    assert layer(report)["usage"] == pytest.approx(gates.mean(0).tolist(), rel=1e-5)
    cosines = F.cosine_similarity(logits.t()[:, None], logits.t()[None], -1)
    assert tuple(map(tuple, layer(report)["groups"])) == groups_of(gates.mean(0), cosines, 2)
    expected = sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
    assert report.findings["output error"] == pytest.approx(float(expected.sqrt()), rel=1e-3)
    assert 1e-3 < report.findings["output error"] < 1


def test_selections_are_counted() -> None:
    net = Indexed([Mlp() for _ in range(4)])
    calib = data(torch.float32)
    _, report = merged(capture(net), "experts=3", calib)
    with torch.no_grad():
        ids = torch.cat([net.router(net.stem(x).relu()).topk(2, -1).indices for (x,) in calib])
    assert layer(report)["usage"] == pytest.approx((ids.flatten().bincount(minlength=4) / ids.numel()).tolist())


def test_without_alignment_weights_are_averaged_as_they_are() -> None:
    net = Dense([Mlp() for _ in range(2)])
    small, report = merged(capture(net), "experts=1,align=false", data(torch.float32))
    usage = layer(report)["usage"]
    ups = [expert.up.weight for expert in net.experts]
    assert (
        relative_error(
            small.state_dict()["experts.1.up.weight"], sum(u * w for u, w in zip(usage, ups, strict=True)).detach()
        )
        <= 1e-6
    )


class Deep(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(SIZE, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, SIZE))


def test_two_layers_of_hidden_units_are_not_aligned() -> None:
    model, calib = capture(Dense([Deep(), Deep()])), data(torch.float32)
    small, report = merged(model, "experts=1", calib)
    assert not report.edits and any("align=false averages them as they are" in why for why in reasons(report))
    small, report = merged(model, "experts=1,align=false", calib)
    assert layer(report)["after"] == 1 and count_of(small, "4.weight") == 1 and not report.misses


def test_as_many_units_as_inputs() -> None:
    """Sizes alone do not tell which axis is which."""
    for net in (Dense(copies(3, SIZE, True)).double(), Indexed(copies(3, SIZE), "turned").double()):
        small, report = merged(capture(net), "experts=1")
        assert distance(small, net) <= 1e-10 and layer(report)["after"] == 1


@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_transformers(kind: str) -> None:
    define_missing()
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    size = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "use_cache": False}
    if kind == "qwen2":
        more = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 8}
        net = Qwen2MoeForCausalLM(Qwen2MoeConfig(**size, **more, num_experts_per_tok=2, num_key_value_heads=2))
    else:
        net = MixtralForCausalLM(
            MixtralConfig(
                **size, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2
            )
        )
    net = net.eval()
    experts = net.model.layers[0].mlp.experts
    torch.nn.init.normal_(experts.gate_up_proj)
    torch.nn.init.normal_(experts.down_proj)
    calib = [[torch.randint(0, 32, (2, 7))] for _ in range(2)]
    if kind == "qwen2":
        _, report = merged(go.capture(net, (calib[0][0],)), "experts=2", calib)
        assert not report.edits and any("experts_implementation to 'batched_mm'" in why for why in reasons(report))
    net.config._experts_implementation = "batched_mm"
    model = go.capture(net, (calib[0][0],), dynamic={0: {0: "batch"}})
    small, report = merged(model, "experts=2", calib)
    assert layer(report)["layer"] == "model.layers.0.mlp.experts" and not report.misses
    assert small.state_dict()["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == 2
    # The router selects as before, and what it selected is looked up in the table.
    places = small.state_dict()["model.layers.0.mlp.experts.merged"]
    for name in ("gate_up_proj", "down_proj"):
        full = small.state_dict()[f"model.layers.0.mlp.experts.{name}"][places]
        getattr(experts, name).data.copy_(full)
    x = torch.randint(0, 32, (3, 7))
    with torch.no_grad():
        assert relative_error(small(x).logits, net(x).logits) <= 1e-5


# What is refused


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
