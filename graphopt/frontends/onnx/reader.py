"""Read an ONNX file into a plain graph, refusing what is damaged, unsafe or unknown before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError, UnsupportedError, UsageError
from graphopt.frontends.onnx.dtypes import DTYPES, to_tensor
from graphopt.frontends.onnx.registry import NEWEST_OPSET, OLDEST_OPSET
from graphopt.frontends.onnx.values import Constant, Refusal, refuse

__all__ = ["Graph", "InputSpec", "Node", "read_file", "read_model"]


@dataclass(frozen=True)
class Node:
    """One node; `attributes` are Python values: int, float, str, tuples of them, or Constant."""

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def title(self) -> str:
        domain = f"{self.domain}::" if self.domain else ""
        name = f"'{self.name}'" if self.name else f"that computes '{self.outputs[0]}'"
        return f"node {name} ({domain}{self.operator})"


@dataclass(frozen=True)
class InputSpec:
    """A graph input; a dim is its size, a name for a dynamic one, or None for a dynamic one without a name."""

    name: str
    dtype: torch.dtype
    dims: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Graph:
    """A graph of the default ONNX domain: nodes in topological order, constants by value name."""

    opset: int
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, torch.Tensor]
    nodes: tuple[Node, ...]
    source: str = "<memory>"
    initializers: frozenset[str] = field(default_factory=frozenset)
    """The constants that are initialisers, not values of Constant nodes."""


def read_file(path: str | os.PathLike[str], constants: Mapping[str, torch.Tensor] | None = None) -> Graph:
    """Read `path`; `constants` fixes inputs at values.

    Raises:
        LoadError: the file is missing, truncated or no ONNX model, or its external data is missing or lies outside
            its folder.
        UnsupportedError: the opset, a domain, an input type or a stored tensor is one graphopt does not handle.
    """
    import onnx
    from google.protobuf.message import DecodeError

    file = Path(path)
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(file.read_bytes())
    except OSError as error:
        raise LoadError(f"cannot read '{path}'", why=error.strerror, todo="check the path") from error
    except DecodeError as error:
        raise LoadError(
            f"'{path}' is not an ONNX model, or it is truncated",
            why=str(error),
            todo="export or download the file again",
        ) from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.graph.output:
        raise LoadError(
            f"'{path}' is not an ONNX model, or it is truncated",
            why="it holds no graph with outputs",
            todo="export or download the file again",
        )
    return read_model(proto, constants, source=str(path), folder=file.parent)


def read_model(
    proto: Any,
    constants: Mapping[str, torch.Tensor] | None = None,
    *,
    source: str = "<memory>",
    folder: Path | None = None,
) -> Graph:
    """Turn a `ModelProto` into a graph; the errors are those of `read_file`."""
    opset = _check_domains(proto, source)
    if proto.functions:
        import onnx.inliner

        proto = onnx.inliner.inline_local_functions(proto)
    _check_external(proto.graph, source, folder)
    if proto.graph.sparse_initializer:
        raise UnsupportedError(
            "sparse initialisers are not handled", where=source, todo="store the weights as dense tensors"
        )
    fixed = dict(constants or {})
    base = str(folder) if folder is not None else ""
    try:
        stored = {tensor.name: to_tensor(tensor, base) for tensor in proto.graph.initializer}
        nodes = tuple(_node(node, base) for node in proto.graph.node)
    except Refusal as error:
        what = "a stored tensor is not handled"
        raise UnsupportedError(what, where=source, why=error.why, todo=error.todo) from error
    except (ValueError, OSError) as error:
        raise LoadError("a stored tensor is damaged", where=source, why=str(error)) from error
    _check_fixed(fixed, {value.name for value in proto.graph.input} - set(stored), source)
    inputs = [_input(value, source) for value in proto.graph.input if value.name not in stored | fixed]
    _check_order(nodes, {*stored, *fixed, *(spec.name for spec in inputs)}, source)
    return Graph(
        opset=opset,
        inputs=tuple(inputs),
        outputs=tuple(value.name for value in proto.graph.output),
        constants=stored | fixed,
        nodes=nodes,
        source=source,
        initializers=frozenset(stored),
    )


def _check_order(nodes: tuple[Node, ...], known: set[str], source: str) -> None:
    """Refuse nodes that read what nothing before them computes, as in a cycle, and values of one name."""
    for node in nodes:
        missing = [name for name in node.inputs if name and name not in known]
        if missing:
            raise LoadError(
                f"{node.title} reads '{missing[0]}', which nothing before it computes",
                where=source,
                why="the nodes have a cycle or are out of order, or a part of the graph is missing",
                todo="export the model again",
            )
        twice = [name for name in node.outputs if name and name in known]
        if twice:
            raise LoadError(f"{node.title} computes '{twice[0]}', which exists already", where=source)
        known.update(node.outputs)


def _check_fixed(fixed: Mapping[str, torch.Tensor], declared: set[str], source: str) -> None:
    unknown = sorted(set(fixed) - declared)
    if unknown:
        raise UsageError(
            f"the model has no input '{unknown[0]}' to fix",
            where=source,
            todo=f"its inputs are: {', '.join(sorted(declared)) or 'none'}",
        )


def _check_domains(proto: Any, source: str) -> int:
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if "" not in versions and "ai.onnx" not in versions:
        versions[""] = 1 if proto.ir_version < 3 else NEWEST_OPSET
    opset = int(versions.get("", versions.get("ai.onnx", 0)))
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UnsupportedError(
            f"the model uses ONNX opset {opset}; graphopt reads opsets {OLDEST_OPSET} to {NEWEST_OPSET}",
            where=source,
            todo="convert it with onnx.version_converter, or export it again with a supported opset",
        )
    return opset


def _tensors(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph and its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from ([attribute.t] if attribute.HasField("t") else [])
            yield from attribute.tensors
            for subgraph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                yield from _tensors(subgraph)


def _check_external(graph: Any, source: str, folder: Path | None) -> None:
    """Refuse external data that is not a plain file inside the folder of the model, before reading any of it."""
    root = None if folder is None else folder.resolve()
    for tensor in _tensors(graph):
        if tensor.data_location != tensor.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        path = None if root is None else root / location
        if root is None or path is None or not location or not path.resolve().is_relative_to(root):
            raise LoadError(
                f"tensor '{tensor.name}' is stored outside the model's folder, at '{location}'",
                where=source,
                why="a model may only read files that lie next to it",
                todo="put the data file into the model's folder and save the model with a relative path",
            )
        if Path(location).is_absolute() or path.is_symlink() or ".." in Path(location).parts:
            raise LoadError(
                f"tensor '{tensor.name}' is stored under the unsafe path '{location}'",
                where=source,
                why="absolute paths, '..' and symbolic links are refused",
                todo="save the model with a plain relative path",
            )
        if not path.is_file():
            raise LoadError(f"the data file '{location}' of tensor '{tensor.name}' is missing", where=source)


def _input(value: Any, source: str) -> InputSpec:
    where = f"{source}, input '{value.name}'"
    if value.type.WhichOneof("value") != "tensor_type":
        kind = (value.type.WhichOneof("value") or "no").removesuffix("_type")
        raise UnsupportedError(f"an input of {kind} type", where=where, todo="export the model with tensor inputs only")
    tensor = value.type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise UnsupportedError("an input whose element type has no torch dtype", where=where, todo="use a wider type")
    if not tensor.HasField("shape"):
        raise UnsupportedError(
            "an input of unknown rank", where=where, todo="write its shape into the model (names for dynamic dims)"
        )
    dims = [int(d.dim_value) if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    # Some exporters write a dynamic dim as 0 or -1.
    return InputSpec(value.name, DTYPES[tensor.elem_type], tuple(None if d in (0, -1) else d for d in dims))


def _node(node: Any, base: str) -> Node:
    attributes = {attribute.name: _attribute(attribute, base) for attribute in node.attribute}
    domain = "" if node.domain == "ai.onnx" else node.domain
    return Node(node.name, node.op_type, domain, tuple(node.input), tuple(node.output), attributes)


@dataclass(frozen=True)
class Unreadable:
    """An attribute of a kind no operator here takes: a graph, a type, a sparse tensor, a tensor of strings."""

    kind: str


def _attribute(attribute: Any, base: str) -> Any:
    import onnx

    kinds = onnx.AttributeProto
    if attribute.ref_attr_name:
        raise refuse(f"attribute '{attribute.name}' refers to an attribute of a function")
    if attribute.type == kinds.TENSOR:
        if attribute.t.data_type not in DTYPES:
            return Unreadable("tensor of an element type without a torch dtype")
        return Constant.of(attribute.name, to_tensor(attribute.t, base))
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type == kinds.STRINGS:
        return tuple(text.decode("utf-8", "replace") for text in attribute.strings)
    if attribute.type in (kinds.INT, kinds.FLOAT):
        return onnx.helper.get_attribute_value(attribute)
    if attribute.type in (kinds.INTS, kinds.FLOATS):
        return tuple(onnx.helper.get_attribute_value(attribute))
    return Unreadable(kinds.AttributeType.Name(attribute.type).lower())
