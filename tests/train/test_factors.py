"""Nets written as factors: what they compute, what is left alone and why, and the pairs that training finds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.train import DLRT, Factored, Maestro, as_factors
from graphopt.train.pairs import find_pairs, ranks_of, set_ranks


class Mixed(nn.Module):
    """Layers of all sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.frozen = nn.Conv2d(6, 6, 1)
        self.frozen.requires_grad_(False)
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.hooked = nn.Linear(6, 6)
        self.hooked.register_forward_hook(lambda *_: None)
        self.narrow = nn.Linear(6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.frozen(self.up(self.depthwise(self.norm(self.conv(x)))))
        x = self.hooked(self.tied(self.first(x.mean((2, 3)))))
        return self.narrow(x) + self.head(x)


@settings(deadline=None, max_examples=30)
@given(
    axes=st.integers(0, 3), out=st.integers(2, 6), inputs=st.integers(2, 6), taps=st.integers(1, 3),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), window=st.sampled_from(["first", "second"]),
    mode=st.sampled_from(["zeros", "reflect", "circular"]), bias=st.booleans(), part=st.floats(0.1, 1.0),
)  # fmt: skip
def test_factors_of_any_layer(
    axes: int, out: int, inputs: int, taps: int, stride: int, dilation: int, window: Any, mode: str, bias: bool,
    part: float,
) -> None:  # fmt: skip
    """At full rank they are the layer; at rank r their product is off by the singular values that are left out."""
    if axes == 0:
        layer: nn.Module = nn.Linear(inputs, out, bias=bias)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
        mode = "zeros" if axes == 3 and mode == "reflect" else mode
        layer = kind(inputs, out, taps, stride, padding=1, dilation=dilation, bias=bias, padding_mode=mode)
    layer = layer.double()
    x = torch.randn(2, inputs, *[7] * axes).double()
    net, left = as_factors(layer, window=window)
    assert isinstance(net, Factored) and left == {} and relative_error(net(x), layer(x)) < 1e-12
    assert torch.allclose(net.weight, layer.weight, atol=1e-12) and (net.bias is None) == (not bias)
    small, _ = as_factors(layer, part, window=window)
    (pair,) = find_pairs(small)
    assert pair.rank == max(1, round(part * pair.full))
    rows = layer.weight.flatten(1) if window == "first" else layer.weight.movedim(1, -1).flatten(0, -2)
    tail = torch.linalg.svdvals(rows.detach())[pair.rank :].norm()
    assert float((small.weight - layer.weight).norm().detach()) == pytest.approx(float(tail), abs=1e-10)
    a, b = (matrix.detach() for matrix in pair.matrices())
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1), atol=1e-10)


def test_a_net_is_copied_and_each_layer_that_is_left_alone_has_its_reason() -> None:
    torch.manual_seed(0)
    net, x = Mixed().eval(), torch.randn(2, 3, 8, 8)
    state = copy.deepcopy(net.state_dict())
    made, left = as_factors(net)
    assert {name: type(module) for name, module in made.named_modules() if isinstance(module, Factored)} == {
        "conv": Factored,
        "head": Factored,
    }
    assert left == {
        "depthwise": "it has 8 groups, and each would have a rank of its own",
        "up": "it is a ConvTranspose2d",
        "frozen": "its weight is frozen",
        "first": "its weight is shared: all layers that read it would have to change",
        "tied": "its weight is shared: all layers that read it would have to change",
        "hooked": "there are hooks on it",
        "narrow": "its full rank is 1",
    }
    assert relative_error(made(x), net(x)) < 1e-5 and not made.training
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in state.items())
    some, rest = as_factors(net, leave=("head",))
    assert isinstance(some.conv, Factored) and not isinstance(some.head, Factored) and "head" not in rest


def test_a_layer_in_two_places_and_a_computed_weight_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    _, left = as_factors(nn.Sequential(layer, nn.ReLU(), layer, normed, nn.Linear(4, 3)))
    assert left["0"] == left["2"] == "its weight is shared: all layers that read it would have to change"
    assert left["3"] == "it is a ParametrizedLinear" and set(left) == {"0", "2", "3"}


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_look_into_their_layers_go_on_working(training: bool) -> None:
    """A transformer layer reads the weights of its linear layers when it is evaluated."""
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    made, left = as_factors(net)
    assert left == {"self_attn.out_proj": "it is a NonDynamicallyQuantizableLinear"}
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert relative_error(made(x), net(x)) < 1e-5


