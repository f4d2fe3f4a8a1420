"""Batch norms that stay, each with its reason, next to those that differ from them in one thing and fold."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from tests.passes.apply import apply, errors_at, operators, reasons
from tests.passes.test_fold_batch_norm import IMAGES, PASS, Net, batch, conv, prepared

OUTPUT = "'output' is the output, not a layer"


def refused(net: nn.Module, shape: tuple[int, ...], reason: str, limit: float = 1e-12) -> go.Model:
    """The pass changes nothing and says why."""
    before, after, report = apply(net, batch(shape), PASS)
    assert not report.edits and len(report.misses) == 1 and reason in report.misses[0].reason, report.misses
    assert str(after) == str(before)
    assert errors_at(net, after, batch(shape)) <= limit
    return after


def test_norm_with_a_real_shift_before_a_padded_layer_stays() -> None:
    for layer in (conv(padding=1), conv(padding="same")):
        refused(prepared(nn.Sequential(nn.BatchNorm2d(6), layer), IMAGES), IMAGES, "pads with zeros after the shift")
    up = nn.ConvTranspose2d(6, 4, 3)
    refused(prepared(nn.Sequential(nn.BatchNorm2d(6), up), IMAGES), IMAGES, "transposed convolution")


def test_norm_after_an_output_with_a_second_user_stays() -> None:
    def residual(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.bn(y) + y

    net = prepared(Net(residual, conv=conv(), bn=nn.BatchNorm2d(6)), IMAGES)
    refused(net, IMAGES, "'conv2d' is also used by 'add'")


def test_norm_after_a_shared_weight_stays() -> None:
    def twice(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.conv(x)) + net.conv(x * 2)

    net = prepared(Net(twice, conv=conv(), bn=nn.BatchNorm2d(6)), IMAGES)
    refused(net, IMAGES, "'conv.weight' is also used by")


def test_norm_after_a_tied_weight_stays() -> None:
    def tied(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.conv(x)) + net.other(x)

    first, second = conv(), conv()
    second.weight = first.weight
    net = prepared(Net(tied, conv=first, other=second, bn=nn.BatchNorm2d(6)), IMAGES)
    refused(net, IMAGES, "weight' is also used by 'conv2d_1'")


def test_norm_on_its_own_stays() -> None:
    net = prepared(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6), nn.ReLU()), IMAGES)
    refused(net, IMAGES, "'relu' (aten.relu.default) is no layer with a weight")
    refused(prepared(nn.Sequential(nn.BatchNorm2d(6)), IMAGES), IMAGES, "'input_1' is an input, not a layer")


def test_norm_over_another_axis_than_the_channels_stays() -> None:
    net = prepared(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), (5, 5))
    refused(net, (5, 5), "it acts on axis 1, the channels of 'linear' are axis 2")


def test_norm_of_an_unbatched_convolution_stays() -> None:
    net = nn.Sequential(nn.Conv1d(6, 4, 1), nn.BatchNorm1d(9)).eval()
    x = (torch.randn(6, 9),)
    _, _after, report = apply(net, x, PASS)
    assert "it acts on axis 1, the channels of 'conv1d' are axis 0" in reasons(report)[0] and not report.edits


def test_norm_that_trains_stays_and_so_does_the_mode() -> None:
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).train()
    _before, after, report = apply(net, (torch.randn(4, *IMAGES),), PASS)
    assert reasons(report) == ["it trains, so its statistics are those of the batch"]
    assert net.training and net[1].training and after.mode == "train" and "batch_norm" in operators(after)


def test_frozen_norm_in_a_training_net_folds() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), IMAGES).train()
    net[1].eval()
    _, after, report = apply(net, batch(IMAGES), PASS)
    assert operators(after) == ["conv2d"] and after.mode == "train" and not report.misses
    assert errors_at(net, after, batch(IMAGES)) <= 1e-12


def test_norm_without_statistics_stays() -> None:
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).double().eval()
    _, after, report = apply(net, batch(IMAGES), PASS)
    assert "batch_norm" in operators(after) and len(report.misses) == 1 and not report.edits
    assert errors_at(net, after, batch(IMAGES)) <= 1e-12


def test_norm_with_a_computed_scale_stays() -> None:
    def computed(net: nn.Module, x: Tensor) -> Tensor:
        bn = net.bn
        return F.batch_norm(net.conv(x), bn.running_mean, bn.running_var, bn.weight.exp(), bn.bias)

    net = prepared(Net(computed, conv=conv(), bn=nn.BatchNorm2d(6)), IMAGES)
    refused(net, IMAGES, "its weight is computed")


def test_norm_after_a_computed_weight_stays() -> None:
    def computed(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(F.conv2d(x, net.conv.weight * x.mean()))

    net = prepared(Net(computed, conv=conv(), bn=nn.BatchNorm2d(6)), IMAGES)
    refused(net, IMAGES, "the weight of 'conv2d' is computed")


def test_mixed_dtypes_stay() -> None:
    net = nn.Sequential(nn.Conv2d(6, 8, 3).bfloat16(), nn.BatchNorm2d(8)).eval()
    _, _after, report = apply(net, batch(IMAGES, dtype=torch.bfloat16), PASS)
    assert not report.edits and "of another dtype" in reasons(report)[0]


def test_values_that_would_overflow_stay() -> None:
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).eval()
    net[1].weight.data.fill_(6e4)
    net[1].running_var.fill_(1e-4)
    net[0].weight.data.fill_(1.0)
    _, _after, report = apply(net.half(), batch(IMAGES, dtype=torch.float16), PASS)
    assert not report.edits and "would not be finite in torch.float16" in reasons(report)[0]


def test_masks_are_kept_or_the_norm_stays() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), IMAGES)
    for name, stays in (("0.weight", False), ("0.bias", True)):
        model = go.capture(net, batch(IMAGES))
        mask = torch.zeros_like(model.params[name], dtype=torch.bool)
        mask[2] = True
        model.params.masks[name] = mask
        model.params.set(name, model.params[name].detach().masked_fill(mask, 0))
        after, (report,) = go.run(model, PASS)
        assert ("batch_norm" in operators(after)) is stays
        assert bool((after.params[name][after.params.masks[name]] == 0).all())
        assert (reasons(report)[:1] == [f"the mask of '{name}' keeps elements zero; {OUTPUT}"]) is stays
