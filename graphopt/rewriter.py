"""The only way to edit a model: every change is journaled, shapes are inferred at once, dead operators go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.errors import GraphoptError
from graphopt.fake import FakeTensor
from graphopt.mode import training_flag
from graphopt.model import Model
from graphopt.ops import argument, is_pure
from graphopt.params import ParamKind
from graphopt.printer import print_node
from graphopt.transform import Edit, EditKind, Miss

__all__ = ["Node", "Rewriter"]

Node = fx.Node
"""An operator, input or tensor of the graph; passes name it from here and never import torch.fx."""


class Rewriter:
    """Edits one model on behalf of one pass.

    `edits` and `misses` are the journal. `limit` stops `find` after that many edits, which is how a wrong rewrite is
    found by bisection. `calib` are batches of flat inputs to calibrate with, none where the user has given none.
    `findings` is for what a pass wants to report besides, as plain data.
    """

    def __init__(self, model: Model, *, limit: int | None = None, calib: Sequence[Sequence[torch.Tensor]] = ()) -> None:
        self.model = model
        self.graph = model.graph
        self.params = model.params
        self.edits: list[Edit] = []
        self.misses: list[Miss] = []
        self.findings: dict[str, Any] = {}
        self.limit, self.calib = limit, calib
        self._touched: set[Node] = set()
        self._removed: set[Node] = set()
        self.params.reindex()
        self._readers = {str(node.target): node for node in self.graph.nodes if node.op == "get_attr"}
        self._first: Node | None = None
        self._before = {node: (node.target, node.args, node.kwargs) for node in self.graph.nodes}
        self._versions = {name: (tensor, tensor._version) for name, tensor in self.params.items()}

    # Reading

    @property
    def changed(self) -> bool:
        return bool(self.edits)

    @property
    def exhausted(self) -> bool:
        """Whether the limit on edits is reached."""
        return self.limit is not None and len(self.edits) >= self.limit

    def find(self, *targets: Any) -> Iterator[Node]:
        """Calls of any of the operators, or all calls, in topological order; those erased meanwhile are left out."""
        wanted = set(targets)
        calls = [n for n in self.graph.nodes if n.op == "call_function" and (not wanted or n.target in wanted)]
        for node in calls:
            if self.exhausted:
                return
            if not node._erased:
                yield node

    def value(self, node: Node) -> Any:
        """The fake value of a node: its shape, dtype and device."""
        return node.meta.get("val")

    def fake(self, node: Node) -> FakeTensor:
        """The fake tensor of a node that computes one tensor."""
        value = node.meta.get("val")
        if not isinstance(value, FakeTensor):
            raise GraphoptError(f"'{node.name}' is no tensor but a {type(value).__name__}")
        return value

    def tensor(self, node: Any) -> torch.Tensor | None:
        """The weight, buffer or constant that `node` stands for; None for anything that is computed."""
        if isinstance(node, Node) and node.op == "get_attr":
            return self.params[str(node.target)].detach()
        return None

    def argument(self, node: Node, name: str) -> Any:
        """An argument of a call by its schema name, defaults filled in."""
        return argument(node, name)

    def why_shared(self, tensor: Node, user: Node) -> str | None:
        """Why the tensor at `tensor` may not be changed for the sake of `user`; None when only `user` reads it."""
        others = [other.name for other in tensor.users if other is not user]
        if others:
            return f"'{tensor.target}' is also used by '{others[0]}'"
        name = str(tensor.target)
        tied = sorted((self.params.aliases(name) & self._readers.keys()) - {name})
        if tied:
            return f"'{tensor.target}' is tied to '{tied[0]}'"
        return None

    # Editing

    def skip(self, node: Node, why: str) -> None:
        """Record that `node` was a candidate and is left alone, with the reason."""
        self.misses.append(Miss(node.name, why))

    def call(self, op: Any, /, *args: Any, before: Node, like: Node | None = None, **kwargs: Any) -> Node:
        """Insert a call in front of `before`; it says to come from where `like` (or `before`) comes from.

        Raises:
            ShapeError: when the operator cannot take these inputs.
            GraphoptError: when `before` has been erased, so that the call would stand nowhere.
        """
        if before._erased:
            raise GraphoptError(f"a call cannot be put before '{before.name}', which was erased")
        with self.graph.inserting_before(before):
            node = self.graph.call_function(op, args, kwargs)
        if before is self._first or before.op in ("get_attr", "placeholder"):
            self._first = node  # so that tensors added from now on come before it
        self._inherit(node, like or before)
        try:
            node.meta["val"] = self.model.shapes.propagate(node)
        except GraphoptError:
            self.graph.erase_node(node)
            raise
        self._touched.add(node)
        return node

    def add_tensor(
        self, name: str, tensor: torch.Tensor, *, kind: ParamKind = ParamKind.PARAMETER, like: Node | None = None
    ) -> Node:
        """Add a tensor under `name`, or a free name close to it, and return its node."""
        name = self.params.fresh_name(name)
        self.params.add(name, tensor, kind)
        with self.graph.inserting_before(self._first_call()):
            node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        self._readers[name] = node
        if like is not None:
            self._inherit(node, like)
        node.meta["val"] = self.model.shapes.fake(self.params[name])
        self._touched.add(node)
        return node

    def _first_call(self) -> Node:
        """The call, or the output, that stands first: tensors go in front of it."""
        first = self._first
        if first is None or first._erased:
            first = self._first = next(n for n in self.graph.nodes if n.op in ("call_function", "output"))
        return first

    def set_tensor(self, node: Node, tensor: torch.Tensor, why: str) -> None:
        """Give a weight a new value; names tied to it follow. The old tensor itself is not written to."""
        before = print_node(node, self.model)
        self.params.set(str(node.target), tensor)
        node.meta["val"] = self.model.shapes.fake(self.params[str(node.target)])
        self._touched.add(node)
        self.edits.append(Edit(EditKind.SET_TENSOR, node.name, before, print_node(node, self.model), why))

    def update(self, node: Node, why: str, /, **arguments: Any) -> None:
        """Change arguments of a call, by their schema names."""
        before, inputs = print_node(node, self.model), node.all_input_nodes
        schema = node.target._schema.arguments  # type: ignore[union-attr]  # an overload
        names = [arg.name for arg in schema if not arg.kwarg_only]
        args, kwargs = list(node.args), dict(node.kwargs)
        for name, value in arguments.items():
            # Everything before it goes by position too; a keyword-only argument has no position.
            position = names.index(name) if name in names else None
            while position is not None and len(args) < position and names[len(args)] not in kwargs:
                args.append(argument(node, names[len(args)]))
            if position is not None and position < len(args):
                args[position] = value
            elif position == len(args):
                kwargs.pop(name, None)
                args.append(value)
            else:
                kwargs[name] = value
        node.args, node.kwargs = tuple(args), kwargs
        node.meta["val"] = self.model.shapes.propagate(node)
        self._touched.add(node)
        self.edits.append(Edit(EditKind.UPDATE, node.name, before, print_node(node, self.model), why))
        self._erase_dead(inputs)

    def replace_input(self, node: Node, old: Node, new: Node, why: str) -> None:
        """Let one call use `new` where it used `old`, which other users keep."""
        before = print_node(node, self.model)
        node.replace_input_with(old, new)
        node.meta["val"] = self.model.shapes.propagate(node)
        self._touched.add(node)
        self.edits.append(Edit(EditKind.UPDATE, node.name, before, print_node(node, self.model), why))
        self._erase_dead([old])

    def replace(self, old: Node, new: Node, why: str) -> None:
        """Let every user of `old` use `new`, and drop `old` and what only it used."""
        before = print_node(old, self.model)
        self._touched.update(old.users)
        old.replace_all_uses_with(new)
        self.edits.append(Edit(EditKind.REPLACE, old.name, before, print_node(new, self.model), why))
        self._erase_dead([old])

    def erase(self, node: Node, why: str) -> None:
        """Drop a node without users, and what only it used."""
        if node.users:
            raise GraphoptError(f"'{node.name}' has users and cannot be erased")
        self.edits.append(Edit(EditKind.ERASE, node.name, print_node(node, self.model), "", why))
        inputs = node.all_input_nodes
        self._remove(node)
        self._erase_dead(inputs)

    def discard(self, node: Node) -> None:
        """Take back a call that `call` has inserted and nothing uses, as if it had never been."""
        if node in self._before or node.users:
            raise GraphoptError(f"'{node.name}' is part of the graph and cannot be taken back")
        self._touched.discard(node)
        self.graph.erase_node(node)

    def refresh(self, node: Node) -> None:
        """Infer the value of a call again, after an input of it has got other strides.

        Raises:
            ShapeError: when the operator cannot take its inputs as they are now.
        """
        node.meta["val"] = self.model.shapes.propagate(node)

    def _erase_dead(self, nodes: list[Node]) -> None:
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node._erased or node.users:
                continue
            if node.op == "get_attr" or (node.op == "call_function" and is_pure(node)):
                stack.extend(node.all_input_nodes)
                self._remove(node)

    def _remove(self, node: Node) -> None:
        self.graph.erase_node(node)
        self._removed.add(node)
        if node.op == "get_attr":
            self._forget(str(node.target))

    def _forget(self, name: str) -> None:
        """Drop a tensor that nothing uses any more, under all its names; one that is in use under another stays."""
        self._readers.pop(name, None)
        aliases = self.params.aliases(name)
        if aliases & self._readers.keys():
            self.model.kept.add(name)
            return
        for alias in aliases:
            self.params.remove(alias)
            self.model.kept.discard(alias)
            # The counter of a batch norm has no meaning without its statistics.
            counter = f"{alias.removesuffix('running_mean')}num_batches_tracked"
            if alias.endswith("running_mean") and counter in self.model.kept:
                self.params.remove(counter)
                self.model.kept.discard(counter)

    def _inherit(self, node: Node, source: Node) -> None:
        for key in ("stack_trace", "nn_module_stack", "path", "source"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        if training_flag(node) is not None and "fixed_mode" in source.meta:
            node.meta["fixed_mode"] = source.meta["fixed_mode"]

    # Checking

    def unjournaled(self) -> str | None:
        """What was changed past the rewriter, in words; None when the journal is complete."""
        for node in self.graph.nodes:
            if node in self._touched:
                continue
            if node not in self._before:
                return f"'{node.name}' was added to the graph"
            target, args, kwargs = self._before[node]
            if node.target is not target or node.args != args or node.kwargs != kwargs:
                return f"the arguments of '{node.name}' were changed"
        for name, (tensor, version) in self._versions.items():
            if tensor._version != version:
                return f"the tensor '{name}' was written to in place"
        for node in self._before:
            if node._erased and node not in self._removed:
                return f"'{node.name}' was erased from the graph"
        return None
