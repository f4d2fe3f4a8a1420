"""Passes by name. Files of `graphopt.passes` are found by their file names, other people's by entry points; a pass is
imported when it is first asked for."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from graphopt.errors import GraphoptError, UsageError
from graphopt.names import nearest
from graphopt.transform import Pass

__all__ = ["GROUP", "PRESETS", "get_pass", "home_of", "pass_names"]

GROUP = "graphopt.passes"
"""Entry-point group of passes: `fold-tanh = "my_package.fold_tanh:FoldTanh"`."""

PRESETS: dict[str, str] = {
    "exact": "repeat(remove-identity,simplify-shapes,fold-constants,common-subexpressions,fuse-affine,"
    "fold-batch-norm,merge-parallel-conv{concat=false},merge-parallel-linear,dead-code)",
}
"""Named pipelines, usable wherever a pass is."""


@cache
def _homes() -> dict[str, str]:
    """Name of every pass -> `module:Class`, or `module` for a file of graphopt.passes."""
    package = importlib.import_module("graphopt.passes")
    homes = {
        name.replace("_", "-"): f"graphopt.passes.{name}"
        for _, name, is_package in pkgutil.iter_modules(package.__path__)
        if not name.startswith("_") and not is_package
    }
    for point in entry_points(group=GROUP):
        if point.name in homes and homes[point.name] != point.value:
            raise GraphoptError(f"two passes are called '{point.name}': {homes[point.name]} and {point.value}")
        homes[point.name] = point.value
    return homes


def pass_names() -> list[str]:
    """All passes that can be used in a pipeline, presets left out."""
    return sorted(_homes())


def home_of(name: str) -> str:
    """Where a pass lives: `module`, or `module:Class`. Imports no pass.

    Raises:
        UsageError: when no pass has that name.
    """
    home = _homes().get(name)
    if home is None:
        raise UsageError(f"there is no pass '{name}'", todo=nearest(name, [*pass_names(), *PRESETS]))
    return home


@cache
def get_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        UsageError: when no pass has that name.
        GraphoptError: when its home holds no such class.
    """
    home = home_of(name)
    path, _, class_name = home.partition(":")
    module = importlib.import_module(path)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Pass) and vars(value).get("name") == name
    ]
    if class_name:
        found = [value for value in found if value.__name__ == class_name]
    if len(found) != 1:
        raise GraphoptError(f"'{home}' holds {len(found)} passes called '{name}', not one")
    return found[0]
