"""Whole blocks go: which are worth what, which go, what is left, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.analysis.widths import layer_macs
from graphopt.errors import CheckFailed, GraphoptError
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.passes._blocks import find_blocks
from graphopt.rewriter import Rewriter
from tests import zoo
from tests.compare import relative_error
from tests.passes.apply import gradients, reasons


class BasicBlock(nn.Module):
    """As in a resnet18: two convolutions, a projection where size or width change."""

    def __init__(self, size: int, out: int | None = None, stride: int = 1, last: float = 1.0) -> None:
        super().__init__()
        out = out or size
        self.conv1, self.bn1 = nn.Conv2d(size, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = out == size and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(size, out, 1, stride), nn.BatchNorm2d(out))
        nn.init.uniform_(self.bn2.weight, 0.5 * last, last)
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.short(x) + (0 if self.skipped else made))


class ResNet(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(*blocks), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


def resnet(last: Sequence[float] = (1.0, 0.3, 1.0, 0.6)) -> ResNet:
    net = ResNet(
        BasicBlock(4, last=last[0]),
        BasicBlock(4, last=last[1]),
        BasicBlock(4, 8, 2, last=last[2]),
        BasicBlock(8, last=last[3]),
    )
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))  # statistics, and sizes of lazy layers
    return net.eval()


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def mlp(size: int = 6, inner: int = 8) -> Residual:
    return Residual(nn.Linear(size, inner), nn.Tanh(), nn.Linear(inner, size))


def adding(value: float) -> Residual:
    """Adds a number, whatever comes in."""
    block = Residual(nn.Linear(1, 1))
    nn.init.zeros_(block.layers[0].weight)
    nn.init.constant_(block.layers[0].bias, value)
    return block


IMAGE = (2, 3, 8, 8)


def batches(shape: Sequence[int] = IMAGE, count: int = 2) -> list[list[Tensor]]:
    return [[torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(seed))] for seed in range(count)]


def capture(net: nn.Module, shape: Sequence[int] = IMAGE) -> go.Model:
    return go.capture(net.eval(), (torch.randn(shape),), dynamic={0: {0: "batch"}})


def shortened(
    model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None
) -> tuple[go.Model, go.Report]:
    small, (report,) = go.run(model, f"remove-layers{{{text}}}", calib=batches() if calib is None else calib)
    json.dumps(report.to_json())
    return small, report


def removed(report: go.Report) -> list[str]:
    return [row["block"] for row in report.findings["removed"]]


def worth(report: go.Report) -> dict[str, float]:
    return {row["block"]: row["importance"] for row in report.findings["blocks"]}


def distance(calib: Sequence[Sequence[Tensor]], ours: Callable[[Tensor], Tensor], theirs: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(ours(x).double(), theirs(x).double()) for (x,) in calib]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


# What goes, and what is left


def test_residual_blocks_by_what_the_outputs_lose() -> None:
    net, calib = resnet(), batches()
    small, report = shortened(capture(net), "count=1")
    expected, full = {}, copy.deepcopy(net)
    for index, block in enumerate(net.blocks):
        block.skipped = True
        expected[f"blocks.{index}"] = distance(calib, net, full)
        block.skipped = False
    assert worth(report) == pytest.approx(expected, rel=1e-4)
    (gone,) = removed(report)
    assert gone == min(expected, key=expected.__getitem__)
    assert report.findings["output error"] == pytest.approx(expected[gone], rel=1e-4)
    assert report.findings["achieved"] == report.findings["budget"] == {"count": 1} and report.findings["iterated"]
    net.get_submodule(gone).skipped = True
    for (x,) in (*batches(), batches((3, 3, 8, 8))[0]):
        assert relative_error(small(x[:3]), net(x[:3])) <= 1e-5
    assert not any(name.startswith(f"{gone}.") for name in small.state_dict())
    assert [edit.why for edit in report.edits if "branch" in edit.why] == [f"without the branch '{gone}'"]
    assert all(g is not None and g.isfinite().all() for g in gradients(small, calib[0]).values())


def test_a_projection_stays_where_its_block_goes() -> None:
    net = resnet()
    small, report = shortened(capture(net), "count=1,only=blocks.2")
    assert removed(report) == ["blocks.2"]
    left = {name for name in small.state_dict() if name.startswith("blocks.2.")}
    assert left and all(name.startswith("blocks.2.short.") for name in left)


@torch.no_grad()
def test_similarity_is_of_what_goes_in_and_comes_out() -> None:
    net, calib = resnet(), batches()
    _, report = shortened(capture(net), "count=2,importance=similarity")
    expected = {}
    for index, block in enumerate(net.blocks):
        sums: list[Tensor] = []
        for (x,) in calib:
            x = net.blocks[:index](torch.relu(net.stem(x)))
            kept = block.short(x)
            made = kept + block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            sums += [F.cosine_similarity(kept.double(), made.double(), 1).flatten()]
        expected[f"blocks.{index}"] = 1 - float(torch.cat(sums).mean())
    assert worth(report) == pytest.approx(expected, abs=1e-4)
    assert sorted(removed(report)) == sorted(sorted(expected, key=expected.__getitem__)[:2])
    assert not report.findings["iterated"]


@pytest.mark.parametrize(
    ("name", "layers"), [("gpt2", "transformer.h"), ("llama", "model.layers"), ("vit", "vit.layers")]
)
def test_a_transformer_layer_is_attention_and_mlp(name: str, layers: str) -> None:
    net = zoo.build(name)
    model = go.capture(net.module, net.args(), dynamic=net.dynamic)
    calib = [list(net.args(4, seed)) for seed in (1, 2)]
    small, report = shortened(model, "count=1,importance=similarity", calib)
    assert list(worth(report)) == [f"{layers}.{index}" for index in range(3)] and not report.misses
    assert all(len(row["branches"]) == 2 for row in report.findings["blocks"])
    (gone,) = removed(report)
    del net.module.get_submodule(layers)[int(gone[-1])]
    for batch, seed in ((2, 5), (3, 6)):
        args = net.args(batch, seed)
        with torch.no_grad():
            assert relative_error(small(*args), net.module(*args)) <= 1e-5
    _, report = shortened(model, "macs=0.85,unit=branch", calib)
    assert len(worth(report)) == 6 and report.findings["achieved"]["macs"] <= 0.85
    assert all(name.count(".") > layers.count(".") + 1 for name in removed(report))


def test_a_block_that_does_nothing_goes_first() -> None:
    model = capture(resnet((1.0, 0.0, 1.0, 1.0)))
    for importance in ("loss", "similarity"):
        small, report = shortened(model, f"count=1,importance={importance}")
        assert removed(report) == ["blocks.1"] and report.findings["removed"][0]["importance"] == pytest.approx(
            0, abs=1e-6
        )
        assert relative_error(small(batches()[0][0]), model(batches()[0][0])) <= 1e-5


@pytest.mark.parametrize(("iterate", "error"), [("true", 0.5), ("false", 1.49)])
def test_after_a_removal_the_rest_is_measured_again(iterate: str, error: float) -> None:
    """Without the 0.5, the 1.0 that is taken off would be missed less than the 0.99 that is added."""
    model = capture(nn.Sequential(adding(0.99), adding(-1.0), adding(0.5)), (2, 1))
    calib = [[torch.ones(4, 1)]]
    _, report = shortened(model, f"count=2,iterate={iterate}", calib)
    assert report.findings["output error"] == pytest.approx(error / 1.49, rel=1e-5)
    assert removed(report) == ["2.layers.0", "1.layers.0" if iterate == "true" else "0.layers.0"]


def test_measuring_again_is_left_out_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes import _shortening

    monkeypatch.setattr(_shortening, "_MOST_RUNS", 13)  # 4 blocks, then 3, on 2 batches
    _, report = shortened(capture(resnet()), "count=2")
    assert not report.findings["iterated"]


# Budgets


@pytest.mark.parametrize(("kind", "importance"), [("macs", "loss"), ("params", "similarity")])
def test_a_budget(kind: str, importance: str) -> None:
    model = capture(resnet())
    _, report = shortened(model, f"{kind}=0.7,importance={importance}")
    before, after = report.cost_before, report.cost_after
    assert before is not None and after is not None
    left = after.at(batch=2).macs / before.at(batch=2).macs if kind == "macs" else after.parameters / before.parameters
    assert 0.2 < left <= 0.7 and report.findings["achieved"] == {kind: pytest.approx(left)}
    rows = {row["block"]: row["saves"] for row in report.findings["blocks"]}
    assert 1 - sum(rows[name] for name in removed(report)) == pytest.approx(left)
    # None of those that went could have stayed.
    assert all(left + rows[name] > 0.7 for name in removed(report))


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    model = capture(resnet())
    every, report = shortened(model, "count=4")
    smallest = sum(layer_macs(every).values()) / sum(layer_macs(model).values())
    assert f"{smallest:.3g} is the smallest that was reached" in failure(model, "macs=0.01")
    assert "1 is the smallest" not in failure(model, "params=0.01") and len(removed(report)) == 4


def test_a_latency_is_measured_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[float] = []

    def build(watch: Stopwatch, model: go.Model) -> float:
        built.append(sum(layer_macs(model).values()))
        return built[-1]

    monkeypatch.setattr(Stopwatch, "build", build)
    monkeypatch.setattr(Stopwatch, "ratio", lambda watch, one, other, inputs: 0.1 + 0.9 * one / other)
    monkeypatch.setattr(LatencyTable, "seconds", lambda table, node: 1.0)
    model = capture(resnet())
    _, report = shortened(model, "latency=0.7")
    achieved = report.findings["achieved"]["latency"]
    assert achieved <= 0.7 and achieved == pytest.approx(0.1 + 0.9 * built[-1] / built[0])
    assert [row["saves"] for row in report.findings["blocks"]] == pytest.approx([2 / 11] * 4)  # of 11 layers
    assert "latency=0.1 cannot be met" in failure(model, "latency=0.1")


# Blocks in each other, beside each other, with weights in common


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.outer = Residual(nn.Linear(6, 6), mlp(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.stem(x)))


def test_a_block_in_a_block() -> None:
    net, calib = Nested(), batches((2, 6))
    nn.init.zeros_(net.outer.layers[1].layers[2].weight)
    model = capture(net, (2, 6))
    _, report = shortened(model, "count=1", calib)
    assert len(worth(report)) == 2 and "outer.layers.1" in removed(report)[0]
    smallest, report = shortened(model, "macs=0.3", calib)
    (gone,) = removed(report)  # the inner one is a part of the outer one
    assert gone == "outer.layers"
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert relative_error(smallest(x), net.head(net.stem(x))) <= 1e-5
    assert "2 blocks can go" in failure(model, "count=3", calib)
    assert "count=2 cannot be met: 1 blocks can go" in failure(model, "count=2", calib)


class Repeated(nn.Module):
    """One block, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), mlp(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.block(self.stem(x)))))


