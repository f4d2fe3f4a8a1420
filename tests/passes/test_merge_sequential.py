"""Layers that follow each other become one where that is exact and pays, or stay with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import UsageError
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons
from tests.passes.branched import trained

PASS = "merge-sequential"
BATCH = {0: {0: "batch"}}


def batch(shape: Sequence[int], size: int = 2) -> tuple[Tensor]:
    return (torch.randn(size, *shape, generator=torch.Generator().manual_seed(size)),)


def merged(
    net: nn.Module, shape: Sequence[int], pipeline: str = PASS, limit: float = 2e-6
) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, trainable, and left alone by a second run."""
    net = net.eval()
    _, after, report = apply(net, batch(shape), pipeline, dynamic=BATCH)
    assert errors_at(net, after, batch(shape, 2), batch(shape, 3)) <= limit
    found = {name: grad for name, grad in gradients(after, batch(shape)).items() if name not in after.kept}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found.values())
    again, reports = go.run(after, pipeline)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


def kept(net: nn.Module, shape: Sequence[int], *expected: str, pipeline: str = PASS) -> None:
    before, after, report = apply(net.eval(), batch(shape), pipeline)
    assert not report.edits and str(after) == str(before)
    assert len(report.misses) == len(expected), report.misses
    for reason, text in zip(reasons(report), expected, strict=True):
        assert text in reason


def weights(model: go.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name.endswith("weight")}


def test_a_3x3_and_a_1x1_are_a_3x3() -> None:
    after, report = merged(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)), (3, 9, 7))
    assert operators(after) == ["conv2d"] and weights(after) == {"merged.weight": (4, 3, 3, 3)}
    assert len(report.edits) == 1 and not report.misses


def test_batch_norms_between_and_behind_go_with_them() -> None:
    net = trained(
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)),
        (3, 9, 7),
    )
    after, _ = merged(net, (3, 9, 7))
    assert operators(after) == ["conv2d", "batch_norm"]
    after, _ = merged(net, (3, 9, 7), "fold-batch-norm,merge-sequential")
    assert operators(after) == ["conv2d"]


def test_linear_layers_and_the_cheapest_split_of_a_chain() -> None:
    """5 to 60 to 4 to 60 to 6: all in one is 30 products, any two of them more."""
    after, _ = merged(nn.Sequential(nn.Linear(5, 60), nn.Linear(60, 4), nn.Linear(4, 60), nn.Linear(60, 6)), (7, 5))
    assert weights(after) == {"merged.weight": (6, 5)}
    narrow = nn.Sequential(nn.Linear(60, 90), nn.Linear(90, 2), nn.Linear(2, 90), nn.Linear(90, 60))
    after, report = merged(narrow, (60,))
    assert sorted(weights(after).values()) == [(2, 60), (60, 2)] and len(report.edits) == 2
    assert any("is exact, but takes 7,200 instead of" in reason for reason in reasons(report))


def test_what_does_not_pay_is_said_with_both_costs() -> None:
    separable = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    kept(
        separable,
        (8, 5, 5),
        "merging it with 'conv2d' is exact, but takes 10,368 instead of 2,448 multiply-accumulates",
    )
    after, _ = merged(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1)), (8, 5, 5))
    assert weights(after) == {"merged.weight": (1, 8, 3, 3)}


def test_depthwise_layers_and_groups_stay_what_they_are() -> None:
    after, _ = merged(nn.Sequential(nn.Conv2d(6, 6, (1, 3), groups=6), nn.Conv2d(6, 6, 1, groups=6)), (6, 5, 5))
    assert weights(after) == {"merged.weight": (6, 1, 1, 3)}
    after, _ = merged(nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 3, groups=2)), (8, 5, 5))
    assert weights(after) == {"merged.weight": (8, 4, 3, 3)}


def test_convolution_and_average_pooling_are_one_strided_convolution() -> None:
    after, _ = merged(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(2)), (3, 8, 9))
    assert operators(after) == ["conv2d"] and weights(after) == {"merged.weight": (8, 3, 4, 4)}
    kept(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 1)), (8, 8, 8), "is exact, but takes 8,192 instead of")


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_axes(rank: int) -> None:
    conv = nn.Conv1d if rank == 1 else nn.Conv3d
    after, _ = merged(nn.Sequential(conv(3, 16, 3, 2, 1), conv(16, 4, 1)), (3, 7, 6, 5)[: rank + 1])
    assert operators(after) == [f"conv{rank}d"]


# The average of an image


