"""Pruning to a budget: what is met, what is proven, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt import surgery
from graphopt.analysis.cost import cost
from graphopt.analysis.coupling import couple
from graphopt.analysis.widths import layer_macs
from graphopt.errors import GraphoptError, UsageError
from graphopt.export import usual_sizes
from graphopt.measure import LatencyTable, Stopwatch
from graphopt.passes._importance import MEASURES, measure
from graphopt.rewriter import Rewriter
from graphopt.solve import BudgetError
from graphopt.target import Target
from tests.compare import relative_error
from tests.coupling import nets
from tests.passes.apply import a_second


def chain() -> go.Model:
    net, args, _ = nets.build("residual")
    return go.capture(net, args, dynamic={"x": {0: "batch"}})


def batches(count: int = 2, size: int = 6) -> list[list[Tensor]]:
    return [[torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))] for seed in range(count)]


def failure(model: go.Model, pipeline: str, **options: object) -> str:
    with pytest.raises(GraphoptError) as caught:
        go.run(model, pipeline, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_and_not_by_far(kind: str, part: float) -> None:
    model = chain()
    _small, (report,) = go.run(model, f"prune-channels{{{kind}={part},most=0.95}}")
    before, after = report.cost_before, report.cost_after
    assert before is not None and after is not None
    left = after.at(batch=2).macs / before.at(batch=2).macs if kind == "macs" else after.parameters / before.parameters
    assert 0.6 * part <= left <= part
    assert report.findings["achieved"] == {kind: pytest.approx(left)}
    assert report.check is not None and report.check.error > 0


@pytest.mark.parametrize(
    "name",
    [
        "shuffle",
        "stack",
        "attention",
        "fused",
        "grouped_queries",
        "bias_table",
        "c2f",
        "unet",
        "experts",
        "grouped",
        "weight_first",
    ],
)
def test_half_of_it_still_runs_trains_compiles_and_is_written(name: str, tmp_path: Path) -> None:
    net, args, _ = nets.build(name)
    small, (report,) = go.run(go.capture(net, args), "prune-channels{macs=0.5}")
    assert report.cost_after is not None and report.cost_before is not None
    assert report.cost_after.macs <= 0.5 * report.cost_before.macs
    outputs = small(*args)
    assert outputs.shape == net(*args).shape
    outputs.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in small.parameters())
    small.save(tmp_path / "small.onnx")
    with torch.no_grad():
        expected = small(*args)
        for found in (go.load(tmp_path / "small.onnx")(*args), go.build(small, backend="tvm")(*args)):
            assert relative_error(found, expected) <= 1e-5


def test_batches_stay_free() -> None:
    small, _ = go.run(chain(), "prune-channels{macs=0.4}")
    for size in (1, 5):
        assert small(torch.randn(size, 3, 8, 8)).shape == (size, 5)


def test_refitting_brings_the_outputs_nearer() -> None:
    _, (report,) = go.run(chain(), "prune-channels{macs=0.5}", calib=batches())
    errors = report.findings["output error"]
    assert errors["refitted"] < 0.8 * errors["cut"]
    _, (plain,) = go.run(chain(), "prune-channels{macs=0.5,refit=false}", calib=batches())
    assert "output error" not in plain.findings


def test_a_linear_reader_is_refitted_to_the_least_squares_optimum() -> None:
    torch.manual_seed(0)
    mixed = torch.randn(40, 6) @ torch.randn(6, 8)  # the eight features of the hidden layer are made of six
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(8))
    small, _ = go.run(go.capture(net.eval(), (mixed,)), "prune-channels{macs=0.8,most=0.3}", calib=[[mixed]])
    assert relative_error(small(mixed), net(mixed)) <= 1e-4  # six features say all that eight did


def test_what_is_asked_for_and_what_is_left() -> None:
    model = chain()
    _, (only,) = go.run(model, "prune-channels{macs=0.8,only=a}")
    assert [row["group"] for row in only.findings["groups"]] == ["a"]
    _, (without,) = go.run(model, "prune-channels{macs=0.8,leave=a}")
    assert [row["group"] for row in without.findings["groups"]] == ["stem"]
    _, (stepped,) = go.run(model, "prune-channels{macs=0.6,step=4}")
    assert all(row["left"] % 4 == 0 for row in stepped.findings["groups"])
    assert [miss.reason for miss in only.misses] == ["its 5 positions stay: 'linear' in head is an output"]


def test_memory_is_that_of_weights_and_of_what_is_alive_at_once() -> None:
    model = chain()
    before, sizes = cost(model), usual_sizes(model)
    small, (report,) = go.run(model, "prune-channels{memory=0.6}")
    after = cost(small)
    left = [counted.weight_bytes + counted.at(**sizes).peak_bytes for counted in (after, before)]
    assert report.findings["achieved"]["memory"] == pytest.approx(left[0] / left[1]) and 0.45 < left[0] / left[1] <= 0.6


def test_single_groups_have_limits_of_their_own() -> None:
    _, (report,) = go.run(chain(), "prune-channels{macs=0.5,limits=a:0.1;stem:0.8}")
    rows = {row["group"]: (row["units"], row["left"]) for row in report.findings["groups"]}
    _, (free,) = go.run(chain(), "prune-channels{macs=0.5}")
    left = {row["group"]: row["left"] for row in free.findings["groups"]}
    assert left["a"] < 0.9 * 12 <= rows.get("a", (12, 12))[1] and rows["stem"][1] < left["stem"]
    for limits, message in (("b:0.5", "no group 'b'"), ("a", "'a' is none"), ("a:2", "'a:2' is none")):
        with pytest.raises(UsageError, match=message):
            go.run(chain(), f"prune-channels{{macs=0.5,limits={limits}}}")
    with pytest.raises(BudgetError, match="cannot be met"):
        go.run(chain(), "prune-channels{macs=0.5,limits=a:0;stem:0}")


def test_narrow_groups_have_smaller_steps() -> None:
    """Of 8 units steps of 16 are steps of 4."""
    _, (report,) = go.run(chain(), "prune-channels{macs=0.5,step=16}")
    assert [(row["group"], row["units"], row["left"]) for row in report.findings["groups"]] == [("stem", 8, 4)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that is a number of multiply-accumulates, with a fifth that no width changes: what was asked of it."""
    asked: list[float] = []
    macs = {}

    def build(watch: Stopwatch, model: go.Model) -> go.Model:
        return model

    def ratio(watch: Stopwatch, model: go.Model, other: go.Model, inputs: object) -> float:
        for one in (model, other):
            macs[id(one)] = sum(layer_macs(one).values())
        asked.append(0.2 + 0.8 * macs[id(model)] / macs[id(other)])
        return asked[-1]

    monkeypatch.setattr(Stopwatch, "build", build)
    monkeypatch.setattr(Stopwatch, "ratio", ratio)
    monkeypatch.setattr(LatencyTable, "seconds", a_second)
    return asked


