"""In-place operators made functional, on the undecomposed graph.

The graph is walked once. A write to a tensor makes a new value for it; when the tensor is a view, the new value is
scattered back through the chain of views to the tensor that owns the storage, and every other view of that storage
is taken afresh at its next use. torch's own functionalization decomposes batch norm and attention on the way, which
the IR has to keep whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.errors import UnsupportedError
from graphopt.fake import Shapes, example_number
from graphopt.ops import Kind, argument, is_in_place, lookup
from graphopt.printer import source_of

__all__ = ["functionalize"]

aten = torch.ops.aten


def functionalize(graph: fx.Graph, shapes: Shapes, *, may_write: Callable[[fx.Node], bool]) -> None:
    """Rewrite `graph` so that no operator writes to its arguments, but for those that `may_write` allows.

    Raises:
        UnsupportedError: for a write to an input or a parameter, or through a view that cannot be undone.
    """
    writes = [node for node in graph.nodes if is_in_place(node) and not may_write(node)]
    if writes:
        _Functionalizer(graph, shapes, set(writes)).run()


class _Functionalizer:
    """`args` holds the arguments of the graph as it was; the nodes' own are replaced by current values on the way."""

    def __init__(self, graph: fx.Graph, shapes: Shapes, writes: set[fx.Node]) -> None:
        self.graph, self.shapes, self.writes = graph, shapes, writes
        self.base = _find_bases(graph)
        self.args = {node: node.args for node in graph.nodes}
        self.value: dict[fx.Node, fx.Node] = {}  # the node that holds the current value of a tensor of the old graph
        self.written: dict[fx.Node, int] = {}  # how often the storage of a root has been written
        self.taken: dict[fx.Node, int] = {}  # the count at which a view's current value was taken

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op not in ("call_function", "output"):
                continue
            self.at = node
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), self.current)
            self.taken[node] = self.written.get(self.root(node), 0)
            if node in self.writes:
                self.write(node)
        for node in reversed(list(self.graph.nodes)):
            if node in self.writes:
                self.graph.erase_node(node)

    def root(self, node: fx.Node) -> fx.Node:
        while node in self.base:
            node = self.base[node]
        return node

    def current(self, node: fx.Node) -> fx.Node:
        """The node that holds what the tensor `node` of the old graph reads as now."""
        if node in self.writes:
            return self.current(self.base[node])
        if node not in self.base:
            return self.value.get(node, node)
        count = self.written.get(self.root(node), 0)
        if self.taken.get(node, 0) < count:
            args = fx.map_arg(self.args[node], self.current)
            self.value[node] = self.insert(node.target, *args, **node.kwargs)
            self.taken[node] = count
        return self.value.get(node, node)

    def write(self, node: fx.Node) -> None:
        """Send the value that an in-place call makes to where it belongs."""
        target = self.args[node][0]
        assert isinstance(target, fx.Node)
        root = self.root(target)
        if root.op != "call_function":
            kind = "input" if root.op == "placeholder" else "tensor"
            raise UnsupportedError(
                f"the model changes its {kind} '{root.target}' in place ({node.target})",
                where=source_of(node),
                todo="work on a copy (x = x.clone()), or return the new value",
            )
        new = self.functional(node)
        self.written[root] = self.written.get(root, 0) + 1
        self.scatter(target, new)

    def scatter(self, target: fx.Node, new: fx.Node) -> None:
        """Give `target` the value `new`, and everything it is a view of the value that follows from it."""
        if target in self.writes:
            self.scatter(self.base[target], new)
            return
        if target in self.base:
            base = self.base[target]
            self.scatter(base, self.put_back(target, self.current(base), new))
        self.value[target] = new
        self.taken[target] = self.written[self.root(target)]

    def put_back(self, view: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node:
        """`base` with the part that `view` shows replaced by `new`."""
        if view.target is operator.getitem:
            return self.put_back_piece(view, base, new)
        undo = _UNDO.get(view.target)
        if undo is None:
            raise UnsupportedError(
                f"a write through a view made by {view.target} cannot be made functional",
                where=source_of(view),
                todo="assign to a copy, or use torch.where, torch.cat or index_put",
            )
        op, args = undo(view, base, new)
        return new if op is None else self.insert(op, *args)

    def put_back_piece(self, view: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node:
        pieces, index = self.args[view]
        assert isinstance(pieces, fx.Node) and isinstance(index, int)
        dim = pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0)
        if pieces.target is aten.unbind.int:
            dim = pieces.kwargs.get("dim", pieces.args[1] if len(pieces.args) > 1 else 0)
            return self.insert(aten.select_scatter.default, base, new, dim, index)
        assert isinstance(dim, int)
        sizes = [piece.shape[dim] for piece in pieces.meta["val"]]
        start = sum(sizes[:index])
        return self.insert(aten.slice_scatter.default, base, new, dim, start, start + sizes[index])

    def functional(self, node: fx.Node) -> fx.Node:
        """The value that an in-place call leaves in its first argument."""
        assert isinstance(node.target, torch._ops.OpOverload)
        target = node.args[0]
        assert isinstance(target, fx.Node)
        like = target.meta["val"]
        name = node.target._opname
        if name == "copy_":
            new = node.args[1]
            assert isinstance(new, fx.Node)
        elif name in ("fill_", "zero_"):
            fill = node.args[1] if name == "fill_" else 0
            if isinstance(fill, fx.Node):
                new = fill
            else:
                return self.insert(aten.full_like.default, target, fill)
        elif node.target is aten.bernoulli_.float:
            new = self.insert(aten.bernoulli.p, target, argument(node, "p"))
        else:
            new = self.insert(_functional_form(node), *node.args, **node.kwargs)
        if new.meta["val"].dtype != like.dtype:
            new = self.insert(aten.to.dtype, new, like.dtype)
        if new.meta["val"].shape != like.shape:
            new = self.insert(aten.expand_as.default, new, target)
        return new

    def insert(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(op, args, kwargs)
        node.meta = {key: value for key, value in self.at.meta.items() if key in ("stack_trace", "nn_module_stack")}
        node.meta["val"] = self.shapes.propagate(node)
        return node


def _functional_form(node: fx.Node) -> Any:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    packet = getattr(getattr(torch.ops, target.namespace), target._opname.rstrip("_"), None)
    if packet is None or target._overloadname not in packet.overloads():
        raise UnsupportedError(
            f"the in-place operator {target} has no functional form",
            where=source_of(node),
            todo="write the step without changing a tensor in place",
        )
    return getattr(packet, target._overloadname)


def _find_bases(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For every node whose value shares storage with one of its inputs, that input; found by running its operator on
    fake tensors of the example's size, whose storages are as real as those of the tensors they stand for."""
    base: dict[fx.Node, fx.Node] = {}
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():  # with one, sizes may depend on data
        for node in graph.nodes:
            if node.op != "call_function" or not _may_share(node):
                continue
            values = {arg: _example(arg.meta.get("val")) for arg in node.all_input_nodes}
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            made = node.target(*args, **kwargs)
            owner = next((arg for arg in node.all_input_nodes if _share(values[arg], made)), None)
            if owner is not None and node.target is operator.getitem:
                # A piece of a split is a view of what was split; one of a topk is a tensor of its own.
                owner = base.get(owner)
            if owner is not None:
                base[node] = owner
    return base


def _may_share(node: fx.Node) -> bool:
    """Whether the result may lie in the storage of an argument. The schema tells, but for operators that are made of
    others and hand on what these return (dropout that drops nothing); products and norms never return an operand."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    if any(value.alias_info is not None for value in node.target._schema.returns):
        return True
    info = lookup(node.target)
    made_of_others = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return made_of_others and (info is None or info.kind not in (Kind.CONTRACTION, Kind.NORMALIZATION))


def _example(value: Any) -> Any:
    """A fake value with the sizes it had in the example, so that nothing here can fix a free size."""
    if isinstance(value, torch.Tensor):
        sizes, strides = ([_example(n) for n in numbers] for numbers in (value.shape, value.stride()))
        return torch.empty_strided(sizes, strides, dtype=value.dtype)
    if isinstance(value, tuple | list):
        return [_example(item) for item in value]
    return example_number(value) if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _share(a: Any, b: Any) -> bool:
    return bool(_storages(a) & _storages(b))


def _storages(value: Any) -> set[int]:
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage()._cdata}
    if isinstance(value, tuple | list):
        return {number for item in value for number in _storages(item)}
    return set()


Undo = Callable[[fx.Node, fx.Node, fx.Node], tuple[Any, tuple[Any, ...]]]


def _same(view: fx.Node, base: fx.Node, new: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return None, ()


def _reshape(view: fx.Node, base: fx.Node, new: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return aten.reshape_as.default, (new, base)


def _scatter_with(op: Any) -> Undo:
    return lambda view, base, new: (op, (base, new, *view.args[1:]))


def _unpermute(view: fx.Node, base: fx.Node, new: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    dims = view.args[1]
    assert isinstance(dims, list | tuple)
    rank = len(dims)
    order = [int(dim) % rank for dim in dims]  # type: ignore[arg-type]  # literals by the schema
    return aten.permute.default, (new, [order.index(axis) for axis in range(rank)])


def _transpose(view: fx.Node, base: fx.Node, new: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return view.target, (new, *view.args[1:])


_UNDO: dict[Any, Undo] = {
    aten.select.int: _scatter_with(aten.select_scatter.default),
    aten.slice.Tensor: _scatter_with(aten.slice_scatter.default),
    aten.permute.default: _unpermute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
}
for _op in (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
):
    _UNDO[_op] = _reshape
for _op in (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.type_as.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.lift_fresh_copy.default,
):
    _UNDO[_op] = _same
