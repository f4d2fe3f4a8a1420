"""`.gopt` files: the graph as JSON, the tensors as safetensors, the rest in `model.json`. A folder or a zip file.

model.json           schema, versions, signature, mode, history, kinds and ties of the tensors, sizes of the example
graph.json           the operators, without weights
weights.safetensors  every tensor once
example.safetensors  integer and boolean example inputs, which say what indices are legal
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from safetensors.torch import save_file
from torch import nn
from torch.utils import _pytree as pytree

from graphopt import __version__
from graphopt.errors import GraphoptError, LoadError, UnsupportedError
from graphopt.export import example_sizes, make_codegen
from graphopt.fake import Shapes
from graphopt.files import write_whole
from graphopt.graph_json import graph_from_json, graph_to_json
from graphopt.mapped import map_tensors
from graphopt.model import Model, empty_module
from graphopt.params import ParamKind
from graphopt.sample import sample_inputs
from graphopt.signature import Signature
from graphopt.verify import verify

__all__ = ["SCHEMA", "load_gopt", "save_gopt"]

SCHEMA = 1
"""Version of the format; a reader takes this one only."""

_WEIGHTS = "weights.safetensors"
_FILES = ("model.json", "graph.json", _WEIGHTS, "example.safetensors")


def save_gopt(model: Model, path: Path) -> None:
    """Write `model`; a folder when `path` is one already, else a zip file. Two writes of one model are equal bytes.

    Weights go from where they are to the file: no copy of them is made in memory.
    """
    contents, tensors = _contents(model)
    with write_whole(path) as scratch:
        folder = scratch if path.is_dir() else scratch.parent / "parts"
        folder.mkdir()
        for name, data in contents.items():
            (folder / name).write_bytes(data)
        with _dtypes_told(tensors):
            try:
                save_file(tensors, folder / _WEIGHTS)
            except SafetensorError as error:  # what the system said, in words
                raise OSError(str(error).rpartition("error: ")[2]) from error
        if folder is scratch:
            return
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
            for name in _FILES:
                # ZipInfo's default date keeps the bytes the same.
                with (
                    (folder / name).open("rb") as source,
                    archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as to,
                ):
                    shutil.copyfileobj(source, to, 2**20)


def load_gopt(path: Path, *, mapped: bool = False) -> Model:
    """Read a model and verify it.

    Args:
        mapped: leave the weights on disk until they are looked at, unchecked, for models larger than memory; what
            passes make of them goes to scratch files.

    Raises:
        LoadError: for a missing part, damaged JSON or tensors, another schema, or a graph that does not verify.
    """
    data = _read(path, _FILES if not mapped else tuple(name for name in _FILES if name != _WEIGHTS))
    try:
        header = json.loads(data["model.json"])
        if header.get("schema") != SCHEMA:
            raise LoadError(
                f"'{path}' has schema {header.get('schema')!r}, this version reads {SCHEMA}",
                todo=f"it was written by graphopt {header.get('versions', {}).get('graphopt', '?')}",
            )
        weights = map_tensors(path, _WEIGHTS) if mapped else None
        if weights is None:
            weights = tensors_from_bytes(data.get(_WEIGHTS) or _read(path, (_WEIGHTS,))[_WEIGHTS])
        model = _assemble(header, json.loads(data["graph.json"]), weights, data["example.safetensors"], mapped)
        verify(model)
    except LoadError:
        raise
    except GraphoptError as error:
        raise LoadError(f"'{path}' holds no valid model: {error.what}", where=error.where) from error
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise LoadError(f"'{path}' is damaged", why=f"{type(error).__name__}: {error}") from error
    return model


def _contents(model: Model) -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """All files but that of the weights, and these."""
    tensors, kinds, aliases = _tensors(model)
    header = {
        "schema": SCHEMA,
        "versions": {"graphopt": __version__, "torch": torch.__version__},
        "signature": model.signature.to_json(),
        "arguments": list(model.graph._codegen.pytree_info.orig_args),  # type: ignore[attr-defined]  # set at capture
        "mode": model.mode,
        "history": list(model.history),
        "kept": sorted(model.kept),
        "tensors": kinds,
        "aliases": aliases,
        "precision": dict(sorted(model.params.precision.items())),
        "example_sizes": example_sizes(model),
        "single": sorted(model.shapes.names[symbol] for symbol in model.shapes.single),
    }
    example = {
        f"{position}": tensor.contiguous()
        for position, tensor in enumerate(model.example)
        if not tensor.is_floating_point() and not tensor.is_complex()
    }
    with _dtypes_told(example):
        packed = bytes(tensors_to_bytes(example))
    files = {"model.json": _json(header), "graph.json": _json(graph_to_json(model)), "example.safetensors": packed}
    return files, tensors


def _tensors(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, list[Any]], dict[str, str]]:
    """Every tensor once by its first name, [kind, requires_grad] of all names, and the first name of each alias."""
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, list[Any]] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for entry in model.params.entries():
        kinds[entry.name] = [entry.kind.value, entry.tensor.requires_grad]
        name = first.setdefault(id(entry.tensor), entry.name)
        if name != entry.name:
            aliases[entry.name] = name
        else:
            tensors[f"tensor/{name}"] = entry.tensor.detach().contiguous()
    for name, mask in model.params.masks.items():
        tensors[f"mask/{name}"] = mask.contiguous()
    return tensors, kinds, aliases


@contextmanager
def _dtypes_told(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """A refusal of safetensors as one of ours."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
        raise UnsupportedError(
            "a tensor has a dtype that .gopt cannot hold", why=f"{error}; dtypes: {dtypes}"
        ) from error


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    try:
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in names}
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in names}
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise LoadError(
            f"'{path}' is no .gopt model", why=str(error), todo="it is damaged, or another kind of file: save it again"
        ) from error