@pytest.mark.parametrize("flat", ["flatten", "view", "mean", "keepdim"])
def test_a_pointwise_layer_goes_behind_the_average_and_into_the_classifier(flat: str) -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x.relu())
        if flat == "mean":
            return net.head(y.mean((2, 3)))
        y = y.mean((3, 2), keepdim=True) if flat == "keepdim" else F.adaptive_avg_pool2d(y, 1)
        return net.head(y.view(y.shape[0], -1) if flat == "view" else y.flatten(1))

    net = Net(forward, conv=nn.Conv2d(6, 40, 1, groups=2), head=nn.Linear(40, 10))
    after, report = merged(net, (6, 5, 7))
    assert list(weights(after).values()) == [(10, 6)] and not report.misses
    assert operators(after).count("conv2d") == 0 and operators(after).count("linear") == 1


def test_without_a_linear_layer_behind_it_the_convolution_works_on_the_average() -> None:
    after, _ = merged(nn.Sequential(nn.Conv2d(6, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Sigmoid()), (6, 5, 7))
    assert operators(after) == ["adaptive_avg_pool2d", "conv2d", "sigmoid"]
    assert after.state_dict().keys() == {"0.weight", "0.bias"}


def test_what_is_averaged_stays_before_it_where_it_is_read_elsewhere_or_wider() -> None:
    kept(
        nn.Sequential(nn.Conv2d(6, 10, 3), nn.AdaptiveAvgPool2d(1)), (6, 5, 7), "'conv2d' reads more than one position"
    )
    twice = Net(lambda net, x: (lambda y: (F.adaptive_avg_pool2d(y, 1), y))(net.a(x)), a=nn.Conv2d(6, 4, 1))
    kept(twice, (6, 5, 7), "'conv2d' is also used by 'output'")
    kept(nn.Sequential(nn.Conv2d(6, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (6, 5, 7))
    kept(nn.Sequential(nn.Conv2d(6, 10, 1), nn.AdaptiveAvgPool2d(2)), (6, 5, 7))


# Skips


def test_a_skip_is_absorbed_by_the_centre_tap() -> None:
    convs = {"a": nn.Conv2d(4, 32, 1, bias=False), "b": nn.Conv2d(32, 4, 3, padding=1)}
    after, report = merged(Net(lambda net, x: net.b(net.a(x)) + x, **convs), (4, 5, 7))
    assert operators(after) == ["conv2d"] and len(report.edits) == 2
    linears = {"a": nn.Linear(4, 32), "b": nn.Linear(32, 4)}
    after, _ = merged(Net(lambda net, x: x - net.b(net.a(x)), **linears), (3, 4))
    assert operators(after) == ["linear"]
    other = Net(lambda net, x: net.b(net.a(x)) + x.relu(), **linears)
    after, _ = merged(other, (3, 4))
    assert operators(after) == ["linear", "relu", "add.Tensor"]


# The border


BORDERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "a bias before a padding": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)), "the first adds a bias to"
    ),
    "a padding after a 3x3": (
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.Conv2d(8, 2, 3, padding=1)),
        "still reach its input",
    ),
    "no bias before a padding": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1)), None
    ),
    "all padding in front": (lambda: nn.Sequential(nn.Conv2d(2, 8, 3, padding=2), nn.Conv2d(8, 2, 3)), None),
    "a pad by hand": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(8, 8, 3)), None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BORDERS))
def test_the_border_rule_decides(name: str) -> None:
    make, reason = BORDERS[name]
    shape = (make()[0].in_channels, 9, 11)
    if reason is None:
        after, _ = merged(make(), shape)
        assert operators(after).count("conv2d") == 1
    else:
        kept(make(), shape, reason)


@pytest.mark.parametrize("name", list(BORDERS)[:2])
def test_paddings_that_are_moved_change_the_border_only(name: str) -> None:
    net = BORDERS[name][0]().eval()
    inputs = net[0].in_channels
    _, after, report = apply(net, batch((inputs, 9, 11)), "merge-sequential{padding=move}", dynamic=BATCH)
    assert report.check is not None and report.check.error > 1e-2
    for size in (2, 3):
        (x,) = batch((inputs, 9, 11), size)
        with torch.no_grad():
            ours, theirs = after(x), net(x)
        assert (
            relative_error(ours[:, :, 2:-2, 2:-2], theirs[:, :, 2:-2, 2:-2])
            <= 1e-6
            < 1e-2
            < relative_error(ours, theirs)
        )


def test_the_option_decides_the_contract() -> None:
    from graphopt.passes.merge_sequential import MergeSequential

    assert MergeSequential().contract.name == "exact" and MergeSequential(padding="move").contract.name == "lossy"
    assert str(MergeSequential(padding="move")) == "merge-sequential{padding=move}"
    with pytest.raises(UsageError, match="'padding' of 'merge-sequential'"):
        go.run(go.capture(nn.ReLU(), batch((3,))), "merge-sequential{padding=shift}")
    with pytest.raises(UsageError, match="padding of 'merge-sequential' is 'shift'"):
        MergeSequential(padding="shift")  # type: ignore[arg-type]
