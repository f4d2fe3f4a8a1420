"""Scales and shifts written as arithmetic go into the layers next to them where that is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from tests.passes.apply import apply, errors_at, gradients, operators, reasons

PASS = "fuse-affine"
BATCH = {0: {0: "batch"}}
IMAGE, SEQUENCE = (6, 7, 7), (9, 6)


class Net(nn.Module):
    """A net with a layer, a per-channel parameter `gamma` and a buffer `mean`; forward is the given function."""

    def __init__(self, forward: Callable[..., Tensor], layer: nn.Module, shape: tuple[int, ...] = (8, 1, 1)) -> None:
        super().__init__()
        self.function, self.layer = forward, layer
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)
        self.register_buffer("mean", torch.randn(shape))
        self.register_buffer("var", torch.rand(shape) + 0.5)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def batch(shape: tuple[int, ...] = IMAGE, size: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(size, *shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype),)


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, **options)


def fused(net: nn.Module, shape: tuple[int, ...] = IMAGE) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, trainable, and left alone by a second run."""
    _, after, report = apply(net, batch(shape), PASS, dynamic=BATCH)
    assert errors_at(net, after, batch(shape, 2), batch(shape, 3)) <= 1e-12
    found = {name: grad for name, grad in gradients(after, batch(shape)).items() if name not in after.kept}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found.values())
    again, reports = go.run(after, PASS)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


AFTER: dict[str, Callable[..., Tensor]] = {
    "x * number": lambda net, x: net.layer(x) * 0.3,
    "number * x": lambda net, x: 3 * net.layer(x),
    "x / number": lambda net, x: net.layer(x) / 127.5,
    "x + number": lambda net, x: net.layer(x) + 1,
    "x - number": lambda net, x: net.layer(x) - 0.5,
    "number - x": lambda net, x: 1 - net.layer(x),
    "-x": lambda net, x: -net.layer(x),
    "x * 0": lambda net, x: net.layer(x) * 0 + 1,
    "add alpha": lambda net, x: torch.add(net.layer(x), net.gamma, alpha=2),
    "sub alpha": lambda net, x: torch.sub(net.layer(x), net.gamma, alpha=3),
    "add alpha, x second": lambda net, x: torch.add(net.gamma.expand(8, 1, 1), net.layer(x), alpha=2),
    "rsub alpha": lambda net, x: torch.rsub(net.layer(x), net.gamma, alpha=2),
    "layer scale": lambda net, x: net.layer(x) * net.gamma,
    "layer scale, first": lambda net, x: net.gamma * net.layer(x),
    "x / parameter": lambda net, x: net.layer(x) / net.gamma,
    "parameter - x": lambda net, x: net.gamma - net.layer(x),
    "buffer - x": lambda net, x: net.mean - net.layer(x),
    "reshaped parameter": lambda net, x: net.layer(x) * net.gamma.reshape(1, -1, 1, 1),
    "frozen norm": lambda net, x: (net.layer(x) - net.mean) * torch.rsqrt(net.var + 1e-3) * net.gamma + 0.25,
    "several": lambda net, x: ((net.layer(x) * 2 + net.mean) / 3 - net.gamma) * -1,
    "through a transposition": lambda net, x: net.layer(x).permute(0, 2, 3, 1) * net.gamma.reshape(8),
}


@pytest.mark.parametrize("case", AFTER)
def test_arithmetic_after_a_layer_goes_into_it(case: str) -> None:
    net = Net(AFTER[case], conv(padding=1))
    if case == "x * 0":
        _, after, report = apply(net, batch(), PASS)
        assert errors_at(net, after, batch()) == 0
    else:
        after, report = fused(net)
    kept = {"conv2d", "permute"} if "transposition" in case else {"conv2d"}
    assert set(operators(after)) == kept and not report.misses
    assert set(after.state_dict()) == {"layer.weight", "layer.bias"} | (set(after.kept) & {"gamma", "mean", "var"})


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (6, 9), (8, 1)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), IMAGE, (8, 1, 1)),
    "transposed grouped": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, groups=2), IMAGE, (8, 1, 1)),
    "without bias": (lambda: nn.Conv2d(6, 8, 3, bias=False), IMAGE, (8, 1, 1)),
    "linear": (lambda: nn.Linear(6, 8), SEQUENCE, (8,)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), SEQUENCE, (8,)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_every_layer_takes_a_scale_and_a_shift(case: str) -> None:
    make, inputs, shape = LAYERS[case]
    net = Net(lambda net, x: net.layer(x) * net.gamma + net.mean, make(), shape)
    after, report = fused(net, inputs)
    assert len(operators(after)) == 1 and not report.misses


BEFORE: dict[str, Callable[..., Tensor]] = {
    "normalised input": lambda net, x: net.layer((x - net.mean) / net.var),
    "numbers": lambda net, x: net.layer(x / 127.5 - 1),
    "negated": lambda net, x: net.layer(-x),
    "layer scale": lambda net, x: net.layer(F.relu(x) * net.gamma),
}


@pytest.mark.parametrize("case", BEFORE)
@pytest.mark.parametrize("groups", [1, 2])
def test_arithmetic_before_an_unpadded_layer_goes_into_it(case: str, groups: int) -> None:
    after, report = fused(Net(BEFORE[case], nn.Conv2d(6, 8, 3, groups=groups), (6, 1, 1)))
    assert operators(after) in (["conv2d"], ["relu", "conv2d"]) and not report.misses