def _assemble(
    header: Mapping[str, Any],
    graph: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    example: bytes,
    mapped: bool,
) -> Model:
    signature = Signature.from_json(header["signature"])
    wrong = [name for name in header["arguments"] if not str(name).isidentifier()]
    if wrong:  # it becomes a name in the code that torch generates
        raise LoadError(f"{wrong[0]!r} cannot be the name of an argument")
    in_spec, out_spec = (_tree(text) for text in (signature.in_tree, signature.out_tree))
    shapes = Shapes()
    sizes = {
        name: shapes.declare(name, range_, int(header["example_sizes"][name]))
        for name, range_ in signature.ranges.items()
    }
    shapes.single = {symbol for symbol, name in shapes.names.items() if name in header.get("single", ())}
    model = Model(
        empty_module(), signature, shapes, mode=header["mode"], kept=header["kept"], history=header["history"]
    )
    _add_tensors(model, header, weights)
    model.params.mapped = mapped
    model.module.graph = graph_from_json(graph, model, sizes)
    model.graph._codegen = make_codegen(header["arguments"], in_spec, out_spec)
    model.touch()
    model.example = _example(model, header, tensors_from_bytes(example))
    return model


def _add_tensors(model: Model, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    made: dict[str, torch.Tensor] = {}
    for name, (kind, requires_grad) in header["tensors"].items():
        first = header["aliases"].get(name, name)
        if first not in made:
            tensor = tensors[f"tensor/{first}"]
            parameter = ParamKind(kind) is ParamKind.PARAMETER
            made[first] = nn.Parameter(tensor, requires_grad=requires_grad) if parameter else tensor
        model.params.add(name, made[first], ParamKind(kind))
    model.params.masks = {key[5:]: tensor for key, tensor in tensors.items() if key.startswith("mask/")}
    model.params.precision = dict(header["precision"])


def _example(model: Model, header: Mapping[str, Any], stored: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    drawn = sample_inputs(model, sizes=header["example_sizes"])
    return tuple(stored.get(str(position), tensor) for position, tensor in enumerate(drawn))


def _tree(text: str) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except Exception as error:  # torch raises several kinds for a type that is not registered
        raise LoadError(
            "the model takes or returns a structure that this process does not know",
            why=str(error),
            todo="import the module that defines and registers it before loading the model",
        ) from error