def test_weights_in_common_stay_while_they_are_used() -> None:
    model, calib = capture(Repeated(), (2, 6)), batches((2, 6))
    small, report = shortened(model, "count=2", calib)
    assert list(worth(report)) == ["block.layers", "block.layers#2", "block.layers#3"]
    assert small.state_dict().keys() == model.state_dict().keys()
    _, report = shortened(model, "params=0.5", calib)
    assert len(removed(report)) == 3 and report.findings["achieved"]["params"] == pytest.approx(56 / 166)


def test_names() -> None:
    model = capture(resnet())
    _, report = shortened(model, "count=1,only=blocks.0;blocks.3")
    assert list(worth(report)) == ["blocks.0", "blocks.3"]
    _, report = shortened(model, "count=1,leave=blocks.1")
    assert list(worth(report)) == ["blocks.0", "blocks.2", "blocks.3"]
    _, report = shortened(model, "count=1,only=blocks,leave=blocks.0;blocks.1;blocks.2")
    assert removed(report) == ["blocks.3"]
    assert "did you mean blocks.1" in failure(model, "count=1,only=block.1")
    assert "no block is called 'stem'" in failure(model, "count=1,leave=stem")


# What is refused


def failure(model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None) -> str:
    with pytest.raises(GraphoptError) as caught:
        go.run(model, f"remove-layers{{{text}}}", calib=batches() if calib is None else calib)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=none", "it needs one budget"),
        ("count=1,macs=0.5", "it needs one budget"),
        ("count=0", "count is 0, it has to be at least 1"),
        ("count=5", "count is 5, and 4 blocks can go: blocks.0, blocks.1, blocks.2, blocks.3"),
        ("macs=1.5", "macs is 1.5, it has to be between 0 and 1"),
        ("params=0", "params is 0, it has to be between 0 and 1"),
        ("count=1,importance=size", "importance"),
        ("count=1,unit=head", "unit"),
    ],
)
def test_wrong_options(text: str, expected: str) -> None:
    assert expected in failure(capture(resnet()), text)


