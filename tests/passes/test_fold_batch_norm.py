"""Batch norms fold into the layers next to them where that is exact, and stay with a reason where it is not."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.params import ParamKind
from graphopt.registry import get_pass
from graphopt.rewriter import Rewriter
from graphopt.transform import EditKind
from tests.compare import relative_error
from tests.passes.apply import apply, errors_at, gradients, operators, reasons
from tests.zoo import calibrate, enliven

PASS = "fold-batch-norm"
BATCH = {0: {0: "batch"}}

IMAGES, LONGS, VOLUMES, VECTORS = (6, 7, 7), (6, 9), (6, 5, 5, 5), (6,)


def prepared(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The net in evaluation mode with statistics of data, no parameter constant."""
    net = net.double()
    with torch.no_grad():
        enliven(net)
        calibrate(net, [(torch.randn(16, *shape, dtype=torch.float64) * 2 + 1,)])
    return net.to(dtype)


def batch(shape: tuple[int, ...], size: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor]:
    return (torch.randn(size, *shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64).to(dtype),)


def folded(net: nn.Module, shape: tuple[int, ...], limit: float = 1e-12) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, with gradients, left alone by a second run."""
    _before, after, report = apply(net, batch(shape), PASS, dynamic=BATCH)
    assert errors_at(net, after, batch(shape, 2), batch(shape, 3)) <= limit
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in gradients(after, batch(shape)).values())
    again, reports = go.run(after, PASS)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


AFTER_A_LAYER: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.Conv1d(6, 8, 3, 2, 1), nn.BatchNorm1d(8)], LONGS),
    "conv2d": (lambda: [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)], IMAGES),
    "conv2d without bias": (lambda: [nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)], IMAGES),
    "conv2d padding=same": (lambda: [nn.Conv2d(6, 8, 4, padding="same"), nn.BatchNorm2d(8)], IMAGES),
    "conv3d": (lambda: [nn.Conv3d(6, 4, 3), nn.BatchNorm3d(4)], VOLUMES),
    "grouped": (lambda: [nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)], IMAGES),
    "depthwise": (lambda: [nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)], IMAGES),
    "dilated": (lambda: [nn.Conv2d(6, 4, 3, dilation=2), nn.BatchNorm2d(4)], IMAGES),
    "transposed1d": (lambda: [nn.ConvTranspose1d(6, 4, 3, 2), nn.BatchNorm1d(4)], LONGS),
    "transposed2d": (lambda: [nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.BatchNorm2d(4)], IMAGES),
    "transposed2d groups=2": (lambda: [nn.ConvTranspose2d(6, 4, 3, 2, groups=2), nn.BatchNorm2d(4)], IMAGES),
    "transposed2d groups=3 without bias": (
        lambda: [nn.ConvTranspose2d(6, 9, 2, groups=3, bias=False), nn.BatchNorm2d(9)],
        IMAGES,
    ),
    "transposed3d": (lambda: [nn.ConvTranspose3d(6, 4, 2, groups=2), nn.BatchNorm3d(4)], VOLUMES),
    "linear": (lambda: [nn.Linear(6, 5), nn.BatchNorm1d(5)], VECTORS),
    "linear without bias": (lambda: [nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5)], VECTORS),
    "no affine": (lambda: [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, affine=False)], IMAGES),
    "another eps": (lambda: [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8, eps=0.1)], IMAGES),
    "then relu": (lambda: [nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()], IMAGES),
}


@pytest.mark.parametrize("case", AFTER_A_LAYER)
def test_norm_after_a_layer_folds(case: str) -> None:
    make, shape = AFTER_A_LAYER[case]
    after, report = folded(prepared(nn.Sequential(*make()), shape), shape)
    assert "batch_norm" not in operators(after)
    assert [edit.kind for edit in report.edits].count(EditKind.REPLACE) == 1 and not report.misses
    assert set(after.state_dict()) == {"0.weight", "0.bias"}


BEFORE_A_LAYER: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "conv1d": (lambda: [nn.BatchNorm1d(6), nn.Conv1d(6, 4, 3)], LONGS),
    "conv2d": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, 2)], IMAGES),
    "conv2d without bias": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, bias=False)], IMAGES),
    "conv2d padding=valid": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding="valid")], IMAGES),
    "conv2d padding=same of one pixel": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1, padding="same")], IMAGES),
    "grouped": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 9, 3, groups=3)], IMAGES),
    "depthwise": (lambda: [nn.BatchNorm2d(6), nn.Conv2d(6, 12, 3, groups=6)], IMAGES),
    "conv3d": (lambda: [nn.BatchNorm3d(6), nn.Conv3d(6, 4, 2)], VOLUMES),
    "linear": (lambda: [nn.BatchNorm1d(6), nn.Linear(6, 4)], VECTORS),
    "transposed of one pixel": (lambda: [nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 4, 1, groups=2)], IMAGES),
    "no affine": (lambda: [nn.BatchNorm1d(6, affine=False), nn.Linear(6, 4)], VECTORS),
}


@pytest.mark.parametrize("case", BEFORE_A_LAYER)
def test_norm_before_a_layer_folds_where_nothing_is_padded(case: str) -> None:
    make, shape = BEFORE_A_LAYER[case]
    after, report = folded(prepared(nn.Sequential(*make()), shape), shape)
    assert "batch_norm" not in operators(after) and len(operators(after)) == 1
    assert not report.misses and set(after.state_dict()) == {"1.weight", "1.bias"}


def without_shift(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.affine = False
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)
    return norm


def test_norm_without_shift_before_a_padded_layer_folds() -> None:
    for layer in (nn.Conv2d(6, 4, 3, padding=1, groups=2), nn.ConvTranspose2d(6, 4, 3, 2, 1, groups=2)):
        net = prepared(nn.Sequential(without_shift(nn.BatchNorm2d(6)), layer), IMAGES)
        net[0].running_mean.zero_()
        after, report = folded(net, IMAGES)
        assert len(operators(after)) == 1 and not report.misses


def test_norm_that_one_constant_undoes_becomes_an_explicit_pad() -> None:
    for padding in (1, (0, 2), "same"):
        net = prepared(nn.Sequential(without_shift(nn.BatchNorm2d(6)), nn.Conv2d(6, 4, 4, padding=padding)), IMAGES)
        net[0].running_mean.fill_(0.75)
        after, report = folded(net, IMAGES)
        assert operators(after) == ["constant_pad_nd", "conv2d" if padding != "same" else "conv2d.padding"]
        assert not report.misses


class Net(nn.Module):
    """A net whose forward is the given function of itself and x."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv(groups: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(6, 6, 3, groups=groups, **options)