@pytest.mark.parametrize("part", [0.5, 0.7])
def test_a_latency_is_met_on_what_is_measured(clock: list[float], part: float) -> None:
    """The plan knows one second for each layer; the clock knows better."""
    _, (report,) = go.run(chain(), f"prune-channels{{latency={part},step=1}}")
    achieved = report.findings["achieved"]["latency"]
    assert achieved in clock and achieved <= part and len(clock) <= 8
    assert achieved > 0.8 * part


def test_a_latency_that_cannot_be_met_says_what_was_measured(clock: list[float]) -> None:
    message = failure(chain(), "prune-channels{latency=0.15,step=1}")
    assert "latency=0.15 cannot be met" in message and f"{min(clock):.2g} is the smallest" in message


def test_a_latency_on_another_machine_is_refused() -> None:
    other = "cortex-a72" if Target.parse("cpu").kind != "arm64" else "x86-64-v3"
    assert "cannot be measured here" in failure(chain(), f"prune-channels{{latency=0.5,target={other}}}")


def test_masks_and_ties_are_cut_too() -> None:
    net, args, _ = nets.build("tied")
    model = go.capture(net, args)
    mask = torch.ones(10, 8, dtype=torch.bool)
    model.params.masks["embed.weight"] = mask
    small, _ = go.run(model, "prune-channels{params=0.7}")
    assert small.params["embed.weight"] is small.params["head.weight"]
    assert small.params.masks["embed.weight"].shape == small.params["embed.weight"].shape
    assert small.params["embed.weight"].shape[0] == 10


