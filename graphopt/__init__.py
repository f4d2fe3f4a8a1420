"""graphopt: a compiler for shrinking and deploying neural networks.

Importing this package costs nothing: every name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.backends.tvm.tune.tuning import tune
    from graphopt.diff import GraphDiff, diff
    from graphopt.errors import GraphoptError
    from graphopt.frontends import load, save
    from graphopt.frontends.torch import capture
    from graphopt.model import Model
    from graphopt.passes._sensitivity import sensitivity
    from graphopt.pipeline import Pipeline, run
    from graphopt.search import search
    from graphopt.surgery import write_back
    from graphopt.target import Target
    from graphopt.transform import Contract, Pass, Report

__version__ = "0.1.0"

_HOMES = {
    "Contract": "transform",
    "GraphDiff": "diff",
    "GraphoptError": "errors",
    "Model": "model",
    "Pass": "transform",
    "Pipeline": "pipeline",
    "Report": "transform",
    "Target": "target",
    "build": "backend",
    "capture": "frontends.torch",
    "diff": "diff",
    "load": "frontends",
    "run": "pipeline",
    "save": "frontends",
    "search": "search",
    "sensitivity": "passes._sensitivity",
    "tune": "backends.tvm.tune.tuning",
    "write_back": "surgery",
}

__all__ = [
    "Contract",
    "GraphDiff",
    "GraphoptError",
    "Model",
    "Pass",
    "Pipeline",
    "Report",
    "Target",
    "build",
    "capture",
    "diff",
    "load",
    "run",
    "save",
    "search",
    "sensitivity",
    "tune",
    "write_back",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(import_module(f"graphopt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
