"""What the table answers about a call: arguments, multiply-accumulates, purity, views, literals."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from graphopt import ops
from tests.ops.calls import full, node_of, overload, run, same, samples
from tests.ops.layer_samples import ATTENTION, LAYERS, OTHERS, PRODUCTS
from tests.ops.samples import MOVEMENTS, Call, t

# Products, and their multiply-accumulates


@pytest.mark.parametrize(("name", "call"), samples(PRODUCTS))
def test_product_equals_its_equation(name: str, call: Call) -> None:
    node = node_of(name, call)
    tensors = [operand.meta["val"] for operand in ops.operands(node)]
    same(torch.einsum(ops.equation(node), *tensors), node.meta["val"])


# torch's counter knows neither these nor products with a vector.
UNCOUNTED = (
    "bilinear",
    "dot",
    "mv",
    "addmv",
    "outer",
    "ger",
    "addr",
    "addbmm",
    "matmul-2",
    "matmul-3",
    "matmul-4",
    "linear-1",
)
COUNTED = [
    param
    for param in samples(LAYERS, PRODUCTS, ATTENTION)
    if ops.TABLE[param.values[0]].macs and not {param.id, param.id.split("-")[0]} & set(UNCOUNTED)
]


@pytest.mark.parametrize(("name", "call"), COUNTED)
def test_macs_are_half_of_torch_flops(name: str, call: Call) -> None:
    macs = ops.TABLE[name].macs
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        overload(name)(*call[0], **call[1])
    assert macs is not None and 2 * macs(node_of(name, call)) == counter.get_total_flops() > 0


def test_macs_of_vectors_and_recurrent_layers() -> None:
    macs = {name: ops.TABLE[full(name)].macs for name in ("dot", "mv", "outer", "matmul", "lstm.input", "bilinear")}
    assert macs["dot"](node_of("dot", PRODUCTS["dot"][0])) == 4
    assert macs["mv"](node_of("mv", PRODUCTS["mv"][0])) == 12
    assert macs["outer"](node_of("outer", PRODUCTS["outer"][0])) == 12
    assert macs["matmul"](node_of("matmul", PRODUCTS["matmul"][4])) == 4
    assert macs["bilinear"](node_of("bilinear", PRODUCTS["bilinear"][0])) == 2 * 5 * 3 * 4
    lstm = OTHERS["lstm.input"][0]
    assert macs["lstm.input"](node_of("lstm.input", lstm)) == 5 * 2 * (12 * 4 + 12 * 3)


# Questions about calls


@pytest.mark.parametrize(("name", "call"), samples(OTHERS))
def test_other_rows_leave_their_inputs_alone(name: str, call: Call) -> None:
    run(name, call)
    assert ops.is_barrier(node_of(name, call)) == isinstance(ops.TABLE[name].axes, ops.Opaque)


def test_argument_by_position_keyword_default_and_absent() -> None:
    node = node_of("conv2d", ((t(1, 4, 5, 5), t(6, 4, 3, 3)), {"padding": [1, 1]}))
    assert ops.argument(node, "weight").meta["val"].shape == (6, 4, 3, 3)
    assert ops.argument(node, "padding") == [1, 1]
    assert ops.argument(node, "stride") == [1, 1] and ops.argument(node, "groups") == 1
    assert ops.argument(node, "bias") is None
    assert ops.argument(node, "alpha", 1) == 1
    with pytest.raises(KeyError, match="alpha"):
        ops.argument(node, "alpha")
    assert list(ops.arguments(node)) == ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    assert list(ops.tensor_arguments(node)) == ["input", "weight"]
    ops.argument(node, "stride").append(7)
    assert ops.argument(node, "stride") == [1, 1], "the schema's default was changed"


def test_unknown_operators_are_barriers() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    for target in (
        torch.ops.aten.add_.Tensor,
        torch.ops.aten.nonzero.default,
        torch.relu,
        torch.ops.prims.neg.default,
    ):
        node = graph.call_function(target, (x,))
        assert ops.lookup(target) is None and ops.is_barrier(node) and not ops.is_pure(node)
    assert ops.lookup([]) is None
    assert not ops.is_barrier(x) and not ops.is_pure(x)


def norm_node(training: bool, tracked: bool) -> Node:
    stats = [torch.zeros(4), torch.ones(4)] if tracked else [None, None]
    return node_of("batch_norm", ((t(2, 4, 3, 3), None, None, *stats, training, 0.1, 1e-5, False), {}))


def test_purity_depends_on_the_call() -> None:
    assert ops.is_pure(norm_node(training=False, tracked=True))
    assert not ops.is_pure(norm_node(training=True, tracked=True)), "running statistics change"
    assert ops.is_pure(norm_node(training=True, tracked=False))
    assert [ops.is_training(norm_node(flag, tracked=True)) for flag in (False, True)] == [False, True]
    assert ops.is_training(norm_node(training=True, tracked=False)) is None
    x = t(2, 3, 4, 4)
    for p, train, pure in ((0.5, False, True), (0.5, True, False), (0.0, True, True)):
        assert ops.is_pure(node_of("dropout", ((x, p, train), {}))) is pure
    assert ops.is_pure(node_of("scaled_dot_product_attention", ((x, x, x), {})))
    assert not ops.is_pure(node_of("scaled_dot_product_attention", ((x, x, x, None, 0.1), {})))
    assert not ops.is_pure(node_of("rand_like", ((x,), {})))
    assert ops.TABLE["relu.default"].pure and not ops.TABLE["dropout.default"].pure


def test_a_scaled_addition_does_not_commute() -> None:
    assert ops.is_commutative(node_of("add.Tensor", ((t(3), t(3)), {})))
    assert not ops.is_commutative(node_of("add.Tensor", ((t(3), t(3)), {"alpha": 2})))
    assert not ops.is_commutative(node_of("sub.Tensor", ((t(3), t(3)), {})))


def test_views_that_copy_are_found_by_strides() -> None:
    turned = t(2, 3, 4).mT
    assert ops.is_view(node_of("reshape", ((t(2, 3, 4), [6, 4]), {})))
    assert not ops.is_view(node_of("reshape", ((turned, [2, 12]), {})))
    assert not ops.is_view(node_of("contiguous", ((turned,), {})))
    assert ops.is_view(node_of("permute", ((turned, [1, 0, 2]), {})))
    assert ops.is_view(node_of("to.dtype", ((t(3), torch.float32), {})))
    assert not ops.is_view(node_of("to.dtype", ((t(3), torch.float64), {})))
    assert not ops.is_view(node_of("clone", ((t(3),), {})))


# Literals that encode an axis


@pytest.mark.parametrize(("name", "call"), samples(MOVEMENTS, LAYERS))
def test_literals_agree(name: str, call: Call) -> None:
    literals = ops.TABLE[name].literals
    if literals is not None:
        node = node_of(name, call)
        assert all(literal.agrees() for literal in literals(node))


@pytest.mark.parametrize(
    ("name", "call", "operand", "shape", "argument"),
    [
        ("view", ((t(2, 12), [2, 3, 4]), {}), None, (2, 3, 5), "size"),
        ("layer_norm", ((t(2, 12), [12]), {}), "input", (2, 11), "normalized_shape"),
        ("group_norm", ((t(2, 12, 3), 4), {}), "input", (2, 10, 3), "num_groups"),
        (
            "conv2d",
            ((t(2, 12, 3, 3), t(6, 4, 3, 3), None, [1], [1], [1], 3), {}),
            "input",
            (2, 8, 3, 3),
            "groups",
        ),
        ("split_with_sizes", ((t(2, 12), [5, 7], 1), {}), "self", (2, 11), "split_sizes"),
        ("pixel_shuffle", ((t(2, 8, 3, 3), 2), {}), "self", (2, 6, 3, 3), "upscale_factor"),
    ],
)
def test_literals_disagree_with_a_changed_axis(
    name: str, call: Call, operand: str | None, shape: tuple[int, ...], argument: str
) -> None:
    node = node_of(name, call)
    literals = ops.TABLE[full(name)].literals
    assert literals is not None and all(literal.agrees() for literal in literals(node))
    changed = ops.argument(node, operand) if operand else node
    changed.meta["val"] = t(*shape)
    assert [literal.argument for literal in literals(node) if not literal.agrees()] == [argument]
