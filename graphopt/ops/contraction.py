"""Operators whose cost is their multiply-accumulates: layers with a weight, and products of activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from graphopt.ops import literals
from graphopt.ops.arguments import argument
from graphopt.ops.axes import Contracted, Product
from graphopt.ops.info import Kind, OpInfo, rows
from graphopt.ops.sizes import Size, numel, product, rank, shape

__all__ = ["ROWS", "equation", "operands"]


def linear_macs(node: Node) -> Size:
    """Every output element sums over the last axis of the input."""
    return product((numel(node), shape(argument(node, "input"))[-1]))


def conv_macs(node: Node) -> Size:
    """Every output element sums over one filter [in/groups, *kernel]; padding counts as if it were data."""
    return product((numel(node), *shape(argument(node, "weight"))[1:]))


def transposed_conv_macs(node: Node) -> Size:
    """Every input element is multiplied by one filter [out/groups, *kernel]."""
    return product((numel(argument(node, "input")), *shape(argument(node, "weight"))[1:]))


def bilinear_macs(node: Node) -> Size:
    """weight [out, in1, in2]: an output element sums in1*in2 products of three factors, one MAC each."""
    return product((numel(node), *shape(argument(node, "weight"))[1:]))


def attention_macs(node: Node) -> Size:
    """query [.., L, E], key [.., S, E], value [.., S, Ev]: L*S*E and L*S*Ev for every leading position.

    A causal mask is not taken off: every kernel without special support computes the masked scores too.
    """
    query, key, value = (shape(argument(node, name)) for name in ("query", "key", "value"))
    return product((*shape(node)[:-1], key[-2], query[-1] + value[-1]))


def equation_macs(node: Node) -> Size:
    """One product for every value of every letter, n - 1 for n operands: no cheaper order is looked for."""
    text, tensors = equation(node), operands(node)
    terms = text.split("->")[0].split(",")
    letters: dict[str, Size] = {}
    batch: tuple[Size, ...] = ()
    for term, tensor in zip(terms, tensors, strict=True):
        dims = shape(tensor)
        named = term.replace("...", "")
        free = len(dims) - len(named)
        at = term.index("...") if "..." in term else 0
        if free:
            batch = broadcast(batch, dims[at : at + free])
        for letter, size in zip(named, dims[:at] + dims[at + free :], strict=True):
            letters[letter] = size if letters.get(letter, 1) == 1 else letters[letter]
    return product((max(len(tensors) - 1, 1), *batch, *letters.values()))


def broadcast(a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...]:
    """Broadcast shape of two shapes that are known to broadcast."""
    length = max(len(a), len(b))
    a, b = (1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def operands(node: Node) -> tuple[Node, ...]:
    """The tensors that a product multiplies, in the order of its equation.

    Raises:
        KeyError: the operator is not a product.
    """
    axes = ROWS[_name(node)].axes
    if not isinstance(axes, Product):
        raise KeyError(f"{node.target} is not a product of tensors")
    values = [argument(node, name) for name in axes.operands]
    return tuple(tensor for value in values for tensor in (value if isinstance(value, (list, tuple)) else [value]))


def equation(node: Node) -> str:
    """The Einstein equation of a product, `...` standing for axes that broadcast. Of
    `scaled_dot_product_attention` it is the equation of its two products together, between which comes a
    softmax over s.

    Raises:
        KeyError: the operator is not a product.
    """
    name = _name(node)
    axes = ROWS[name].axes
    if not isinstance(axes, Product):
        raise KeyError(f"{node.target} is not a product of tensors")
    if axes.equation is not None:
        return axes.equation
    return str(EQUATIONS[name](node))


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.")


def matmul_equation(node: Node) -> str:
    """Vectors are a row on the left and a column on the right, whose axis of one then vanishes."""
    left, right = (rank(tensor) for tensor in operands(node))
    if left == 1:
        return "k,k->" if right == 1 else "k,...kn->...n"
    return "...mk,k->...m" if right == 1 else "...mk,...kn->...mn"


def tensordot_equation(node: Node) -> str:
    """`dims_self` are contracted with `dims_other`, in that order."""
    left, right = (rank(tensor) for tensor in operands(node))
    a, b = letters_of(left), letters_of(right, start=left)
    for i, j in zip(argument(node, "dims_self"), argument(node, "dims_other"), strict=True):
        b[j % right] = a[i % left]
    return f"{''.join(a)},{''.join(b)}->{''.join(x for x in a + b if (x in a) != (x in b))}"


def letters_of(count: int, start: int = 0) -> list[str]:
    return [chr(ord("a") + start + i) for i in range(count)]


EQUATIONS: dict[str, Callable[[Node], Any]] = {
    "matmul.default": matmul_equation,
    "linalg_matmul.default": matmul_equation,
    "einsum.default": lambda node: argument(node, "equation").replace(" ", ""),
    "tensordot.default": tensordot_equation,
}


def conv(window: int, *, transposed: bool = False) -> OpInfo:
    """weight [out, in/groups, *kernel], or [in, out/groups, *kernel] of a transposed convolution."""
    channel = -1 - window
    weight_in, weight_out = (0, 1) if transposed else (1, 0)
    axes = Contracted(channel, channel, weight_in, weight_out, window, "groups", transposed)
    macs = transposed_conv_macs if transposed else conv_macs
    return OpInfo(Kind.CONTRACTION, axes, macs=macs, literals=literals.conv_groups(window, transposed))


def of(names: tuple[str, ...], equation: str | None, added: str | None = None, *, commutative: bool = False) -> OpInfo:
    """A product of the named operands."""
    return OpInfo(Kind.CONTRACTION, Product(names, equation, added), macs=equation_macs, commutative=commutative)


ROWS: dict[str, OpInfo] = {
    **rows("linear", OpInfo(Kind.CONTRACTION, Contracted(-1, -1, 1, 0), macs=linear_macs)),
    **rows("conv1d conv1d.padding", conv(1)),
    **rows("conv2d conv2d.padding", conv(2)),
    **rows("conv3d conv3d.padding", conv(3)),
    **rows("conv_transpose1d", conv(1, transposed=True)),
    **rows("conv_transpose2d.input", conv(2, transposed=True)),
    **rows("conv_transpose3d.input", conv(3, transposed=True)),
    **rows(
        "bilinear",
        OpInfo(
            Kind.CONTRACTION,
            Product(("input1", "input2", "weight"), "...i,...j,kij->...k", "bias"),
            macs=bilinear_macs,
        ),
    ),
    **rows("matmul linalg_matmul", of(("self", "other"), None)),
    **rows("mm", of(("self", "mat2"), "mk,kn->mn")),
    **rows("bmm", of(("self", "mat2"), "bmk,bkn->bmn")),
    **rows("addmm", of(("mat1", "mat2"), "mk,kn->mn", "self")),
    **rows("baddbmm", of(("batch1", "batch2"), "bmk,bkn->bmn", "self")),
    **rows("addbmm", of(("batch1", "batch2"), "bmk,bkn->mn", "self")),
    **rows("mv", of(("self", "vec"), "mk,k->m")),
    **rows("addmv", of(("mat", "vec"), "mk,k->m", "self")),
    **rows("dot", of(("self", "tensor"), "k,k->")),
    **rows("outer ger", of(("self", "vec2"), "m,n->mn")),
    **rows("addr", of(("vec1", "vec2"), "m,n->mn", "self")),
    **rows("einsum", of(("tensors",), None)),
    **rows("tensordot", of(("self", "other"), None)),
    **rows(
        "scaled_dot_product_attention",
        OpInfo(
            Kind.ATTENTION,
            Product(("query", "key", "value"), "...le,...se,...sv->...lv", "attn_mask"),
            macs=attention_macs,
            probability="dropout_p",
        ),
    ),
}