def test_scale_before_a_padded_layer_goes_into_it_and_a_shift_does_not() -> None:
    for layer in (conv(padding=1), conv(padding="same"), nn.ConvTranspose2d(6, 8, 3)):
        after, report = fused(Net(lambda net, x: net.layer(x * net.gamma / 3), layer, (6, 1, 1)))
        assert len(operators(after)) == 1 and not report.misses
    after, report = fused(Net(lambda net, x: net.layer(x - net.mean), conv(padding=1), (6, 1, 1)))
    assert operators(after) == ["sub.Tensor", "conv2d"] and "pads with zeros after the shift" in reasons(report)[0]


def test_shift_by_one_number_before_a_padded_layer_becomes_an_explicit_pad() -> None:
    after, report = fused(Net(lambda net, x: net.layer(x * 2 - 1), conv(padding=(2, 1))))
    assert operators(after) == ["constant_pad_nd", "conv2d"] and not report.misses


def test_a_scale_that_several_layers_read_goes_into_all() -> None:
    class Norm(nn.Module):
        """The root-mean-square norm of language models: its weight belongs to the layers that follow."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6) + 0.5)
            self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            return self.q(y) * self.k(y)

    after, report = fused(Norm().double().eval(), SEQUENCE)
    assert "weight" not in after.state_dict() and operators(after).count("mul.Tensor") == 2
    assert len(report.misses) == 1  # x.pow(2).mean() + 1e-6


def refused(net: nn.Module, shape: tuple[int, ...], *expected: str) -> None:
    """The pass changes nothing and says why."""
    before, after, report = apply(net, batch(shape), PASS)
    assert not report.edits and str(after) == str(before)
    assert len(report.misses) == len(expected), report.misses
    for reason, text in zip(reasons(report), expected, strict=True):
        assert text in reason


REFUSED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], str]] = {
    "another axis": (lambda net, x: net.layer(x) * net.gamma, (5,), "it acts on axis 3, the channels of 'conv2d' are"),
    "several axes": (lambda net, x: net.layer(x) * net.gamma, (8, 5, 5), "varies along several axes"),
    "a wider tensor": (lambda net, x: net.layer(x) * net.gamma, (4, 1, 1, 1, 1), "is wider than x"),
    "used elsewhere": (
        lambda net, x: net.layer(x) * net.gamma + x.mean() ** net.gamma,
        (8, 1, 1),
        "'gamma' is also used by",
    ),
    "a reshape made from it is used elsewhere": (
        lambda net, x: net.layer(x) * (g := net.gamma.reshape(8, 1, 1)) + x.mean() ** g,
        (8,),
        "'reshape' is also used by",
    ),
    "no number": (lambda net, x: net.layer(x) * float("inf"), (8, 1, 1), "not finite"),
    "zero divisor": (lambda net, x: net.layer(x) / 0, (8, 1, 1), "not finite"),
    "second user": (lambda net, x: (y := net.layer(x)).relu() + y * 2, (8, 1, 1), "'conv2d' is also used by"),
    "reshape between": (lambda net, x: net.layer(x).flatten(1) * 2, (8, 1, 1), "is no layer with a weight"),
    "activation between": (lambda net, x: net.layer(x).relu() * 2, (8, 1, 1), "is no layer with a weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arithmetic_that_does_not_fit_stays(case: str) -> None:
    function, shape, reason = REFUSED[case]
    refused(Net(function, conv(), shape), IMAGE, reason)


def test_what_is_no_affine_map_is_no_candidate() -> None:
    def function(net: nn.Module, x: Tensor) -> Tensor:
        y = net.layer(x)
        return x.mean() / (y * y + y) + x.amax()

    refused(Net(function, conv()), IMAGE)


def test_dtypes_that_promote_stay() -> None:
    net = Net(lambda net, x: net.layer(x) * net.gamma, conv()).float()
    net.gamma = nn.Parameter(net.gamma.double())
    _, _, report = apply(net, batch(dtype=torch.float32), PASS)
    assert not report.edits and "it makes torch.float64 from torch.float32" in reasons(report)[0]
    net.gamma = nn.Parameter(net.gamma.bfloat16())
    _, _, report = apply(net, batch(dtype=torch.float32), PASS)
    assert not report.edits and "its tensor is torch.bfloat16, x is torch.float32" in reasons(report)[0]


def test_a_scalar_tensor_of_another_dtype_folds_where_it_promotes_nothing() -> None:
    net = Net(lambda net, x: net.layer(x) * net.mean, conv(), ()).float()
    net.mean = torch.tensor(3.0, dtype=torch.float64)
    _, after, report = apply(net, batch(dtype=torch.float32), PASS)
    assert operators(after) == ["conv2d"] and not report.misses
    assert errors_at(net, after, batch(dtype=torch.float32)) <= 1e-6


def test_integers_into_a_float_layer_stay() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * 0.5)

    _, _, report = apply(Counts().eval(), (torch.randint(0, 9, (2, 6)),), PASS)
    assert not report.edits and "it makes torch.float32 from torch.int64" in reasons(report)[0]


def test_shared_layers_stay() -> None:
    refused(
        Net(lambda net, x: net.layer(x) * 2 + net.layer(x + 1).relu(), conv(padding=1)),
        IMAGE,
        "'layer.weight' is also used by",
        "'layer.bias' is also used by",
    )


def test_frozen_scale_makes_no_trainable_bias_and_a_trainable_one_does() -> None:
    for trainable in (False, True):
        net = Net(lambda net, x: net.layer(x) + net.gamma, conv(bias=False)).requires_grad_(False)
        net.gamma.requires_grad_(trainable)
        _, after, _ = apply(net, batch(), PASS)
        flags = {name: p.requires_grad for name, p in after.named_parameters()}
        assert flags == {"layer.weight": False, "layer.bias": trainable}


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = Net(AFTER["frozen norm"], conv())
    _, after, _ = apply(net, batch(), PASS)
    weight = after.params["layer.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("layer.weight", weight)
    assert errors_at(net, after, batch()) > 1e-5