def test_norm_folds_through_a_transposition_but_not_through_a_reshape() -> None:
    def swapped(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.linear(x).transpose(1, 2))

    def permuted(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.linear(x).permute(0, 2, 1).transpose(1, 2).transpose(-1, -2))

    for function in (swapped, permuted):
        net = prepared(Net(function, linear=nn.Linear(6, 5), bn=nn.BatchNorm1d(5)), (9, 6))
        after, report = folded(net, (9, 6))
        assert "batch_norm" not in operators(after) and not report.misses

    def reshaped(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.conv(x).flatten(2))

    net = prepared(Net(reshaped, conv=conv(), bn=nn.BatchNorm1d(6)), IMAGES)
    after, report = folded(net, IMAGES)
    assert "batch_norm" in operators(after) and "no layer with a weight" in reasons(report)[0]


def test_norm_before_several_layers_folds_into_all_or_none() -> None:
    def both(net: nn.Module, x: Tensor) -> Tensor:
        y = net.bn(F.relu(x))
        return net.first(y) + net.second(y)

    after, report = folded(prepared(Net(both, bn=nn.BatchNorm2d(6), first=conv(), second=conv(2)), IMAGES), IMAGES)
    assert operators(after) == ["relu", "conv2d", "conv2d", "add.Tensor"] and not report.misses
    net = prepared(Net(both, bn=nn.BatchNorm2d(6), first=conv(padding=1), second=nn.Conv2d(6, 6, 1)), IMAGES)
    after, report = folded(net, IMAGES)
    assert "batch_norm" in operators(after) and "pads with zeros" in reasons(report)[0] and not report.edits


def test_one_set_of_statistics_may_serve_two_norms() -> None:
    def twice(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(net.first(x)) + net.bn(net.second(x))

    after, report = folded(prepared(Net(twice, bn=nn.BatchNorm2d(6), first=conv(), second=conv()), IMAGES), IMAGES)
    assert operators(after) == ["conv2d", "conv2d", "add.Tensor"] and not report.misses


@pytest.mark.parametrize("axes", [None, (0, 1), (-1, -2), "permute"])
def test_a_weight_that_is_stored_transposed_folds(axes: object) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5, 4))
            self.bn, self.norm = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

        def turn(self, weight: Tensor) -> Tensor:
            if axes is None:
                return weight.t()
            return weight.permute(1, 0) if axes == "permute" else weight.transpose(*axes)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.norm(F.relu(self.bn(F.linear(x, self.turn(self.first))))), self.turn(self.last))

    after, report = folded(prepared(Turned(), VECTORS), VECTORS)
    assert "batch_norm" not in operators(after) and not report.misses
    assert set(after.state_dict()) == {"first", "first_bias", "last", "last_bias"}


