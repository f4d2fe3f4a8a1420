"""`.pt2` files of `torch.export.save`."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from graphopt.errors import LoadError
from graphopt.export import from_exported_program, to_exported_program
from graphopt.files import write_whole
from graphopt.model import Model
from graphopt.ops import argument, lookup
from graphopt.verify import verify

__all__ = ["load_pt2", "save_pt2"]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_pt2(path: Path) -> Model:
    """Read an exported program; no object in it is unpickled beyond plain tensors.

    Raises:
        LoadError: for a damaged file, or one that holds pickled objects.
    """
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
            program = torch.export.load(path)
    except Exception as error:
        text = str(error).strip()
        raise LoadError(
            f"'{path}' cannot be read as an exported program",
            why=text.splitlines()[0] if text else type(error).__name__,
        ) from error
    training = any(
        (info := lookup(node.target)) is not None and info.training and argument(node, info.training)
        for node in program.graph.nodes
        if node.op == "call_function"
    )
    model = from_exported_program(program, mode="train" if training else "eval")
    verify(model)
    return model


def save_pt2(model: Model, path: Path) -> None:
    """Write `model` as an exported program."""
    # Through memory: on a full disk torch's own file writer fails again in its destructor, which ends the process.
    buffer = io.BytesIO()
    torch.export.save(to_exported_program(model), buffer)
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
