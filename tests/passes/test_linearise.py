"""Stretches of a net as one kernel: where they begin and end, and which windows they may have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.analysis.trunk import between, trunk
from graphopt.passes._linearise import Region, linearised, region, start, windows
from graphopt.passes._regression import convolve
from graphopt.rewriter import Rewriter
from tests.compare import relative_error
from tests.passes.apply import Net
from tests.passes.test_merge_layers import captured, conv, images


class _Block(nn.Module):
    """relu(f(x) + g(x)) with a g that is the identity, or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, active: bool = True) -> None:
        super().__init__()
        self.a, self.b = conv(inputs, outputs, 3, stride), nn.Conv2d(outputs, outputs, 1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)
        self.act = nn.ReLU() if active else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.act(self.a(x))) + self.skip(x))


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(6, 6, 1), (6, 9, 1), (6, 9, 2)])
def test_a_block_without_its_activation_is_one_kernel(inputs: int, outputs: int, stride: int) -> None:
    model = captured(_Block(inputs, outputs, stride, active=False), inputs, 9, 11)
    values = trunk(model)
    assert [node.name for node in values[-2:]] == ["add", "relu"]
    rw = Rewriter(model)
    part = region(rw, values[0], values[1])
    assert isinstance(part, Region) and len(part.steps) == (2 if inputs == outputs else 3)
    kernel = linearised(rw, part)
    (x,) = images(inputs, 9, 11)[0]
    assert kernel.size == (3, 3) and kernel.stride == (stride, stride)
    with torch.no_grad():
        assert relative_error(F.relu(convolve(kernel, x)), model.call_flat([x])[0]) < 1e-5
    assert windows(rw, part, 7) == ([1, 3] if stride == 1 else [3]) and windows(rw, part, 2) == (
        [1] if stride == 1 else []
    )


def test_windows_are_middles_of_the_whole_one() -> None:
    model = captured(nn.Sequential(conv(4, 4), conv(4, 4), conv(4, 4, 1)), 4, 12, 12)
    rw = Rewriter(model)
    values = trunk(model)
    part = region(rw, values[0], values[-1])
    assert isinstance(part, Region) and windows(rw, part, 9) == [1, 3, 5] and windows(rw, part, 4) == [1, 3]
    whole = linearised(rw, part)
    for size, cut in ((5, 0), (3, 1), (1, 2)):
        kernel = start(rw, part, size)
        assert torch.equal(kernel.weight, whole.weight[:, :, cut : 5 - cut, cut : 5 - cut])
        assert kernel.padding == ((2 - cut,) * 2,) * 2
        assert start(rw, part, size, meta=True).weight.shape == kernel.weight.shape


def test_the_trunk_holds_what_all_ways_go_through() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.a(x))
        z = torch.relu(net.b(y))
        return torch.sigmoid(net.c(torch.cat((y, z), 1)))  # y is read twice

    model = captured(Net(forward, a=conv(3, 4), b=conv(4, 4), c=conv(8, 2)), 3, 8, 8)
    values = trunk(model)
    assert [node.name for node in values] == ["x", "conv2d", "relu", "cat", "conv2d_2", "sigmoid"]
    assert [node.name for node in between(values[2], values[3])] == ["conv2d_1", "relu_1", "cat"]