def test_captured_it_is_two_ordinary_layers_each() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    made, _ = as_factors(net, 3)
    x = torch.randn(2, 3, 4, 4)
    model = go.capture(made, (x,), dynamic={0: {0: "batch"}})
    calls = [str(node.target).split(".")[1] for node in model.graph.nodes if node.op == "call_function"]
    assert calls == ["conv2d", "conv2d", "relu", "flatten", "linear", "linear"]
    assert {name: list(tensor.shape) for name, tensor in model.params.items()} == {
        "0.0.weight": [3, 3, 3, 3], "0.1.weight": [8, 3, 1, 1], "0.1.bias": [8],
        "3.0.weight": [3, 128], "3.1.weight": [5, 3], "3.1.bias": [5],
    }  # fmt: skip
    assert ranks_of(find_pairs(model)) == {"0": 3, "3": 3} and relative_error(model(x), made(x)) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -0.5}, "rank is -0.5"),
        ({"rank": float("nan")}, "rank is nan"),
        ({"rank": 5}, "'1' has a full one of 4"),
        ({"rank": 2.5}, "rank is 2.5, and '0' has a full one of 6"),
        ({"only": ("2",)}, "no layer '2'"),
        ({"leave": ("0", "1")}, "no layer could be written as factors"),
        ({"window": "third"}, "window is 'third'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    net = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4))
    with pytest.raises(UsageError) as caught:
        as_factors(net, **options)
    assert message in str(caught.value)


def test_nets_without_a_layer_to_factorise() -> None:
    with pytest.raises(UsageError, match="no layer could be written"):
        as_factors(nn.ReLU())
    with pytest.raises(UsageError, match="'0': it has 4 groups"):
        as_factors(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)))
    with pytest.raises(UsageError, match=r"'up' cannot be written as factors\n.*ConvTranspose2d"):
        as_factors(Mixed(), only=("up", "conv"))
    net = nn.Linear(3, 3)
    nn.init.constant_(net.weight, torch.inf)
    with pytest.raises(UsageError, match="not finite"):
        as_factors(net)


@pytest.mark.parametrize("kind", [Maestro, DLRT])
def test_what_is_not_written_as_factors_cannot_be_trained_as_such(kind: Any) -> None:
    options = {} if kind is Maestro else {"lr": 0.1}
    with pytest.raises(UsageError, match=r"written as factors\n.*as_factors"):
        kind(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **options)
    image = torch.randn(2, 3, 6, 6)
    conv = nn.Conv2d
    for layers, why in (
        ((conv(3, 4, 3, bias=False), nn.BatchNorm2d(4), conv(4, 4, 1)), "'batch_norm' stands between 'conv2d' and it"),
        ((conv(3, 4, 3), conv(4, 4, 1)), "'conv2d' adds a bias"),
        ((conv(3, 4, 3, bias=False), conv(4, 4, 1, groups=2)), "'conv2d_1' has groups"),
        ((conv(3, 4, 3, bias=False), nn.ReLU(), conv(4, 4, 1)), "'relu' stands between"),
    ):
        model = go.capture(nn.Sequential(*layers).eval(), (image,))
        with pytest.raises(UsageError) as caught:
            kind(model, **options)
        assert why in str(caught.value) and "low-rank" in str(caught.value)
    net, _ = as_factors(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(UsageError, match="no layer 'x'"):
        kind(net, leave=("x",), **options)
    with pytest.raises(UsageError, match="no pair of factors is left"):
        kind(net, leave=("0", "1"), **options)
    net.requires_grad_(False)
    with pytest.raises(UsageError, match="'0': its factors are frozen"):
        kind(net, **options)


def test_shared_factors_of_a_model_are_no_pair() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.c(x.tanh())

    with pytest.raises(UsageError, match=r"is (tied to|also used by) '"):
        find_pairs(go.capture(Net().eval(), (torch.randn(2, 4),)))


def test_ranks_of_a_state_keep_what_there_is() -> None:
    torch.manual_seed(0)
    net, _ = as_factors(nn.Linear(6, 5), 3)
    pairs, x = find_pairs(net), torch.randn(2, 6)
    before = net(x)
    set_ranks(pairs, {"": 5})
    assert torch.allclose(net(x), before) and net[0].out_features == net[1].in_features == 5
    set_ranks(pairs, {"": 2})
    assert list(net[1].weight.shape) == [5, 2]
    with pytest.raises(UsageError, match="of other factors"):
        set_ranks(pairs, {"0": 2})
