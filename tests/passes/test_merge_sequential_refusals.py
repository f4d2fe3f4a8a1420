"""Layers that follow each other and stay, each with its reason; dtypes, free sizes, random chains."""

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
from graphopt.measure import LatencyTable
from tests.passes.apply import Net, apply, errors_at, operators, reasons
from tests.passes.branched import trained
from tests.passes.test_merge_sequential import BATCH, PASS, batch, kept


def test_nothing_to_merge() -> None:
    kept(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), (3, 6, 6))
    kept(nn.ReLU(), (3,))


def pair(forward: Callable[..., object], **more: nn.Module) -> Net:
    return Net(forward, a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 4, 1), **more)


def test_values_with_two_users_and_outputs_stay() -> None:
    def two(net: nn.Module, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y) + y.mean()

    kept(pair(two), (3, 6, 6), "'conv2d' is also used by 'mean'")
    kept(pair(lambda net, x: (lambda y: (net.b(y), y))(net.a(x))), (3, 6, 6), "'conv2d' is also used by 'output'")


def test_shared_tied_and_computed_weights_stay() -> None:
    kept(
        pair(lambda net, x: (net.b(net.a(x)), net.b(net.c(x).relu())), c=nn.Conv2d(3, 16, 3)),
        (3, 6, 6),
        "'b.weight' is also used by 'conv2d_1'",
        "'b.weight' is also used by 'conv2d_3'",
    )
    computed = Net(lambda net, x: F.conv2d(net.a(x), net.b.weight * 2), a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 4, 1))
    kept(computed, (3, 6, 6), "the weight of 'conv2d_1' is computed")


def test_transposed_convolutions_other_paddings_and_unknown_operators_are_barriers() -> None:
    kept(nn.Sequential(nn.ConvTranspose2d(3, 16, 3), nn.Conv2d(16, 4, 1)), (3, 6, 6), "is a transposed convolution")
    reflected = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect"))
    kept(reflected, (3, 6, 6))
    ones = pair(lambda net, x: net.b(F.pad(net.a(x), (1, 1), value=1.0)))
    kept(ones, (3, 6, 6))
    kept(pair(lambda net, x: net.b(torch.special.spherical_bessel_j0(net.a(x)))), (3, 6, 6))


def test_norms_that_train_stay() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1)).train()
    model = go.capture(net, batch((3, 6, 6)))
    after, (report,) = go.run(model, PASS)
    assert not report.edits and str(after) == str(model)
    assert "it trains, so its statistics are those of the batch" in reasons(report)[0]


def test_layers_of_another_dtype_kind_or_precision_stay() -> None:
    model = go.capture(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)).eval(), batch((3, 6, 6)))
    model.params.precision["0.weight"] = "bfloat16"
    _, (report,) = go.run(model, PASS)
    assert not report.edits and "the precision of the weight of 'conv2d_1' is None, not bfloat16" in reasons(report)[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)])
def test_other_dtypes(dtype: torch.dtype, limit: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)).to(dtype).eval()
    inputs = (batch((3, 6, 6))[0].to(dtype),)
    _, after, _ = apply(net, inputs, PASS)
    assert operators(after) == ["conv2d"] and {t.dtype for t in after.state_dict().values()} == {dtype}
    assert errors_at(net, after, inputs) <= limit


def test_weights_that_would_overflow_stay() -> None:
    net = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)).half()
    with torch.no_grad():
        net[0].weight.fill_(300.0)
        net[1].weight.fill_(300.0)
    model = go.capture(net.eval(), (torch.zeros(2, 4).half(),))
    _, (report,) = go.run(model, PASS, check=False)
    assert not report.edits and "would not be finite in torch.float16" in reasons(report)[0]


def test_free_image_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 4, 1)).eval()
    free = {0: {0: "batch", 2: "height", 3: "width"}}
    _, after, report = apply(net, batch((3, 17, 16)), PASS, dynamic=free)
    assert operators(after) == ["conv2d"] and len(report.edits) == 1
    assert errors_at(net, after, batch((3, 17, 16)), batch((3, 24, 31), 3)) <= 1e-6


def test_a_measured_target_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    separable = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)).eval()
    for seconds, edits in ((1.5e-6, 1), (2.5e-6, 0)):
        dense = lambda table, node, s=seconds: s if tuple(node.args[1].meta["val"].shape) == (8, 8, 3, 3) else 1e-6  # noqa: E731
        monkeypatch.setattr(LatencyTable, "seconds", dense)
        _, _, report = apply(separable, batch((8, 6, 6)), "merge-sequential{target=cpu,threads=1}")
        assert len(report.edits) == edits
    assert "takes 2.5 instead of 2.0 microseconds on cpu" in reasons(report)[0]


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)).eval()
    _, after, _ = apply(net, batch((3, 6, 6)), PASS)
    weight = after.params["merged.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("merged.weight", weight)
    assert errors_at(net, after, batch((3, 6, 6))) > 1e-5


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_random_chains_agree(data: st.DataObject) -> None:
    """Two to four steps, each a convolution of any geometry, a norm, a pool or an activation, in float64."""
    channels = 4

    def step() -> nn.Module:
        kind = data.draw(st.sampled_from(("conv", "conv", "conv", "norm", "pool", "relu", "pad")))
        if kind != "conv":
            return {
                "norm": nn.BatchNorm2d(4),
                "pool": nn.AvgPool2d(2, 1, 1),
                "relu": nn.ReLU(),
                "pad": nn.ZeroPad2d((1, 0, 0, 2)),
            }[kind]
        size, stride, dilation, padding = (
            data.draw(st.integers(low, high)) for low, high in ((1, 3), (1, 2), (1, 2), (0, 2))
        )
        groups, bias = data.draw(st.sampled_from((1, 2, 4))), data.draw(st.booleans())
        return nn.Conv2d(channels, channels, size, stride, padding, dilation, groups, bias)

    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 1), *[step() for _ in range(data.draw(st.integers(1, 3)))])

    shape = (4, data.draw(st.integers(12, 19)), data.draw(st.integers(12, 19)))
    net = copy.deepcopy(trained(make, shape)).double()
    inputs = [tuple(x.double() for x in batch(shape, size)) for size in (2, 3)]
    model = go.capture(net, inputs[0], dynamic=BATCH)
    for pipeline in (PASS, "fold-batch-norm,merge-sequential"):
        after, _ = go.run(model, pipeline)
        assert errors_at(net, after, *inputs) <= 1e-10
        again, _ = go.run(after, pipeline)
        assert str(again) == str(after)
