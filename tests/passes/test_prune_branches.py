"""Branches that go whole: which there are, which go, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.branches import Branch, branches
from graphopt.analysis.coupling import couple
from graphopt.errors import GraphoptError
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.ops import argument
from graphopt.passes._branches import erase, zeroed
from graphopt.passes._tradeoff import Tradeoff
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from tests import zoo
from tests.compare import relative_error
from tests.passes.apply import a_second


class Block(nn.Module):
    """x + f(x), with a projection where the width changes."""

    def __init__(self, size: int, out: int | None = None, *, last: float = 1.0) -> None:
        super().__init__()
        out = out or size
        self.a, self.norm = nn.Conv2d(size, 2 * size, 3, padding=1), nn.BatchNorm2d(2 * size)
        self.b = nn.Conv2d(2 * size, out, 1)
        self.short = nn.Conv2d(size, out, 1) if out != size else nn.Identity()
        with torch.no_grad():
            for parameter in self.b.parameters():
                parameter.mul_(last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.norm(self.a(x)))) + self.short(x))


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(blocks)
        self.head = nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Joined(nn.Module):
    """A function of a value and of two convolutions, between a stem and a head."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.narrow = nn.Conv2d(8, 4, 1)
        self.scale = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.join(self, torch.relu(self.stem(x)))))


IMAGE = (2, 3, 8, 8)


def capture(net: nn.Module, shape: Sequence[int] = IMAGE, *, free: bool = True) -> go.Model:
    x = torch.randn(shape)
    net(x)  # statistics, and sizes of lazy layers
    return go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}} if free else None)


def batches(shape: Sequence[int] = IMAGE, count: int = 2) -> list[list[Tensor]]:
    return [[torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(seed))] for seed in range(count)]


def names(model: go.Model) -> list[str]:
    return [branch.name for branch in branches(model)]


def without(model: go.Model, gone: Sequence[Branch]) -> go.Model:
    copy = model.clone(share_tensors=True)
    erase(Rewriter(copy), gone)
    verify(copy)
    return copy


# What is a branch


def inner(m: nn.Module, x: Tensor) -> Tensor:
    h = m.a(x)
    return x + m.c(torch.relu(h + m.b(torch.tanh(h))))


FOUND: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[str]]] = {
    "residual": (lambda m, x: x + m.b(torch.relu(m.a(x))), ["a"]),
    "branch on the left": (lambda m, x: m.a(x) + x, ["a"]),
    "gated by a stored scale": (lambda m, x: x + m.scale * m.a(x), ["a"]),
    "gated by itself": (lambda m, x: x + m.a(x) * torch.sigmoid(m.b(x).mean((2, 3), keepdim=True)), ["a"]),
    "behind an activation": (lambda m, x: torch.relu(x + m.a(x)), ["a"]),
    "projection": (lambda m, x: m.a(x) + m.a(torch.relu(m.b(x))), ["b"]),
    "nested": (inner, ["b", "a"]),
    "side by side": (lambda m, x: x + m.a(x) + m.b(x), ["a", "b"]),
    "halves": (lambda m, x: torch.cat((x[:, :2], x[:, 2:] + m.a(x)[:, 2:]), 1), ["a"]),
    "sizes of what is inside": (lambda m, x: x + m.b(m.a(x).flatten(1).view(-1, 4, *x.shape[2:])), ["a"]),
    "in double and back": (lambda m, x: x + m.a(x).double().sin().float(), ["a"]),
}
NONE: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "nothing is saved": lambda m, x: x + torch.tanh(x),
    "used outside": lambda m, x: (h := m.a(x)) * (x + m.b(h)),
    "used outside, at the end": lambda m, x: (h := m.a(x)) * (x + h),
    "its size is used outside": lambda m, x: (x + (h := m.b(x)[:, :, :, x[0, 0, 0].argsort()])) * h.shape[0],
    "the stream itself": lambda m, x: (m.a(x) - x).abs() + 1.0,
    "difference": lambda m, x: x - m.a(x),
    "twice": lambda m, x: torch.add(x, m.a(x), alpha=2),
    "broadcast": lambda m, x: x + m.a(x).mean((2, 3), keepdim=True),
    "broadcast stream": lambda m, x: x.mean((2, 3), keepdim=True) + m.a(x),
    "of another dtype": lambda m, x: (x.double() + m.a(x)).float(),
    "concatenation": lambda m, x: m.narrow(torch.cat((x, m.b(m.a(x))), 1)),
    "product": lambda m, x: x * m.a(x),
    "stored": lambda m, x: x + (m.scale * torch.ones(8, 8) + torch.zeros(1, 4, 8, 8)),
    "random": lambda m, x: x + m.a(x + torch.rand(8, 8)),
    "itself": lambda m, x: (h := m.a(x)) + h,
}


