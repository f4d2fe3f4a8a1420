"""Mixtures with fewer experts: which are merged, what they become, and what stays exact."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from benchmarks.torchvision_ops import define_missing
from graphopt.passes._experts import Hidden, average, groups_of, matching
from tests.compare import relative_error
from tests.passes.apply import gradients, reasons
from tests.passes.mixtures import (
    COLUMNS,
    GATES,
    SIZE,
    SUMS,
    Computed,
    Dense,
    Indexed,
    Mlp,
    capture,
    copies,
    count_of,
    data,
    distance,
    favour,
    layer,
    merged,
    permuted,
)

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
