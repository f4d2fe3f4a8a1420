"""Sums of convolutions of one value become one convolution, or stay with the reason."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from tests.compare import relative_error
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons
from tests.passes.branched import Branches, GhostBlock, MobileOneBlock, RepVGGBlock, trained

PASS = "merge-parallel-conv{concat=false}"
BATCH = {0: {0: "batch"}}
ODD = (33, 31)


def images(shape: Sequence[int], size: int = 2) -> tuple[Tensor]:
    return (torch.randn(size, *shape, generator=torch.Generator().manual_seed(size)),)


def merged(
    net: nn.Module, shape: Sequence[int], pipeline: str = PASS, limit: float = 1e-6
) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, trainable, and left alone by a second run."""
    _, after, report = apply(net, images(shape), pipeline, dynamic=BATCH)
    assert errors_at(net, after, images(shape, 2), images(shape, 3)) <= limit
    found = {name: grad for name, grad in gradients(after, images(shape)).items() if name not in after.kept}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found.values())
    again, reports = go.run(after, pipeline)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


def kept(net: nn.Module, inputs: tuple[Tensor, ...], *expected: str, pipeline: str = PASS) -> None:
    """Nothing is merged, for exactly the given reasons."""
    before, after, report = apply(net.eval(), inputs, pipeline)
    assert not report.edits and str(after) == str(before)
    assert len(report.misses) == len(expected), report.misses
    for reason, text in zip(reasons(report), expected, strict=True):
        assert text in reason


# Blocks of published nets


def test_repvgg_blocks_are_one_convolution_each() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            RepVGGBlock(3, 16, 2), RepVGGBlock(16, 16), RepVGGBlock(16, 16, groups=4), RepVGGBlock(16, 24, 2, groups=2)
        )

    for pipeline in (PASS, f"fold-batch-norm,{PASS}", "exact"):
        after, _ = merged(trained(net, (3, *ODD)), (3, *ODD), pipeline, limit=1e-5)
        assert operators(after) == ["conv2d", "relu"] * 4
        shapes = [tuple(t.shape) for name, t in after.state_dict().items() if name.endswith("weight")]
        assert shapes == [(16, 3, 3, 3), (16, 16, 3, 3), (16, 4, 3, 3), (24, 8, 3, 3)]


def test_mobileone_blocks_are_two_convolutions_each() -> None:
    def net() -> nn.Module:
        return nn.Sequential(MobileOneBlock(8, 12, 2), MobileOneBlock(12, 12))

    for pipeline in (PASS, "exact"):
        after, _ = merged(trained(net, (8, *ODD)), (8, *ODD), pipeline, limit=1e-5)
        assert operators(after) == ["conv2d", "relu"] * 4
    groups = [node.args[6] for node in after.graph.nodes if operators(after) and "conv2d" in str(node.target)]
    assert groups == [8, 1, 12, 1]


def test_of_many_blocks_the_merged_net_is_as_near_to_the_truth_as_the_net_was() -> None:
    """Both round in float32, so from each other they may be as far as their two errors together. Against float64, over
    eight batches: merging adds nothing to what the net's own rounding does. And in float64 merging is exact."""

    def net() -> nn.Module:
        return nn.Sequential(MobileOneBlock(8, 16, 2), *(MobileOneBlock(16, 16) for _ in range(7)))

    single = trained(net, (8, *ODD))
    truth = copy.deepcopy(single).double()
    batches = [torch.randn(2, 8, *ODD) for _ in range(8)]

    def error(model: Callable[[Tensor], Tensor]) -> float:
        """Relative to the largest value, the geometric mean over all batches."""
        with torch.no_grad():
            errors = [relative_error(model(x).double(), truth(x.double())) for x in batches]
        return math.exp(sum(map(math.log, errors)) / len(errors))

    _, after, _ = apply(single, batches[:1], "exact")
    assert operators(after) == ["conv2d", "relu"] * 16
    assert 1e-7 < error(after) <= 1.25 * error(single) < 1e-5
    x = batches[0].double()
    _, exact, _ = apply(truth, (x,), "exact")
    assert operators(exact) == operators(after) and errors_at(truth, exact, (x,)) <= 1e-13


def test_ghost_blocks_keep_one_convolution_for_each_half() -> None:
    def net() -> nn.Module:
        return nn.Sequential(GhostBlock(8, 16), GhostBlock(16, 24))

    after, _ = merged(trained(net, (8, *ODD)), (8, *ODD), "exact", limit=1e-5)
    assert operators(after) == ["conv2d", "relu", "conv2d", "relu", "cat"] * 2