@pytest.mark.parametrize("case", FOUND)
def test_a_branch(case: str) -> None:
    join, expected = FOUND[case]
    model = capture(Joined(join), free=case != "halves")
    found = branches(model)
    assert [branch.name for branch in found] == expected
    for branch in found:
        small = without(model, [branch])
        (x,) = batches(count=1)[0] if case != "halves" else model.example
        assert relative_error(small(x), zeroed(model, [branch])(x)) <= 1e-5
        assert relative_error(small(x), model(x)) > 1e-3
        assert not {node.name for node in branch.nodes} & {node.name for node in small.graph.nodes}


@pytest.mark.parametrize("case", NONE)
def test_no_branch(case: str) -> None:
    assert names(capture(Joined(NONE[case]), free=False)) == []


class TwoInputs(nn.Module):
    def __init__(self, join: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join, self.a, self.b = join, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(self.join(self, x, y))


@pytest.mark.parametrize(
    ("join", "count"),
    [
        (lambda m, x, y: (h := m.a(x)) + m.b(h) + 0 * y.mean(), 1),
        (lambda m, x, y: (h := m.a(x)) + m.b(h * y), 0),  # two entries
        (lambda m, x, y: m.a(x) + y, 0),  # the sum of an input
        (lambda m, x, y: m.a(x) + m.b(y), 0),  # nothing that both come from
        (lambda m, x, y: x + m.a(x) * 1.0 + 0 * y, 1),  # the input is the entry
    ],
)
def test_several_inputs(join: Callable[..., Tensor], count: int) -> None:
    model = go.capture(TwoInputs(join).eval(), (torch.randn(2, 6), torch.randn(2, 6)))
    assert len(branches(model)) == count


def test_no_output_becomes_an_input() -> None:
    class Denoiser(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert names(go.capture(Denoiser(nn.Linear(4, 4)), (torch.randn(2, 4),))) == []


def test_a_view_behind_a_branch_that_had_put_values_in_order() -> None:
    def join(m: nn.Module, x: Tensor) -> Tensor:
        turned = x.permute(0, 2, 3, 1)
        return (m.a(x).permute(0, 2, 3, 1).contiguous() + turned).view(-1, 4, 8, 8)

    model = capture(Joined(join), free=False)
    (branch,) = branches(model)
    (x,) = model.example
    assert relative_error(without(model, [branch])(x), zeroed(model, [branch])(x)) <= 1e-5


class Layer(nn.TransformerEncoderLayer):
    """Its attention and its MLP are branches."""

    def __init__(self) -> None:
        super().__init__(12, 3, 24, batch_first=True, norm_first=True, dropout=0.0)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 12), nn.Linear(12, 4)
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


TOKENS = (2, 7, 5)


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("vit", 6)])
def test_known_nets(name: str, count: int) -> None:
    net = zoo._image_net(name, zoo.IMAGE_NETS[name]) if name in zoo.IMAGE_NETS else zoo._text_or_patch_net(name)
    found = names(go.capture(net.module, net.args()))
    assert len(set(found)) == len(found) == count
    if name == "resnet18":
        assert found == [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


@pytest.mark.parametrize("reads_stem", [False, True])
def test_a_thousand_additions_take_no_time(reads_stem: bool) -> None:
    """Every branch is looked at alone, and refused at the first value that is used outside."""
    model = capture(Blocks(Block(4)), free=False)
    rw = Rewriter(model)
    (end,) = rw.find(torch.ops.aten.mean.dim)
    stem = last = argument(end, "self")
    weight, bias = (argument(branches(model)[0].layers[1], name) for name in ("weight", "bias"))
    for _ in range(1000):
        both = rw.call(torch.ops.aten.cat.default, [last, stem if reads_stem else last], 1, before=end)
        layer = rw.call(torch.ops.aten.conv2d.default, both, weight, bias, before=end)
        last = rw.call(torch.ops.aten.add.Tensor, last, layer, before=end)
    rw.replace_input(end, stem, last, "a longer net")
    start = time.perf_counter()
    assert len(branches(model)) == (2 if reads_stem else 1001)
    assert time.perf_counter() - start < 2


# Which go


def test_something_is_left() -> None:
    """Without all its branches this model is the identity."""
    model = go.capture(Layer().eval(), (torch.randn(TOKENS[0], 7, 12),))
    assert names(model) == ["self_attn", "linear1"]
    data = [[torch.randn(2, 7, 12)]]
    with pytest.raises(GraphoptError, match="cannot be met"):
        go.run(model, "prune-channels{macs=0.05,most=0.2,branches=true}", calib=data)
    _, (report,) = go.run(model, "prune-channels{macs=0.7,most=0.2,branches=true}", calib=data)
    assert len(report.findings["branches"]) == 1


def pruned(model: go.Model, text: str, shape: Sequence[int] = IMAGE) -> tuple[go.Model, go.Report]:
    small, (report,) = go.run(model, f"prune-channels{{{text},branches=true}}", calib=batches(shape))
    return small, report


def test_a_block_that_does_nothing_goes_first() -> None:
    model = capture(Blocks(Block(4), Block(4, last=0.0), Block(4, 8)))
    small, report = pruned(model, "macs=0.75")
    assert [row["branch"] for row in report.findings["branches"]] == ["blocks.1"]
    row = report.findings["branches"][0]
    assert row["layers"] == 2 and row["loss"] == 0.0 and row["add"].startswith("add")
    (x,) = batches(count=1)[0]
    assert relative_error(small(x), model(x)) <= 1e-5
    assert not any(name.startswith("blocks.1.") for name in small.state_dict())
    assert report.cost_before is not None and report.cost_after is not None
    left = report.cost_after.at(batch=2).macs / report.cost_before.at(batch=2).macs
    assert left <= 0.75 and report.findings["achieved"] == {"macs": pytest.approx(left)}
    assert [edit.why for edit in report.edits if "branch" in edit.why] == ["without the branch 'blocks.1'"]
    assert report.findings["plans"]["without branches"] <= 1e-6


@pytest.mark.parametrize("budget", ["macs=0.4", "params=0.4"])
def test_a_budget_is_met_by_both_together(budget: str) -> None:
    model = capture(Blocks(Block(4), Block(4, last=1e-3), Block(4, 8)))
    small, report = pruned(model, budget)
    assert [row["branch"] for row in report.findings["branches"]] == ["blocks.1"]
    assert report.findings["groups"], "channels go as well"
    kind = budget[: budget.index("=")]
    before, after = report.cost_before, report.cost_after
    assert before is not None and after is not None
    left = after.at(batch=2).macs / before.at(batch=2).macs if kind == "macs" else after.parameters / before.parameters
    assert 0.2 <= left <= 0.4 and report.findings["achieved"] == {kind: pytest.approx(left)}
    plans = report.findings["plans"]
    assert plans["without branches"] <= plans["channels alone"]
    outputs = small(torch.randn(3, *IMAGE[1:]))
    outputs.square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_branches_that_matter_stay() -> None:
    _, report = pruned(capture(Blocks(Block(4, last=4.0), Block(4, 8))), "macs=0.9")
    assert report.findings["branches"] == [] and report.findings["groups"]


def test_branches_meet_a_budget_that_channels_alone_cannot() -> None:
    model = capture(Blocks(Block(4), Block(4), Block(4)))
    with pytest.raises(GraphoptError, match="cannot be met"):
        go.run(model, "prune-channels{macs=0.3,most=0.1}", calib=batches())
    _, report = pruned(model, "macs=0.3,most=0.1")
    assert len(report.findings["branches"]) >= 2 and report.findings["plans"]["channels alone"] is None
    assert report.findings["achieved"]["macs"] <= 0.3
    with pytest.raises(GraphoptError, match="cannot be met"):
        pruned(model, "macs=0.01,most=0.1")


@pytest.mark.parametrize("part", ["self_attn.out_proj", "linear2"])
def test_attention_or_mlp_goes(part: str) -> None:
    net = Transformer()
    with torch.no_grad():
        for parameter in net.layers[1].get_submodule(part).parameters():
            parameter.zero_()
    model = capture(net, TOKENS)
    assert names(model) == ["layers.0.self_attn", "layers.0", "layers.1.self_attn", "layers.1"]
    small, report = pruned(model, "macs=0.85", TOKENS)
    wanted = "layers.1.self_attn" if part.startswith("self") else "layers.1"
    assert [row["branch"] for row in report.findings["branches"]] == [wanted]
    (x,) = batches(TOKENS, 1)[0]
    assert relative_error(small(x), model(x)) <= 1e-5


def test_of_nested_branches_the_outer_one_is_both() -> None:
    net = Joined(inner)
    with torch.no_grad():
        for parameter in net.c.parameters():
            parameter.zero_()
    model = capture(net)
    _, report = pruned(model, "macs=0.5")
    assert [row["branch"] for row in report.findings["branches"]] == ["a"]


def test_groups_that_are_left_keep_their_branches() -> None:
    model = capture(Blocks(Block(4), Block(4, last=0.0), Block(4, 8)))
    _, report = pruned(model, "macs=0.75,leave=blocks.1.a")
    assert "blocks.1" not in [row["branch"] for row in report.findings["branches"]]
    _, only = pruned(model, "macs=0.8,only=blocks.1.a")
    assert [row["branch"] for row in only.findings["branches"]] == ["blocks.1"] and not only.findings["groups"]


def test_homes() -> None:
    """A group belongs to the innermost branch that holds all of it."""
    from graphopt.passes._budget import Macs
    from graphopt.passes._importance import measure
    from graphopt.passes._plan import Plan

    model = capture(Blocks(Block(4), Block(4)))
    coupling = couple(model)
    groups = list(coupling.groups.values())
    plan = Plan(
        coupling,
        Macs(0.5),
        measure("magnitude", coupling, (), 0),
        groups,
        most=dict.fromkeys(coupling.groups, 0.9),
        step=None,
    )
    tradeoff = Tradeoff(plan, dict.fromkeys(branches(model), 1.0))
    homes = {name: home.name if (home := tradeoff.home(group)) else None for name, group in coupling.groups.items()}
    assert homes == {"stem": None, "blocks.0.a": "blocks.0", "blocks.1.a": "blocks.1"}


def test_a_latency_is_met_on_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.analysis.widths import layer_macs

    built: list[float] = []

    def build(watch: Stopwatch, model: go.Model) -> float:
        built.append(sum(layer_macs(model).values()))
        return built[-1]

    monkeypatch.setattr(Stopwatch, "build", build)
    monkeypatch.setattr(Stopwatch, "ratio", lambda watch, one, other, inputs: 0.1 + 0.9 * one / other)
    monkeypatch.setattr(LatencyTable, "seconds", a_second)
    model = capture(Blocks(Block(4), Block(4, last=0.0), Block(4, 8)))
    _, report = pruned(model, "latency=0.6,step=1")
    assert [row["branch"] for row in report.findings["branches"]] == ["blocks.1"]
    achieved = report.findings["achieved"]["latency"]
    assert achieved <= 0.6 and any(achieved == pytest.approx(0.1 + 0.9 * one / built[0]) for one in built)


# What is refused


def failure(model: go.Model, text: str, **options: object) -> str:
    with pytest.raises(GraphoptError) as caught:
        go.run(model, f"prune-channels{{macs=0.5,branches=true{text}}}", **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_refusals() -> None:
    model = capture(Blocks(Block(4)))
    assert "branches need calibration data" in failure(model, "")
    assert "no loss that could be compared" in failure(model, ",importance=magnitude", calib=batches())
    assert "evaluation mode" in failure(model.clone().train(), "", calib=batches())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert "zero or not finite" in failure(model, "", calib=batches())


def test_a_wrong_branch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none: erase another operand than the branch."""
    from graphopt.passes import _branches

    def wrong(rw: Rewriter, gone: Sequence[Branch]) -> None:
        add = next(node for node in rw.graph.nodes if node.name == gone[0].add.name)
        rw.replace(add, add.args[gone[0].operand], "a mistake")
        rw.model.touch()

    monkeypatch.setattr(_branches, "erase", wrong)
    model = capture(Blocks(Block(4), Block(4, last=0.0), Block(4, last=2.0)))
    monkeypatch.setattr(_branches._Search, "_is_better", lambda search, short, narrow: True)
    assert "of the largest reference output" in failure(model, "", calib=batches())


# All of it, by chance


@st.composite
def chains(draw: st.DrawFn) -> nn.Module:
    """Blocks of several kinds in a row, inside one another or side by side."""
    kinds = st.recursive(
        st.sampled_from(["plain", "post", "gated", "wide"]), lambda inside: st.tuples(inside, inside), max_leaves=4
    )
    return nn.ModuleList([Random(kind) for kind in draw(st.lists(kinds, min_size=1, max_size=4))])


class Random(nn.Module):
    def __init__(self, kind: object) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(6, 8), nn.Linear(8, 6)
        self.short, self.scale = nn.Linear(6, 6), nn.Parameter(torch.rand(6) + 0.5)
        self.inside = nn.ModuleList(map(Random, kind) if isinstance(kind, tuple) else ())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(F.layer_norm(x, (6,))))
        if self.inside:
            return x + self.inside[1](self.inside[0](self.b(h)))
        match self.kind:
            case "post":
                return torch.relu(self.b(h) + x)
            case "gated":
                return x + self.scale * self.b(h)
            case "wide":
                return self.short(x) + self.b(h)
        return x + self.b(h)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chain=chains(), pick=st.randoms(use_true_random=False))
def test_without_a_branch_is_with_zeros(chain: nn.ModuleList, pick: object) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = go.capture(nn.Sequential(nn.Linear(6, 6), *chain, nn.Linear(6, 2)).eval(), (x,))
    found = branches(model)
    assert len(found) == sum(map(_sums, (block.kind for block in chain)))
    chosen = pick.sample(found, pick.randint(1, len(found)))  # type: ignore[attr-defined]
    outermost = [one for one in chosen if not any(one.add in other.nodes for other in chosen)]
    small = without(model, outermost)
    assert relative_error(small(x), zeroed(model, outermost)(x)) <= 1e-5
    layers = sum(node.target is torch.ops.aten.linear.default for node in model.graph.nodes)
    gone = len({layer for branch in outermost for layer in branch.layers})
    assert sum(node.target is torch.ops.aten.linear.default for node in small.graph.nodes) == layers - gone


def _sums(kind: object) -> int:
    return 1 + sum(map(_sums, kind)) if isinstance(kind, tuple) else 1
