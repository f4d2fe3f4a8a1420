"""The one intermediate representation: an ATen graph with real parameters, its signature and its history."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import InputError
from graphopt.fake import Shapes, dtype_name
from graphopt.params import ParamKind, ParamTable
from graphopt.signature import ConstSpec, Signature, TensorSpec

__all__ = ["Mode", "Model", "empty_module", "output_leaves"]

Mode = Literal["train", "eval"]


class Model:
    """A captured network.

    `module` is an ordinary trainable GraphModule; `signature` says what goes in and out; `mode` is `train` or `eval`;
    `params` are its tensors by name; `kept` names the tensors that no operator uses but that belong to the user's
    `state_dict`; `history` lists the passes that were applied; `example` holds one set of flat tensor inputs.

    Make one with `graphopt.capture` or `graphopt.load`; change one with `graphopt.run`.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        signature: Signature,
        shapes: Shapes,
        *,
        mode: Mode = "eval",
        kept: Iterable[str] = (),
        history: Sequence[str] = (),
        example: Sequence[torch.Tensor] = (),
    ) -> None:
        self._module = module
        self._stale = False
        self.signature = signature
        self.shapes = shapes
        self.mode: Mode = mode
        self.kept = set(kept)
        self.history = tuple(history)
        self.example = tuple(example)
        self.params = ParamTable(module)

    @property
    def module(self) -> fx.GraphModule:
        """The trainable GraphModule; its code is brought up to date with the graph first."""
        if self._stale:
            self._module.recompile()
            self._stale = False
        return self._module

    @property
    def graph(self) -> fx.Graph:
        return self._module.graph

    def touch(self) -> None:
        """Note that the graph has changed, so that its code is generated again before the next call."""
        self._stale = True

    @property
    def in_spec(self) -> pytree.TreeSpec:
        """Structure of `(args, kwargs)`."""
        spec: pytree.TreeSpec = self._codegen.pytree_info.in_spec
        return spec

    @property
    def out_spec(self) -> pytree.TreeSpec:
        """Structure of the returned value."""
        spec: pytree.TreeSpec = self._codegen.pytree_info.out_spec
        return spec

    @property
    def _codegen(self) -> Any:
        return self.graph._codegen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as the module it came from is called.

        Raises:
            InputError: when structure, dtype or shape of the inputs differ from the signature.
        """
        flat = self.flatten_inputs(args, kwargs)
        bound_args, bound_kwargs = pytree.tree_unflatten(flat, self.in_spec)
        return self.module(*bound_args, **bound_kwargs)

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """All leaves of the inputs in the order of `signature.inputs`, checked against it."""
        args, kwargs = self._bind(args, kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise InputError(
                f"the inputs have the structure {_structure(spec)}, the model takes {_structure(self.in_spec)}",
                todo="call the model as the example inputs were given to capture()",
            )
        given = []
        for leaf, value in zip(self.signature.inputs, flat, strict=True):
            if isinstance(leaf, ConstSpec):
                if isinstance(value, torch.Tensor) or value != leaf.value:
                    raise InputError(
                        f"input '{leaf.name}' is {value!r}, the model was captured with {leaf.value!r}",
                        todo="capture the model again with this value",
                    )
            elif not isinstance(value, torch.Tensor):
                raise InputError(f"input '{leaf.name}' is a {type(value).__name__}, the model takes a tensor")
            else:
                given.append((dtype_name(value.dtype), tuple(value.shape)))
        self.signature.check(given)
        return flat

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Move arguments between position and keyword so that they stand as they stood at capture."""
        names = list(self._codegen.pytree_info.orig_args)
        positional, keywords = self.in_spec.children()
        given = dict(zip(names, args, strict=False)) | kwargs
        if len(names) != positional.num_children + keywords.num_children or set(given) != set(names):
            return args, kwargs
        if len(args) + len(kwargs) != len(names):
            return args, kwargs
        count = positional.num_children
        return tuple(given[name] for name in names[:count]), {key: given[key] for key in keywords.context}

    def call_flat(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run on the flat tensor inputs and return the flat tensor outputs, constants left out on both sides."""
        flat = iter(tensors)
        leaves = [next(flat) if isinstance(spec, TensorSpec) else spec.value for spec in self.signature.inputs]
        if self._stale:
            # Code for 10,000 nodes takes a second to make; a model that changes again after one call walks its graph.
            results = fx.Interpreter(self._module).run(*leaves, enable_io_processing=False)
        else:
            args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
            results = self._module(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, torch.Tensor)]

    def train(self) -> Model:
        """Set every training flag, as `nn.Module.train` does; returns the model itself."""
        from graphopt.mode import set_mode

        set_mode(self, "train")
        return self

    def eval(self) -> Model:
        """Clear every training flag, as `nn.Module.eval` does; returns the model itself."""
        from graphopt.mode import set_mode

        set_mode(self, "eval")
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self._module.named_parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._module.state_dict())

    def clone(self, *, share_tensors: bool = False) -> Model:
        """A copy with a graph of its own, and with tensors of its own unless `share_tensors`."""
        module = empty_module()
        copy_graph(self.graph, module.graph)
        copy = Model(
            module,
            self.signature,
            self.shapes,
            mode=self.mode,
            kept=self.kept,
            history=self.history,
            example=self.example,
        )
        copies: dict[int, torch.Tensor] = {}
        for name, tensor, kind in _entries(self.params):
            if share_tensors:
                copy.params.add(name, tensor, kind)
                continue
            if id(tensor) not in copies:
                copies[id(tensor)] = _copy_tensor(tensor)
            copy.params.add(name, copies[id(tensor)], kind)
        copy.params.masks = dict(self.params.masks)
        copy.params.precision = dict(self.params.precision)
        copy.params.mapped = self.params.mapped
        copy.touch()
        return copy

    def own_tensors(self, other: Model) -> None:
        """Copy every tensor still shared with `other`, so that training one leaves the other as it is."""
        theirs = {id(tensor) for _, tensor, _ in _entries(other.params)}
        for name, tensor, _ in list(_entries(self.params)):
            if id(tensor) in theirs and id(self.params[name]) == id(tensor):
                self.params.set(name, _copy_tensor(tensor))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the model; the suffix chooses the format: `.gopt`, `.pt2` or `.onnx`."""
        from graphopt.frontends import save

        save(self, path)

    def __str__(self) -> str:
        from graphopt.printer import print_model

        return print_model(self)

    def __repr__(self) -> str:
        calls = sum(node.op == "call_function" and node.target is not operator.getitem for node in self.graph.nodes)
        return f"<graphopt.Model: {calls} operators, {len(self.params)} tensors, {self.mode}, {self.signature}>"


def output_leaves(graph: fx.Graph) -> list[Any]:
    """The flat outputs: nodes, and values that are part of the model."""
    output = next(node for node in graph.nodes if node.op == "output")
    return list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]


def empty_module() -> fx.GraphModule:
    """A GraphModule without tensors and nodes."""
    return fx.GraphModule({}, fx.Graph(), class_name="Model")


def copy_graph(graph: fx.Graph, into: fx.Graph) -> None:
    """Put the same nodes under the same names, with metadata of their own, into a graph that is empty."""
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = into.node_copy(node, mapping.__getitem__)
    into._codegen = graph._codegen


def _entries(params: ParamTable) -> Iterator[tuple[str, torch.Tensor, ParamKind]]:
    return ((entry.name, entry.tensor, entry.kind) for entry in params.entries())


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _structure(spec: pytree.TreeSpec) -> str:
    args, kwargs = pytree.tree_unflatten(["*"] * spec.num_leaves, spec)
    parts = [str(arg).replace("'*'", "*") for arg in args]
    parts += [f"{key}={str(value).replace(chr(39) + '*' + chr(39), '*')}" for key, value in kwargs.items()]
    return f"({', '.join(parts)})"
