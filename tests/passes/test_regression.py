"""Convolutions fitted to what layers make: exact where one convolution can do it, better than before where none can."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.check import relative_error
from graphopt.passes import _regression
from graphopt.passes._kernel import Kernel
from graphopt.passes._regression import convolve, fitted


def images(*shape: int) -> list[Tensor]:
    return [torch.randn(16, *shape), torch.randn(9, *shape)]


def error(kernel: Kernel, xs: list[Tensor], ys: list[Tensor]) -> float:
    return sum(float((convolve(kernel, x) - y).square().sum()) for x, y in zip(xs, ys, strict=True))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_convolution_is_found_again(data: st.DataObject) -> None:
    axes, k = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3))
    numbers = {
        "stride": data.draw(st.integers(1, 2)),
        "dilation": data.draw(st.integers(1, 2)),
        "padding": [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in range(axes)],
    }
    weight = torch.randn(5, 3, *[k] * axes)
    wanted = Kernel.of(weight, torch.randn(5), **numbers)
    xs = images(3, *[9] * axes)
    ys = [convolve(wanted, x) for x in xs]
    found = fitted(Kernel.of(weight + torch.randn(weight.shape), None, **numbers), xs, ys)
    assert all(relative_error(convolve(found, x), y) < 1e-4 for x, y in zip(xs, ys, strict=True))
    assert found.padding == wanted.padding and found.stride == wanted.stride


def test_what_no_convolution_makes_is_made_more_nearly() -> None:
    first, second = Kernel.of(torch.randn(12, 6, 3, 3) / 8, padding=1), Kernel.of(torch.randn(6, 12, 1, 1) / 3)
    prior = Kernel.of(torch.einsum("oi,ijkl->ojkl", second.weight[:, :, 0, 0], first.weight), padding=1)
    xs, new = images(6, 10, 10), [torch.randn(20, 6, 10, 10)]

    def made(x: Tensor) -> Tensor:
        return convolve(second, torch.relu(convolve(first, x)))

    found = fitted(prior, xs, [made(x) for x in xs])
    assert error(found, new, [made(x) for x in new]) < 0.6 * error(prior, new, [made(x) for x in new])


def test_with_few_data_it_does_not_lose_on_others() -> None:
    kernel = Kernel.of(torch.randn(8, 16, 3, 3) / 12, torch.randn(8), padding=1)
    xs, new = [torch.randn(1, 16, 5, 5)], [torch.randn(32, 16, 5, 5)]
    ys, wanted = ([convolve(kernel, x) + 0.3 * torch.randn(len(x), 8, 5, 5) for x in part] for part in (xs, new))
    assert error(fitted(kernel, xs, ys), new, wanted) < 1.05 * error(kernel, new, wanted)


@pytest.mark.parametrize("case", ["depthwise", "grouped", "wide"])
def test_others_get_scales_and_biases(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"depthwise": 6, "grouped": 2, "wide": 1}[case]
    if case == "wide":
        monkeypatch.setattr(_regression, "WIDEST", 53)
    weight = torch.randn(6, 6 // groups, 3, 3)
    kernel = Kernel.of(weight, torch.randn(6), padding=1, groups=groups)
    xs = images(6, 8, 8)
    scale, shift = torch.rand(6) + 0.5, torch.randn(6)
    ys = [
        convolve(Kernel.of(weight, padding=1, groups=groups), x) * scale[:, None, None] + shift[:, None, None]
        for x in xs
    ]
    found = fitted(kernel, xs, ys)
    assert found.groups == groups and found.weight.shape == weight.shape
    assert all(relative_error(convolve(found, x), y) < 1e-5 for x, y in zip(xs, ys, strict=True))


def test_a_dead_output_gets_its_bias_and_no_infinity() -> None:
    kernel = Kernel.of(torch.zeros(4, 1, 3, 3), padding=1, groups=4)
    xs = images(4, 6, 6)
    found = fitted(kernel, xs, [torch.full_like(x, 2.0) for x in xs])
    assert torch.isfinite(found.weight).all() and found.bias is not None
    assert torch.allclose(found.bias, torch.full((4,), 2.0, dtype=torch.float64))