def test_products_with_a_stored_matrix_fold() -> None:
    class Products(nn.Module):
        def __init__(self, kind: str, bias: Tensor) -> None:
            super().__init__()
            self.kind, self.weight, self.bias = kind, nn.Parameter(torch.randn(6, 5)), nn.Parameter(bias)
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            if self.kind == "addmm":
                return self.bn(torch.addmm(self.bias, x, self.weight, beta=2.0, alpha=0.5))
            return self.bn(x @ self.weight) + self.bias

    for bias in (torch.randn(5), torch.randn(1, 5), torch.randn(16, 5), torch.randn(1)):
        net = prepared(Products("addmm", bias), VECTORS)
        _, after, report = apply(net, batch(VECTORS, 16), PASS)
        assert operators(after) == ["addmm"] and not report.misses
        assert errors_at(net, after, batch(VECTORS, 16)) <= 1e-12
    after, report = folded(prepared(Products("matmul", torch.randn(5)), VECTORS), VECTORS)
    assert "batch_norm" in operators(after) and "takes no bias" in reasons(report)[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_general_convolution_operator_folds(transposed: bool) -> None:
    class General(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 4, 3, 3) if transposed else torch.randn(8, 3, 3, 3))
            self.bn = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            options = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], 2)
            return self.bn(torch.convolution(x, self.weight, None, *options))

    after, report = folded(prepared(General(), IMAGES), IMAGES)
    assert operators(after) == ["convolution"] and not report.misses


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_other_dtypes_fold_and_keep_their_dtype(dtype: torch.dtype, limit: float) -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)), IMAGES, dtype)
    _, after, report = apply(net, batch(IMAGES, dtype=dtype), PASS)
    assert operators(after) == ["conv2d"] and not report.misses
    assert {tensor.dtype for tensor in after.state_dict().values()} == {dtype}
    exact = net.double()(*batch(IMAGES, dtype=dtype)[:1][0].double().unsqueeze(0))
    assert relative_error(after(*batch(IMAGES, dtype=dtype)).double(), exact) <= limit


def test_dead_channels_fold() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)), IMAGES)
    with torch.no_grad():
        net[1].weight[2] = 0
        net[1].running_var[3] = 0
        net[0].weight[3] = 0
    _, after, _report = apply(net, batch(IMAGES), PASS)
    assert operators(after) == ["conv2d", "conv2d"] and errors_at(net, after, batch(IMAGES)) <= 1e-12
    before = prepared(nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)), IMAGES)
    with torch.no_grad():
        before[0].weight[1] = 0
    _, after, _ = apply(before, batch(IMAGES), PASS)
    assert operators(after) == ["conv2d"] and errors_at(before, after, batch(IMAGES)) <= 1e-12


def test_an_empty_batch_runs_after_folding() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), IMAGES)
    _, after, _ = apply(net, batch(IMAGES), PASS, dynamic=BATCH)
    assert after(torch.zeros(0, *IMAGES, dtype=torch.float64)).shape == (0, 8, 5, 5)


def test_frozen_layers_stay_frozen() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8)), IMAGES)
    _, after, _ = apply(net.requires_grad_(False), batch(IMAGES), PASS)
    assert {name: p.requires_grad for name, p in after.named_parameters()} == {"0.weight": False, "0.bias": False}
    net.requires_grad_(True)[0].requires_grad_(False)
    _, after, _ = apply(net, batch(IMAGES), PASS)
    assert {name: p.requires_grad for name, p in after.named_parameters()} == {"0.weight": False, "0.bias": True}


def test_the_module_that_was_captured_is_not_changed() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)), IMAGES)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    before, _after, _ = apply(net, batch(IMAGES), PASS)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert all(torch.equal(state[name], tensor) for name, tensor in before.state_dict().items())


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = prepared(nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGES)
    _, after, _ = apply(net, batch(IMAGES), PASS)
    weight = after.params["0.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("0.weight", weight)
    assert errors_at(net, after, batch(IMAGES)) > 1e-5


def test_time_grows_with_the_graph_and_no_faster() -> None:
    layers: list[nn.Module] = []
    for _ in range(20):
        layers += [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()]
    model = go.capture(nn.Sequential(*layers).eval(), (torch.randn(1, 2, 2, 2),))
    rw = Rewriter(_lengthened(model, 1000))
    start = perf_counter()
    get_pass(PASS)().run(rw)
    assert perf_counter() - start < 6  # one on a quiet machine; minutes when a fold looks at the whole graph
    assert [edit.kind for edit in rw.edits].count(EditKind.REPLACE) == 1000


def _lengthened(model: go.Model, count: int) -> go.Model:
    """`count` triples of convolution, norm and activation: capturing so many would take minutes."""
    model = model.clone()
    rw = Rewriter(model)
    output = next(node for node in model.graph.nodes if node.op == "output")
    value = output.all_input_nodes[0]
    example = next(iter(rw.find(torch.ops.aten.batch_norm.default)))
    for index in range(count - 20):
        names = {"weight": ParamKind.PARAMETER, "bias": ParamKind.PARAMETER, "running_mean": ParamKind.BUFFER}
        stored = {
            name: rw.add_tensor(f"more.{index}.{name}", torch.ones(2), kind=kind)
            for name, kind in (names | {"running_var": ParamKind.BUFFER}).items()
        }
        weight = rw.add_tensor(f"more.{index}.conv", torch.ones(2, 2, 1, 1))
        value = rw.call(torch.ops.aten.conv2d.default, value, weight, before=output)
        norm = (value, *stored.values(), False, 0.1, 1e-5, False)
        value = rw.call(torch.ops.aten.batch_norm.default, *norm, before=output, like=example)
        value = rw.call(torch.ops.aten.relu.default, value, before=output)
    output.args = ((value,),)
    return model