@pytest.mark.parametrize("name", MEASURES)
def test_a_measure_finds_the_unit_that_does_nothing(name: str) -> None:
    """One channel of `a` has no weights, no scale, and nobody reads it."""
    net, args, _ = nets.build("residual")
    with torch.no_grad():
        for tensor in (net.a.weight[7], net.a.bias[7], net.na.weight[7], net.na.bias[7], net.b.weight[:, 7]):
            tensor.zero_()
    model = go.capture(net, args)
    coupling = couple(model)
    scores = measure(name, coupling, batches(), seed=0).scores(coupling.group("a"), 0)
    assert scores.shape == (12,) and (scores >= 0).all() and scores.std() > 0
    if name not in ("random", "median"):
        assert scores.argmin() == 7


def test_importance_tells_good_choices_from_chance() -> None:
    errors = {}
    for name in ("taylor", "activation", "magnitude", "random"):
        text = f"prune-channels{{macs=0.6,importance={name},refit=false}}"
        errors[name] = go.run(chain(), text, calib=batches())[1][0].check
    assert errors["taylor"].error < errors["random"].error  # type: ignore[union-attr]


def test_a_wrong_cut_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none: swap two channels of a weight behind the pass's back."""
    from graphopt.passes import _cutting

    def wrong(rw: Rewriter, removal: object, why: str) -> None:
        surgery.cut(rw, removal, why)  # type: ignore[arg-type]
        weight = next(node for node in rw.graph.nodes if str(node.target) == "b.weight")
        rw.set_tensor(weight, rw.params["b.weight"].detach().roll(1, 1), "a mistake")

    monkeypatch.setattr(_cutting, "cut", wrong)
    assert "away from the masked original" in failure(chain(), "prune-channels{macs=0.5}")


def test_train_mode_is_pruned_in_eval_mode_and_stays() -> None:
    model = chain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, _ = go.run(model, "prune-channels{macs=0.5}", calib=batches())
    assert small.mode == "train"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "needs one budget"),
        ("macs=0.5,params=0.5", "needs one budget"),
        ("macs=1.5", "macs is 1.5, it has to be between 0 and 1"),
        ("macs=0", "macs is 0, it has to be between 0 and 1"),
        ("macs=0.5,most=1.2", "most is 1.2"),
        ("macs=0.5,step=0", "step is 0"),
        ("macs=0.01", "macs=0.01 cannot be met: 0.0"),
        ("macs=0.5,only=stam", "there is no group 'stam'"),
        ("macs=0.5,importance=taylor", "'taylor' needs calibration data"),
        ("macs=0.5,refit=true", "refit needs calibration data"),
        ("macs=0.5,importance=best", "is a"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    text = failure(chain(), f"prune-channels{{{options}}}")
    assert message in text
    if "stam" in options:
        assert "did you mean stem?" in text


def test_bad_calibration_data() -> None:
    wrong = failure(chain(), "prune-channels{macs=0.5}", calib=[[torch.randn(2, 3, 9, 8)]])
    assert "calibration batch 0" in wrong and "[batch, 3, 8, 8]" in wrong
    data = torch.randn(2, 3, 8, 8)
    data[0, 0, 0, 0] = float("nan")
    assert "holds NaN" in failure(chain(), "prune-channels{macs=0.5}", calib=[batches()[0], [data]])


def test_the_model_is_left_alone_when_it_fails() -> None:
    model = chain()
    text = str(model)
    with pytest.raises(BudgetError):
        go.run(model, "prune-channels{macs=0.01}")
    assert str(model) == text