def test_an_asymmetric_block_with_pooling_and_a_scaled_branch_is_one_convolution() -> None:
    """3x3, 1x3, 3x1 (ACNet), an average pool behind a 1x1, a dilated, a scaled and a subtracted branch."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square, self.one, self.pooled = (
                nn.Conv2d(6, 6, 5, padding=2),
                nn.Conv2d(6, 6, 1),
                nn.Conv2d(6, 6, 1, bias=False),
            )
            self.wide, self.tall = nn.Conv2d(6, 6, (1, 3), padding=(0, 1)), nn.Conv2d(6, 6, (3, 1), padding=(1, 0))
            self.dilated = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)

        def forward(self, x: Tensor) -> Tensor:
            pooled = F.avg_pool2d(self.pooled(x), 3, 1, 1)
            return self.square(x) + self.wide(x) + self.tall(x) + pooled - self.dilated(x) + 0.5 * self.one(x) - x * 2

    after, report = merged(trained(Block, (6, 9, 11)), (6, 9, 11))
    assert operators(after) == ["conv2d"] and len(report.edits) == 1
    assert after.state_dict()["merged.weight"].shape == (6, 6, 5, 5)


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_axes(rank: int) -> None:
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv3d, nn.BatchNorm3d)
    shape = (6, *(9, 7, 5)[:rank])
    net = trained(lambda: Branches(conv(6, 6, 3, padding=1), nn.Sequential(conv(6, 6, 1), norm(6)), norm(6)), shape)
    after, _ = merged(net, shape)
    assert operators(after) == [f"conv{rank}d", "relu"]


# One by one


def test_what_else_is_added_stays_added() -> None:
    net = Net(lambda net, x: net.a(x) + x.sin() - net.b(x), a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1))
    after, report = merged(net, (4, 6, 7))
    assert operators(after) == ["sin", "conv2d", "add.Tensor"] and len(report.edits) == 1


def test_weights_with_alpha_and_paddings_unlike_before_and_after() -> None:
    """An even kernel as `same` pads it, and a value that is padded by hand."""
    same, plain = nn.Conv2d(4, 4, 4, padding="same"), nn.Conv2d(4, 4, 1)
    net = Net(lambda net, x: torch.add(net.plain(x), net.same(x), alpha=-3), same=same, plain=plain)
    after, _ = merged(net, (4, 6, 7))
    assert operators(after) == ["constant_pad_nd", "conv2d"]
    by_hand = Net(lambda net, x: net.plain(x) + net.bare(F.pad(x, (2, 0, 1, 1))), plain=plain, bare=nn.Conv2d(4, 4, 3))
    after, _ = merged(by_hand, (4, 6, 7))
    assert operators(after).count("conv2d") == 1


def test_what_does_not_pay_is_said_with_both_costs() -> None:
    """1x3 + 3x1 is a 3x3 with 9 taps instead of 6; with a 3x3 beside them it is 9 instead of 15."""
    members = {"a": nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), "b": nn.Conv2d(4, 4, (3, 1), padding=(1, 0))}
    kept(
        Net(lambda net, x: net.a(x) + net.b(x), **members),
        images((4, 5, 5)),
        "merging is exact, but takes 7,200 instead of 4,800 multiply-accumulates",
    )
    _, report = merged(
        Net(lambda net, x: net.a(x) + net.b(x) + net.c(x), c=nn.Conv2d(4, 4, 3, padding=1), **members), (4, 5, 5)
    )
    assert len(report.edits) == 1


def test_what_is_exact_and_dearer_is_counted() -> None:
    net = Net(
        lambda net, x: net.a(x) + net.b(x),
        a=nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        b=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    )
    assert apply(net, images((4, 5, 5)), PASS)[2].findings == {"exact but dearer": 1}


def test_a_measured_target_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same two branches where a 3x3 is measured faster than two others, and where it is slower."""
    from graphopt.measure import LatencyTable

    net = Net(
        lambda net, x: net.a(x) + net.b(x),
        a=nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        b=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
    )
    for seconds, edits in ((1.5e-6, 1), (2.5e-6, 0)):
        square = lambda table, node, s=seconds: s if tuple(node.args[1].meta["val"].shape[2:]) == (3, 3) else 1e-6  # noqa: E731
        monkeypatch.setattr(LatencyTable, "seconds", square)
        _, _, report = apply(net, images((4, 5, 5)), "merge-parallel-conv{concat=false,target=cpu,threads=1}")
        assert len(report.edits) == edits
    assert "takes 2.5 instead of 2.0 microseconds on cpu" in reasons(report)[0]


def test_a_real_measurement_is_taken_and_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    net = Net(lambda net, x: net.a(x) + net.b(x), a=nn.Conv2d(16, 16, 3, padding=1), b=nn.Conv2d(16, 16, 3, padding=1))
    _, after, report = apply(net, images((16, 20, 20)), "merge-parallel-conv{concat=false,target=cpu,threads=1}")
    assert len(report.edits) == 1 and operators(after) == ["conv2d"] and (tmp_path / "latency.sqlite").exists()
