"""Sums of convolutions of one value become one convolution, or stay with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import UsageError
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons
from tests.passes.branched import Branches, GhostBlock, MobileOneBlock, RepVGGBlock, conv_norm, trained

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


# Left alone


def test_nothing_to_merge() -> None:
    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    kept(plain, images((4, 6, 6)))
    assert not apply(plain, images((4, 6, 6)), PASS)[2].findings
    kept(Net(lambda net, x: net.a(x) + net.b(x.relu()), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), images((4, 6, 6)))
    kept(Net(lambda net, x: x + x * 0.5), images((4, 6, 6)))


class Shared(nn.Module):
    """`a` and `b` of one value, added; `forward` is the given function."""

    def __init__(self, forward: Callable[..., object], **other: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.function = forward
        for name, module in other.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def test_weights_shared_with_another_layer_stay_shared() -> None:
    kept(
        Shared(lambda net, x: net.a(x) + net.b(x) + net.b(x.relu())),
        images((4, 6, 6)),
        "'b.weight' is also used by 'conv2d_2'",
        "'b.weight' is also used by 'conv2d_1'",
    )
    tied = Shared(lambda net, x: net.a(x) + net.b(x) + net.c(x.relu()), c=nn.Conv2d(4, 4, 1))
    tied.c.weight = tied.b.weight
    kept(tied, images((4, 6, 6)), "is also used by 'conv2d_2'", "is also used by 'conv2d_1'")  # one node by now


def test_values_with_other_users_and_outputs_stay() -> None:
    def two_users(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        b = net.b(x)
        return net.a(x) + b, b

    kept(Shared(two_users), images((4, 6, 6)), "'conv2d' is also used by 'output'")

    def inner_sum(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        first = net.a(x) + net.b(x)
        return first, first + net.c(x)

    after, report = merged(Shared(inner_sum, c=nn.Conv2d(4, 4, 1)), (4, 6, 6))
    assert operators(after).count("conv2d") == 2 and len(report.edits) == 1


def test_norms_that_train_stay_and_a_model_in_train_mode_is_refused() -> None:
    net = Shared(lambda net, x: net.a(x) + net.norm(net.b(x)), norm=nn.BatchNorm2d(4))
    model = go.capture(net.train(), images((4, 6, 6)))
    after, (report,) = go.run(model, PASS)
    assert not report.edits and str(after) == str(model)
    assert any("it trains" in reason for reason in reasons(report))


def test_transposed_convolutions_and_other_strides_stay() -> None:
    up = Shared(lambda net, x: net.a(x) + net.up(x), up=nn.ConvTranspose2d(4, 4, 1))
    kept(up, images((4, 6, 6)), "'conv_transpose2d' is a transposed convolution")
    strided = Net(lambda net, x: net.a(x) + net.b(x), a=nn.Conv2d(4, 4, 1, stride=2, padding=3), b=nn.Conv2d(4, 4, 1))
    kept(strided, images((4, 6, 6)), "their strides differ: [2, 2], [1, 1]")


def test_paddings_of_other_values_are_no_padding_of_the_merged() -> None:
    circular = Net(
        lambda net, x: net.a(x) + net.b(x),
        a=nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        b=nn.Conv2d(4, 4, 1),
    )
    kept(circular, images((4, 6, 6)))
    ones = Net(
        lambda net, x: net.a(F.pad(x, (1, 1, 1, 1), value=1.0)) + net.b(x), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 1)
    )
    kept(ones, images((4, 6, 6)))
    both = Net(
        lambda net, x: (lambda y: net.a(y) + net.b(y))(F.pad(x, (1, 1, 1, 1), mode="reflect")),
        a=nn.Conv2d(4, 4, 3),
        b=nn.Conv2d(4, 4, 3),
    )
    after, _ = merged(both, (4, 6, 6))
    assert operators(after).count("conv2d") == 1


def test_a_step_that_pads_what_was_shifted_is_not_composed() -> None:
    """1x1 with a bias, then 3x3 with padding: the counter-example, as a branch beside a 3x3."""
    net = Shared(lambda net, x: net.a(x) + net.c(net.b(x)), c=nn.Conv2d(4, 4, 3, padding=1))
    kept(
        net,
        images((4, 6, 6)),
        "'conv2d_2' cannot take in 'conv2d_1': the second pads with zeros what the first adds a bias to",
    )
    net.b.bias = None
    after, _ = merged(net, (4, 6, 6))
    assert operators(after) == ["conv2d"]


def test_averages_that_leave_out_their_padding_stay() -> None:
    uncounted = Shared(lambda net, x: net.a(x) + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
    kept(uncounted, images((4, 6, 6)), "leaves the padding out")
    after, _ = merged(Shared(lambda net, x: net.a(x) + F.avg_pool2d(x, 3, 1, 1)), (4, 6, 6))
    assert operators(after) == ["conv2d"]


def test_broadcast_and_unknown_operators_between_are_barriers() -> None:
    wide = Net(lambda net, x: net.a(x) + net.b(x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 1, 1))
    kept(wide, images((4, 6, 6)))
    special = Shared(lambda net, x: net.a(x) + torch.special.entr(net.b(x)))
    kept(special, images((4, 6, 6)))


def test_masks_and_precision_are_not_mixed() -> None:
    model = go.capture(Shared(lambda net, x: net.a(x) + net.b(x)).eval(), images((4, 6, 6)))
    model.params.precision["a.weight"] = "bfloat16"
    _, (report,) = go.run(model, PASS)
    assert not report.edits and "the precision of the weight of" in reasons(report)[0]
    model.params.precision["b.weight"] = "bfloat16"
    after, (report,) = go.run(model, PASS)
    assert len(report.edits) == 1 and after.params.precision == {"merged.weight": "bfloat16"}
    mask = torch.zeros(4, 4, 1, 1, dtype=torch.bool)
    mask[0] = True
    model.params.set("b.weight", model.params["b.weight"].detach().masked_fill(mask, 0))
    model.params.masks["b.weight"] = mask
    _, (report,) = go.run(model, PASS)
    assert not report.edits and "the mask of 'b.weight' keeps elements zero" in reasons(report)[0]


def test_a_sum_trains_where_a_branch_did() -> None:
    for frozen, expected in ((("a",), True), (("a", "b"), False)):
        net = Shared(lambda net, x: net.a(x) + net.b(x))
        for name in frozen:
            getattr(net, name).requires_grad_(False)
        _, after, report = apply(net.eval(), images((4, 6, 6)), PASS)
        assert len(report.edits) == 1 and {p.requires_grad for p in after.parameters()} == {expected}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    net = trained(lambda: Branches(conv_norm(4, 4, 3), conv_norm(4, 4, 1), nn.BatchNorm2d(4)), (4, 6, 7)).to(dtype)
    inputs = (images((4, 6, 7))[0].to(dtype),)
    _, after, _ = apply(net, inputs, PASS)
    assert operators(after) == ["conv2d", "relu"] and {t.dtype for t in after.state_dict().values()} == {dtype}
    assert errors_at(net, after, inputs) <= limit


def test_weights_that_would_overflow_stay() -> None:
    net = Shared(lambda net, x: net.a(x) + net.b(x) * 60000).half()
    with torch.no_grad():
        net.b.weight.fill_(3.0)
    kept(net, (images((4, 6, 6))[0].half() * 0,), "would not be finite in torch.float16")


def test_free_image_sizes() -> None:
    net = trained(lambda: nn.Sequential(RepVGGBlock(3, 8, 2), RepVGGBlock(8, 8)), (3, 17, 16))
    free = {0: {0: "batch", 2: "height", 3: "width"}}
    _, after, report = apply(net, images((3, 17, 16)), PASS, dynamic=free)
    assert operators(after) == ["conv2d", "relu"] * 2 and len(report.edits) == 2
    assert errors_at(net, after, images((3, 17, 16)), images((3, 24, 31), 3)) <= 1e-6


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = trained(lambda: RepVGGBlock(8, 8), (8, 9, 9))
    _, after, _ = apply(net, images((8, 9, 9)), PASS)
    weight = after.params["branches.merged.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("branches.merged.weight", weight)
    assert errors_at(net, after, images((8, 9, 9))) > 1e-5


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_branches_agree(data: st.DataObject) -> None:
    """Sums of up to four branches on one or two values, each convolution, norm, pool or nothing, in float64."""
    stride = data.draw(st.integers(1, 2))

    def branch() -> nn.Module:
        size, dilation = data.draw(st.sampled_from(((1, 1), (3, 1), (3, 2), (5, 1), (2, 2)))), 1
        size, dilation = size
        groups, bias = data.draw(st.sampled_from((1, 2, 4))), data.draw(st.booleans())
        conv = nn.Conv2d(4, 4, size, stride, (size - 1) * dilation // 2, dilation, groups, bias)
        after = data.draw(st.sampled_from((None, "norm", "pool")))
        if after == "pool":
            return nn.Sequential(conv, nn.AvgPool2d(3, 1, 1, count_include_pad=data.draw(st.booleans())))
        return nn.Sequential(conv, nn.BatchNorm2d(4)) if after else conv

    def make() -> nn.Module:
        branches = [branch() for _ in range(data.draw(st.integers(1, 4)))]
        return Branches(*branches, *([nn.BatchNorm2d(4)] if stride == 1 and data.draw(st.booleans()) else []))

    shape = (4, data.draw(st.integers(6, 9)), data.draw(st.integers(6, 9)))
    net = copy.deepcopy(trained(make, shape)).double()
    for pipeline in (PASS, f"fold-batch-norm,{PASS}"):
        inputs = [tuple(x.double() for x in images(shape, size)) for size in (2, 3)]
        model = go.capture(net, inputs[0], dynamic=BATCH)
        after, _ = go.run(model, pipeline)
        assert errors_at(net, after, *inputs) <= 1e-10
        again, _ = go.run(after, pipeline)
        assert str(again) == str(after)


def test_a_target_that_cannot_be_measured_here_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be measured here"):
        apply(RepVGGBlock(4, 4).eval(), images((4, 6, 6)), "merge-parallel-conv{target=cortex-a72}")
