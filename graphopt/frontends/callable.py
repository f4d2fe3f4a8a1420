"""Models made by a Python function of the user's, named `module:callable`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphopt.errors import LoadError
from graphopt.frontends.torch import capture, user_line
from graphopt.model import Model

__all__ = ["load_callable"]


def load_callable(name: str) -> Model:
    """Call `module:callable` and capture what it returns: `(nn.Module, args)`, or with a third item `(..., dynamic)`.

    `args` is a tuple of positional example inputs, or a dict of keyword ones.

    Raises:
        LoadError: when the module or the function does not exist, fails, or returns something else.
    """
    path, _, function = name.partition(":")
    if not path or not function:
        raise LoadError(f"'{name}' is not module:callable", todo="name both, such as my_nets:make_classifier")
    try:
        home = importlib.import_module(path)
    except Exception as error:  # the module is the user's and may fail in any way
        raise _failed(f"the module '{path}' of '{name}' cannot be imported", error) from error
    make = getattr(home, function, None)
    if not callable(make):
        raise LoadError(f"the module '{path}' has no function '{function}'")
    try:
        made = make()
    except Exception as error:  # so may the function
        raise _failed(f"'{name}' failed", error) from error
    return capture_returned(made, name)


def _failed(what: str, error: Exception) -> LoadError:
    return LoadError(what, where=user_line(error) or None, why=f"{type(error).__name__}: {error}")


def capture_returned(made: Any, name: str) -> Model:
    """Capture the value that such a function returned."""
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise LoadError(
            f"'{name}' returned a {type(made).__name__}, not (nn.Module, example_inputs)",
            todo="return the module and a tuple (or dict) of example inputs, and optionally the `dynamic` of capture()",
        )
    module, inputs, *rest = made
    dynamic = rest[0] if rest else None
    if isinstance(inputs, Mapping):
        return capture(module, (), inputs, dynamic=dynamic)
    return capture(module, inputs if isinstance(inputs, tuple | list) else (inputs,), dynamic=dynamic)