def test_data_and_mode_it_cannot_do_with() -> None:
    model = capture(resnet())
    assert "needs calibration data" in failure(model, "count=1", [])
    assert "evaluation mode" in failure(model.clone().train(), "count=1")
    assert "holds NaN" in failure(model, "count=1", [[torch.full(IMAGE, torch.nan)]])
    assert "zero or not finite" in failure(model, "count=1", [[torch.full(IMAGE, 1e38)]])
    for parameter in model.parameters():
        parameter.data.zero_()
    assert "zero or not finite" in failure(model, "count=1")


def test_a_block_whose_worth_cannot_be_told_stays() -> None:
    class Guarded(nn.Module):
        """Divides by what a block makes; the other one is harmless."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = adding(2.0), mlp(1)

        def forward(self, x: Tensor) -> Tensor:
            return 1 / (self.b(self.a(x * 0)) - self.b(x * 0))

    model = capture(Guarded(), (2, 1))
    _, report = shortened(model, "count=1", [[torch.ones(4, 1)]])
    assert (
        any("the outputs are not finite" in reason for reason in reasons(report)) and "a" not in removed(report)[0][:2]
    )


class Attention(nn.Module):
    """Attention and an MLP; the mask, if one is given, is an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.mlp = mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(mask[:, None], -1e9)
        return self.mlp(x + self.out(scores.softmax(-1) @ self.v(x)))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(6, 6), nn.ModuleList([Attention(), Attention()]), nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def test_attention_by_hand_is_attention() -> None:
    model = go.capture(Stacked().eval(), (torch.randn(2, 5, 6),))
    assert [block.name for block in find_blocks(Rewriter(model), "layer")] == ["layers.0", "layers.1"]


