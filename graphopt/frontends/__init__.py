"""The ways into and out of a Model: `.gopt`, `.pt2` and `.onnx` files, and Python callables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import LoadError, UsageError

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["FORMATS", "load", "save"]

FORMATS = (".gopt", ".pt2", ".onnx")


def load(source: str | os.PathLike[str], *, mapped: bool = False) -> Model:
    """Read a model from a file, or from `module:callable`, a function that returns `(nn.Module, example_inputs)`.

    Args:
        mapped: leave the weights of a `.gopt` file on disk until they are looked at, and large new ones on disk as
            well; damage to the file's is not noticed.

    Raises:
        LoadError: for a missing, damaged or foreign file.
        UnsupportedError: when the model has something graphopt does not handle.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.suffix not in FORMATS and ":" in text and not path.exists():
        from graphopt.frontends.callable import load_callable

        if "" not in sys.path:
            sys.path.insert(0, "")
        return load_callable(text)
    if path.suffix not in FORMATS:
        raise LoadError(f"'{text}' is no model file: the suffix is none of {', '.join(FORMATS)}")
    if not path.exists():
        raise LoadError(f"there is no file '{text}'")
    options = {"mapped": True} if mapped and path.suffix == ".gopt" else {}
    model: Model = _function(path.suffix, "load")(path, **options)
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model; the suffix chooses the format.

    Raises:
        UsageError: for an unknown suffix, or when the file cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in FORMATS:
        raise UsageError(f"'{os.fspath(path)}' has none of the suffixes {', '.join(FORMATS)}")
    _function(suffix, "save")(model, Path(path))


def _function(suffix: str, verb: str) -> Callable[..., Any]:
    home = {
        ".gopt": "graphopt.archive",
        ".pt2": "graphopt.frontends.pt2",
        ".onnx": "graphopt.frontends.onnx" if verb == "load" else "graphopt.frontends.onnx.writer",
    }[suffix]
    function: Callable[..., Any] = getattr(import_module(home), f"{verb}_{suffix[1:]}")
    return function
