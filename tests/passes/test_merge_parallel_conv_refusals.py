"""Sums of convolutions that stay, each with its reason; dtypes, free sizes, random branches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import UsageError
from tests.passes.apply import Net, apply, errors_at, operators, reasons
from tests.passes.branched import Branches, RepVGGBlock, conv_norm, trained
from tests.passes.test_merge_parallel_conv import BATCH, PASS, images, kept, merged


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


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
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
