"""`.pt2` files of `torch.export.save`. Ours hold one more file, `graphopt.json`: the names and conditions of the
signature, which an exported program does not keep.
"""

from __future__ import annotations

import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.export import from_exported_program, to_exported_program
from graphopt.files import write_whole
from graphopt.model import Model
from graphopt.ops import argument, lookup
from graphopt.signature import Signature
from graphopt.verify import verify

__all__ = ["load_pt2", "save_pt2"]

_RECORD = "graphopt.json"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_pt2(path: Path) -> Model:
    """Read an exported program; no object in it is unpickled beyond plain tensors.

    Raises:
        LoadError: for a damaged file, or one that holds pickled objects.
    """
    program, recorded = _read(path)
    training = any(
        (info := lookup(node.target)) is not None and info.training and argument(node, info.training)
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    try:
        model = from_exported_program(program, mode="train" if training else "eval", **_names(recorded))
    except (ValueError, IndexError) as error:
        if recorded is None:
            raise
        raise LoadError(f"'{path}' is damaged: its {_RECORD} does not fit its graph", why=str(error)) from error
    if recorded is not None and recorded.ranges.keys() == model.signature.ranges.keys():
        model.signature = replace(model.signature, ranges=recorded.ranges, conditions=recorded.conditions)
    verify(model)
    return model


def _read(path: Path) -> tuple[torch.export.ExportedProgram, Signature | None]:
    """The program, and the signature that was saved with it if graphopt wrote the file."""
    extra = {_RECORD: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise LoadError(f"'{path}' is no .pt2 file", why=str(error)) from error
    objects = [name for name in names if "custom_obj" in name or "opaque" in name]
    if objects:
        raise LoadError(f"'{path}' holds the pickled object {objects[0]}", why="unpickling runs code from the file")
    try:
        with _tensors_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path, extra_files=extra)
        recorded = Signature.from_json(json.loads(extra[_RECORD])) if extra[_RECORD] else None
    except Exception as error:
        text = str(error).strip()
        raise LoadError(
            f"'{path}' cannot be read as an exported program",
            why=text.splitlines()[0] if text else type(error).__name__,
        ) from error
    return program, recorded


def _names(signature: Signature | None) -> dict[str, Any]:
    """What `from_exported_program` takes, from a signature; a size made of several names is named by others."""
    if signature is None:
        return {}
    dims = {
        (position, axis): found[0]
        for position, spec in enumerate(signature.tensor_inputs)
        for axis, dim in enumerate(spec.dims)
        if len(found := [name for name in re.findall(r"\w+", str(dim)) if name in signature.ranges]) == 1
    }
    inputs, outputs = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
    return {"dim_names": dims, "input_names": inputs, "output_names": outputs}


def save_pt2(model: Model, path: Path) -> None:
    """Write `model` as an exported program."""
    # Through memory: on a full disk torch's own file writer fails again in its destructor, which ends the process.
    buffer = io.BytesIO()
    record = json.dumps(model.signature.to_json(), indent=1)
    torch.export.save(to_exported_program(model), buffer, extra_files={_RECORD: record})
    with write_whole(path) as scratch:
        scratch.write_bytes(buffer.getbuffer())


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make every `torch.load` inside refuse what is no tensor; torch's own loader would fall back to pickle."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