def test_attention_under_a_mask_stays_and_its_mlp_with_it() -> None:
    inputs = (torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    model = go.capture(Stacked().eval(), inputs)
    text = failure(model, "count=1", [inputs])
    assert "0 blocks can go" in text and "it reads 'mask', which does not come from what it is added to" in text
    _, report = shortened(model, "count=1,unit=branch", [inputs])
    assert list(worth(report)) == ["layers.0.mlp.layers", "layers.1.mlp.layers"]
    assert len(report.misses) == 2
    rw = Rewriter(model)
    assert find_blocks(rw, "layer") == []
    assert sum("takes both or neither" in miss.reason for miss in rw.misses) == 2


STAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "used elsewhere": (lambda m, x: (h := m.a(x)) * (x + m.b(h)), "is also used by"),
    "random": (lambda m, x: x + m.a(x + torch.rand(6)), "draws random numbers"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_is_no_block(case: str) -> None:
    join, reason = STAYS[case]

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.stem, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(join(self, torch.relu(self.stem(x)))))

    text = failure(capture(Joined(), (2, 6)), "count=1", batches((2, 6)))
    assert "0 blocks can go" in text and reason in text


def test_no_output_becomes_an_input_and_something_is_left() -> None:
    one = capture(mlp(), (2, 6))
    assert "without it an output would be the input 'x'" in failure(one, "count=1", batches((2, 6)))
    two = capture(nn.Sequential(mlp(), mlp()), (2, 6))
    _, report = shortened(two, "count=1", batches((2, 6)))
    assert len(removed(report)) == 1
    assert "count=2 cannot be met: 1 blocks can go" in failure(two, "count=2", batches((2, 6)))
    bare = capture(nn.Sequential(nn.Tanh(), mlp(), nn.Tanh()), (2, 6))
    assert "cannot be met: 0 blocks can go" in failure(bare, "count=1", batches((2, 6)))


def test_a_wrong_removal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none: let the branch stand for the sum."""
    from graphopt.passes import remove_layers

    def wrong(rw: Rewriter, gone: Sequence[object]) -> None:
        add = next(node for node in rw.graph.nodes if node.name == gone[0].add.name)  # type: ignore[attr-defined]
        rw.replace(add, add.args[gone[0].operand], "a mistake")  # type: ignore[attr-defined]
        rw.model.touch()

    monkeypatch.setattr(remove_layers, "erase", wrong)
    with pytest.raises(GraphoptError) as caught:
        go.run(capture(resnet()), "remove-layers{count=1}", calib=batches())
    assert "of the largest reference output" in str(caught.value)
    assert isinstance(caught.value.__cause__ or caught.value, CheckFailed | GraphoptError)


# All of it, by chance


class Random(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.inner = kind, mlp()
        self.a, self.b, self.short = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6)
        self.skipped = False

    def forward(self, x: Tensor) -> Tensor:
        made = self.b(torch.tanh(self.a(F.layer_norm(x, (6,)))))
        made = self.inner(made) if self.kind == "nested" else made
        kept = self.short(x) if self.kind == "wide" else x
        total = kept if self.skipped else kept + made
        return torch.relu(total) if self.kind == "post" else total


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(["plain", "post", "wide", "nested"]), min_size=2, max_size=5),
    count=st.integers(1, 2),
    importance=st.sampled_from(["loss", "similarity"]),
)
def test_what_is_left_is_the_net_without_the_blocks(kinds: list[str], count: int, importance: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), *map(Random, kinds), nn.Linear(6, 2)).eval()
    x = torch.randn(3, 6)
    model = go.capture(net, (x,))
    outer = ";".join(block.name for block in find_blocks(Rewriter(model), "layer") if "inner" not in block.name)
    leave = f",leave={';'.join(f'{i + 1}.inner' for i, kind in enumerate(kinds) if kind == 'nested')}"
    text = f"count={count},importance={importance}" + (leave if "nested" in kinds else "")
    small, report = shortened(model, text, [[torch.randn(3, 6)]])
    assert len(removed(report)) == count and set(removed(report)) <= set(outer.split(";"))
    for name in removed(report):
        net.get_submodule(name.partition(".")[0]).skipped = True
    with torch.no_grad():
        assert relative_error(small(x), net(x)) <= 1e-5
