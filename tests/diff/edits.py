"""Random edits of a model that do not touch each other, and the entries that a diff should find for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

import graphopt as go
from graphopt.diff import GraphDiff
from graphopt.errors import GraphoptError
from graphopt.model import Model
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.printer import operator_name
from graphopt.rewriter import Node, Rewriter
from graphopt.verify import verify

__all__ = ["EDITS", "Done", "edit", "found"]

aten = torch.ops.aten
_UNARY = (aten.neg.default, aten.sigmoid.default, aten.abs.default, aten.relu.default, aten.tanh.default)
_DELETED = {aten.relu.default, aten.gelu.default, aten.dropout.default, aten.tanh.default, aten.silu.default}
_DELETED |= {
    aten.hardswish.default,
    aten.sigmoid.default,
    aten.abs.default,
    aten.relu6.default,
    aten.leaky_relu.default,
}
_DELETED |= {aten.hardtanh.default, aten.batch_norm.default, aten.layer_norm.default}
_ATTRIBUTES = {"eps": 3.0, "negative_slope": 1.5, "p": 0.5, "momentum": 0.5}

Done = tuple[str, str]
"""The kind of entry, and what it is about: a node, an operator or a tensor."""


@dataclass
class _Editor:
    model: Model
    random: random.Random

    def __post_init__(self) -> None:
        self.near: set[str] = set()

    def free(self, nodes: list[Node]) -> bool:
        """Whether no earlier edit has touched the nodes or what lies next to them."""
        return not {node.name for node in nodes} & self.near

    def take(self, nodes: list[Node]) -> None:
        for node in nodes:
            self.near.add(node.name)
            self.near.update(other.name for other in (*node.all_input_nodes, *node.users) if other.op != "get_attr")

    def pick(self, suits: Callable[[Node], bool]) -> Node | None:
        nodes = [n for n in self.model.graph.nodes if n.op == "call_function" and suits(n) and self.free([n])]
        return self.random.choice(nodes) if nodes else None


def _around(node: Node) -> list[Node]:
    return [node, *(other for other in node.all_input_nodes if other.op != "get_attr"), *node.users]


def _insert(editor: _Editor) -> Done | None:
    node = editor.pick(lambda n: _is_float(n) and bool(n.users) and editor.free(list(n.users)))
    if node is None:
        return None
    rw = Rewriter(editor.model)
    operator = editor.random.choice([op for op in _UNARY if op is not node.target])
    users = [user for user in node.users if user.op == "call_function"]
    if not users or any(user.target is operator for user in users):
        return None
    before = min(users, key=list(editor.model.graph.nodes).index)
    editor.take([node, *users])
    made = rw.call(operator, node, before=before)
    for user in users:
        user.replace_input_with(node, made)
    editor.near.add(made.name)
    return ("inserted", operator_name(operator))


def _delete(editor: _Editor) -> Done | None:
    node = editor.pick(
        lambda n: (
            n.target in _DELETED and n.args[0].meta["val"].shape == n.meta["val"].shape and editor.free(_around(n))
        )
    )
    if node is None:
        return None
    editor.take(_around(node))
    name = node.name
    Rewriter(editor.model).replace(node, node.args[0], "deleted")
    return ("removed", name)


def _attribute(editor: _Editor) -> Done | None:
    rw = Rewriter(editor.model)

    def names(n: Node) -> list[str]:
        schema = (
            [arg.name for arg in getattr(n.target, "_schema", None).arguments] if hasattr(n.target, "_schema") else []
        )
        return [name for name in _ATTRIBUTES if name in schema]

    node = editor.pick(lambda n: bool(names(n)))
    if node is None:
        return None
    name = editor.random.choice(names(node))
    editor.take([node])
    rw.update(node, "changed", **{name: float(rw.argument(node, name)) * _ATTRIBUTES[name] + 0.01})
    return ("changed", node.name)


def _weight(editor: _Editor) -> Done | None:
    def weights(n: Node) -> list[Node]:
        return [w for w in n.all_input_nodes if w.op == "get_attr" and _is_float(w) and w.meta["val"].numel() > 1]

    node = editor.pick(lambda n: bool(weights(n)))
    if node is None:
        return None
    editor.take([node])
    weight = editor.random.choice(weights(node))
    tensor = editor.model.params[str(weight.target)].detach()
    generator = torch.Generator().manual_seed(editor.random.randrange(2**31))
    changed = tensor.clone()
    place = editor.random.randrange(tensor.numel())
    if editor.random.random() < 0.5:
        changed += 0.1 * torch.rand(tensor.shape, generator=generator)
    else:
        changed.view(-1)[place] += 1
    Rewriter(editor.model).set_tensor(weight, changed, "changed")
    return ("changed", node.name)


def _prune(editor: _Editor) -> Done | None:
    from graphopt.analysis.coupling import couple

    groups = list(couple(editor.model).groups.values())
    editor.random.shuffle(groups)
    for group in groups:
        layers = [m for m in group.members if m.slot.role == "out" and m.slot.axis == 0]
        nodes = [n for n in editor.model.graph.nodes if n.name in {m.slot.user.name for m in group.members}]
        if not layers or not editor.free(nodes):
            continue
        name = layers[0].name.removesuffix(".weight").removesuffix(".bias")
        index = editor.random.randrange(min(len(family) for family in group.families))
        try:
            pruned, _ = go.run(editor.model, f"remove-channels{{layer={name},indices={index}}}", check=False)
        except GraphoptError:
            continue
        changed = _resized(editor.model, pruned)
        if {n.name for n in changed} & editor.near:
            continue
        editor.model = pruned
        editor.take([n for n in pruned.graph.nodes if n.name in {other.name for other in (*changed, *nodes)}])
        return ("pruned", name)
    return None


def _resized(before: Model, after: Model) -> list[Node]:
    shapes = {n.name: n.meta["val"].shape for n in before.graph.nodes if hasattr(n.meta.get("val"), "shape")}
    found = []
    for node in after.graph.nodes:
        if node.name in shapes and node.op == "call_function":
            tensors = [w for w in (node, *node.all_input_nodes) if w.name in shapes]
            if any(tuple(w.meta["val"].shape[1:]) != tuple(shapes[w.name][1:]) for w in tensors):
                found.append(node)
    return found


def _fuse(editor: _Editor) -> Done | None:
    def suits(n: Node) -> bool:
        conv = n.args[0] if n.target is aten.batch_norm.default else None
        return (
            conv is not None
            and conv.target is aten.conv2d.default
            and len(conv.users) == 1
            and editor.free(_around(n) + _around(conv))
        )

    node = editor.pick(suits)
    if node is None:
        return None
    conv = node.args[0]
    editor.take([*_around(node), conv])
    name = node.name
    rw = Rewriter(editor.model)
    rw.find = lambda *targets: iter([node])
    FoldBatchNorm().run(rw)
    return ("rewritten", name) if rw.changed else None


EDITS: dict[str, Callable[[_Editor], Done | None]] = {
    "insert": _insert,
    "delete": _delete,
    "attribute": _attribute,
    "weight": _weight,
    "prune": _prune,
    "fuse": _fuse,
}


def edit(model: Model, seed: int, count: int) -> tuple[Model, list[Done]]:
    """A copy of the model with up to `count` random edits, and what each of them was."""
    editor = _Editor(model.clone(share_tensors=True), random.Random(seed))
    done: list[Done] = []
    for _ in range(4 * count):
        if len(done) == count:
            break
        one = EDITS[editor.random.choice(list(EDITS))](editor)
        if one is not None:
            done.append(one)
    for node in editor.model.graph.nodes:  # operands were changed past the rewriter
        if node.op == "call_function":
            node.meta["val"] = editor.model.shapes.propagate(node)
    editor.model.touch()
    verify(editor.model)
    return editor.model, sorted(done)


def found(diff: GraphDiff) -> list[Done]:
    """The entries in the form of `edit`: a pruned one by its first layer, a rewritten one by the norm that is gone."""
    rows: list[Done] = []
    for entry in diff.entries:
        left = [diff.a.view.items[index] for index in entry.removed or entry.a]
        right = [diff.b.view.items[index] for index in entry.inserted]
        if entry.kind == "inserted":
            rows.append((entry.kind, right[0].operator))
        elif entry.kind == "pruned":
            rows.append((entry.kind, ""))
        else:
            rows.append((entry.kind, left[0].name))
    return sorted(rows)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point
