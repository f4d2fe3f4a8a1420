"""Execute an ONNX graph with torch functions, as a module whose parameters carry the ONNX names."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import UnsupportedError
from graphopt.frontends.onnx import call, operators  # noqa: F401  # importing the operators registers them
from graphopt.frontends.onnx.reader import Graph, Node
from graphopt.frontends.onnx.registry import Operator
from graphopt.frontends.onnx.roles import parameters
from graphopt.frontends.onnx.values import Constant, Known, Refusal, Value
from graphopt.params import UNSAFE

__all__ = ["OnnxModule", "argument_names"]


class OnnxModule(nn.Module):
    """An ONNX graph as a module: inputs in the order of the file, a tuple of the outputs or the only one.

    The arguments of `forward` are called as the ONNX inputs, made into Python names.

    A floating-point weight is a parameter, every other stored tensor a buffer, both under their ONNX names. A dot in a
    name makes nested modules, as in `layer1.0.weight`. A name that Python or torch cannot take (one that is
    also the prefix of another, an empty part, an attribute of `nn.Module`) gets its dots, or itself, extended by `_`.

    Raises:
        UnsupportedError: naming every node that graphopt does not handle.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._onnx = graph
        self._plan: list[tuple[Node, Operator]] = []
        self._paths: dict[str, str] = {}
        self._constants: dict[str, Constant] = {n: Constant.of(n, t) for n, t in graph.constants.items()}
        self._check()
        self._take_constants()
        trainable = parameters(graph, {name: constant.tensor for name, constant in self._constants.items()})
        self._fold(trainable)
        self._prefixes = {
            name.rsplit(".", n)[0] for name in self._constants for n in range(1, name.count(".") + 1)
        }  # names of modules that dotted names make
        for name, constant in self._constants.items():
            self._store(name, constant.tensor, trainable=name in trainable)

        self.forward = _with_signature(self._execute, argument_names(graph))

    def _check(self) -> None:
        errors = []
        for node in self._onnx.nodes:
            try:
                self._plan.append((node, call.find(node, self._onnx.opset)))
            except Refusal as error:
                errors.append(call.unsupported(node, self._onnx.opset, self._onnx.source, error.why, error.todo))
        if errors:
            raise _together(errors)

    def _take_constants(self) -> None:
        """Move the values of Constant nodes to the initialisers."""
        for node, entry in self._plan:
            if node.operator == "Constant":
                with self._naming(node):
                    self._constants[node.outputs[0]] = Constant.of(node.outputs[0], entry.function(**node.attributes))
        self._plan = [(node, entry) for node, entry in self._plan if node.operator != "Constant"]

    @torch.no_grad()
    def _fold(self, trainable: set[str]) -> None:
        """Compute what depends on constants alone, so that it can serve as a shape; never across a parameter."""
        rest = []
        for node, entry in self._plan:
            inputs = [self._constants.get(name) for name in node.inputs if name]
            if any(value is None or value.name in trainable for value in inputs):
                rest.append((node, entry))
                continue
            with self._naming(node):
                results = call.run(node, entry, self._values(node, {}), lambda constant: constant.tensor)
            for name, value in zip(node.outputs, results, strict=False):
                self._constants[name] = Constant.of(name, _as_tensor(value))
        self._plan = rest

    def _values(self, node: Node, env: Mapping[str, Value]) -> list[Value | None]:
        return [None if not name else env[name] if name in env else self._constants[name] for name in node.inputs]

    def _store(self, name: str, tensor: Tensor, *, trainable: bool) -> None:
        owner, leaf = self._place(name)
        if trainable:
            owner.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            owner.register_buffer(leaf, tensor)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        parts = UNSAFE.sub("_", name).split(".")
        if not all(parts) or any(".".join(parts[:n]) in self._constants for n in range(1, len(parts))):
            parts = ["_".join(parts)]
        owner: nn.Module = self
        for part in parts[:-1]:
            if part not in owner._modules:
                while hasattr(owner, part):
                    part += "_"
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        leaf = parts[-1] + "_" if name in self._prefixes else parts[-1]
        while hasattr(owner, leaf):
            leaf += "_"
        self._paths[name] = ".".join([*parts[:-1], leaf])
        return owner, leaf

    def _load(self, constant: Constant) -> Tensor:
        owner, _, leaf = self._paths[constant.name].rpartition(".")
        found = getattr(self.get_submodule(owner), leaf)
        assert isinstance(found, Tensor)
        return found

    def _execute(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        env: dict[str, Value] = {spec.name: x for spec, x in zip(self._onnx.inputs, inputs, strict=True)}
        for node, entry in self._plan:
            with self._naming(node):
                results = call.run(node, entry, self._values(node, env), self._load)
            env.update(zip(node.outputs, results, strict=False))
        outputs = tuple(self._output(name, env) for name in self._onnx.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _output(self, name: str, env: Mapping[str, Value]) -> Tensor:
        value = env[name] if name in env else self._constants[name]
        if isinstance(value, Constant):
            return self._load(value)
        return value.tensor() if isinstance(value, Known) else value

    def _sources(self, name: str) -> tuple[str, ...]:
        """The graph inputs that a value is computed from, those left out of which it takes the shape only."""
        producers = {output: node for node, _ in self._plan for output in node.outputs if output}
        inputs = {spec.name for spec in self._onnx.inputs}
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            current = waiting.pop()
            node = producers.get(current)
            if current in seen or (node is not None and node.operator in ("Shape", "Size")):
                continue
            seen.add(current)
            waiting += [] if node is None else [source for source in node.inputs if source]
        return tuple(sorted(seen & inputs))

    @contextmanager
    def _naming(self, node: Node) -> Iterator[None]:
        """Put the node's name into whatever its execution raises."""
        try:
            yield
        except Refusal as error:
            wrong = call.unsupported(node, self._onnx.opset, self._onnx.source, error.why, error.todo)
            raise (call.UnknownValue(wrong, self._sources(error.unknown)) if error.unknown else wrong) from error
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            why = f"torch cannot run it: {str(error).strip().splitlines()[0] if str(error).strip() else type(error)}"
            raise call.unsupported(node, self._onnx.opset, self._onnx.source, why) from error


def argument_names(graph: Graph) -> list[str]:
    """The names of the inputs as distinct Python names."""
    names: list[str] = []
    for spec in graph.inputs:
        name = re.sub(r"\W", "_", spec.name)
        name = f"input_{name}" if not name or name[0].isdigit() else name
        while name in names or keyword.iskeyword(name):
            name += "_"
        names.append(name)
    return names


def _with_signature(run: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])

    def forward(*args: Tensor, **kwargs: Tensor) -> Any:
        return run(*signature.bind(*args, **kwargs).args)

    forward.__signature__ = signature  # type: ignore[attr-defined]  # read by inspect.signature and torch.export
    return forward


def _as_tensor(value: Value) -> Tensor:
    return value.tensor() if isinstance(value, Known) else value.tensor if isinstance(value, Constant) else value


def _together(errors: list[UnsupportedError]) -> UnsupportedError:
    """One error for all nodes, the first one's advice kept."""
    unique = {error.what: error for error in errors}
    first = errors[0]
    more = [f"{error.what} at {error.where}" for error in list(unique.values())[1:]]
    return UnsupportedError(
        first.what, where=first.where, why="; ".join(["also: " + m for m in more]) or None, todo=first.todo
    )
