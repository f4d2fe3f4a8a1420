"""Finding the numbers of a module that has got other tensors, until it computes what the model does.

The module is run, and what each part of it returns is compared with what the graph has computed there. Where it stops
or differs, attributes of that part that may have counted positions are tried, the fewest first.
"""

from __future__ import annotations

import linecache
import math
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError
from graphopt.model import Model
from graphopt.ops import argument
from graphopt.printer import is_users, module_path, print_node, source_line
from graphopt.surgery.module_numbers import Numbers, choices, facts, is_derived, nodes_below
from graphopt.surgery.module_runs import Calls, agree, near, record, run_module

__all__ = ["Settled", "settle"]

_TODO = (
    "let the code read the number off a tensor's shape or off an integer attribute of the module that owns the "
    "weights, or prune without the group (`graphopt groups`; prune-channels{leave=...})"
)


@dataclass
class Settled:
    """What had to be changed besides the tensors: attributes, and products that had to be scaled, by path."""

    numbers: Numbers = field(default_factory=dict)
    scaled: dict[str, float] = field(default_factory=dict)


@dataclass
class _Failure:
    """Where a run ended: paths of the modules to suspect, innermost first, and how many calls came before."""

    suspects: list[str]
    done: int
    error: Exception | None = None


class _Differs(Exception):
    """A part of the module has returned something else than the graph."""


def settle(model: Model, original: nn.Module, module: nn.Module, inputs: Sequence[Tensor]) -> Settled:
    """Change numbers of `module`, which has the model's tensors in the place of the original's, until it agrees.

    Raises:
        UnsupportedError: when no change does; it says which line of the user's stands in the way.
    """
    return _Search(model, original, module, inputs).run()


class _Search:
    def __init__(self, model: Model, original: nn.Module, module: nn.Module, inputs: Sequence[Tensor]) -> None:
        self.model, self.module, self.inputs = model, module, inputs
        self.paths = {id(part): path for path, part in module.named_modules()}
        self.agreed: set[str] = set()
        self.settled = Settled()
        self.open: dict[str, dict[int, set[int]]] = {}
        for path, part in module.named_modules():
            sizes = facts(original.get_submodule(path), part)
            if not is_derived(part) and (sizes or self._given_scales(path)):
                self.open[path] = sizes

    def run(self) -> Settled:
        if self._is_right():
            return self.settled
        while (failure := self._attempt({*self.open, ""})) is not None:
            if not any(self._decide(path, failure) for path in failure.suspects if path in self.open):
                raise self._refusal(failure)
        return self.settled

    # Running

    def _is_right(self) -> bool:
        """Whether nothing has to be changed, which is the ordinary case and needs no values of the graph to be kept."""
        try:
            outputs = run_module(self.model, self.module, self.inputs)
        except Exception:  # told apart by the search
            return False
        with torch.no_grad():
            expected = self.model.call_flat(self.inputs)
        return len(outputs) == len(expected) and all(map(near, outputs, expected))

    def _attempt(self, watched: set[str]) -> _Failure | None:
        """Run the module and compare what the watched parts return; None when all is right."""
        self.agreed, calls = set(), Calls()

        def completed(part: nn.Module, _: Any, output: Any) -> None:
            path = self.paths[id(part)]
            if path in watched and (expected := self._values(path)):
                with calls.uncounted():
                    if not agree(output, expected):
                        raise _Differs(path)
                self.agreed.add(path)

        handles = [part.register_forward_hook(completed) for part in self.module.modules()]
        try:
            with calls:
                run_module(self.model, self.module, self.inputs)
        except _Differs as difference:
            path = str(difference)
            blind = [p for p in self.open if p.startswith(f"{path}." if path else "") and p not in self.agreed]
            return _Failure(list(dict.fromkeys([path, *blind])), calls.done)
        except Exception as error:  # whatever the user's code raises on sizes that it does not expect
            return _Failure(list(dict.fromkeys(path for path, _ in self._frames(error))), calls.done, error)
        finally:
            for handle in handles:
                handle.remove()
        return None

    def _frames(self, error: Exception) -> list[tuple[str, str]]:
        """Path of the module and the user's line, empty in other code, of each frame of an error, innermost first."""
        found, path = [], None
        for frame, number in traceback.walk_tb(error.__traceback__):
            path = self.paths.get(id(frame.f_locals.get("self")), path)
            file = frame.f_code.co_filename
            if path is not None:
                line = f"{file}:{number}: {linecache.getline(file, number).strip()}" if is_users(file) else ""
                found.append((path, line))
        return found[::-1]

    def _values(self, path: str) -> list[Tensor]:
        """What the graph hands on from the calls of a module."""
        if path not in self._cache:
            nodes = set(nodes_below(self.model, path))
            self._cache[path] = [
                self._recorded[node]
                for node in nodes
                if node in self._recorded and any(user not in nodes for user in node.users)
            ]
        return self._cache[path]

    @cached_property
    def _cache(self) -> dict[str, list[Tensor]]:
        return {}

    @cached_property
    def _recorded(self) -> dict[fx.Node, Tensor]:
        return record(self.model, self.inputs)

    # Choosing

    def _decide(self, path: str, failure: _Failure) -> bool:
        """Keep the first choice of numbers with which a part is right, else the one that comes furthest."""
        part, sizes = self.module.get_submodule(path), self.open[path]
        furthest, most = None, failure.done
        wrong: list[dict[str, Any]] = [{}] if failure.error is None else []
        for choice in choices(part, sizes, nodes_below(self.model, path)):
            with _set(part, choice):
                result = self._attempt({*self.open, ""})
            if result is None or path in self.agreed:
                return self._keep(path, choice)
            if result.error is None and result.suspects[0] == path:
                wrong.append(choice)
            elif path not in result.suspects[:1] and result.done > most:
                furthest, most = choice, result.done
        for choice in wrong:
            with _set(part, choice):
                scaled = self._scale(path, sizes)
            if scaled:
                return self._keep(path, choice)
        return furthest is not None and self._keep(path, furthest)

    def _keep(self, path: str, choice: dict[str, Any]) -> bool:
        part = self.module.get_submodule(path)
        for name, value in choice.items():
            self.settled.numbers[path, name] = value
            setattr(part, name, value)
        del self.open[path]
        return True

    def _scale(self, path: str, sizes: dict[int, set[int]]) -> bool:
        """Scale the layer that makes the queries, where attention divides by the root of a number of features that has
        changed: products of queries and keys have to be divided by what it was."""
        part = self.module.get_submodule(path)
        factors = {math.sqrt(n / old) for old, new in sizes.items() for n in new} | self._given_scales(path)
        linear = [(name, layer) for name, layer in part.named_children() if isinstance(layer, nn.Linear)]
        # Queries stand alone, or before keys and values.
        for (name, layer), factor, share in product(linear, sorted(factors), (1, 3)):
            with torch.no_grad(), _multiplied(layer, factor, share) as keep:
                result = self._attempt({*self.open, ""})
                if result is None or path in self.agreed:
                    keep.append(True)
                    self.settled.scaled[f"{path}.{name}" if path else name] = factor
                    return True
        return False

    def _given_scales(self, path: str) -> set[float]:
        """By how much the scales that attention of a module has in the graph differ from torch's own."""
        found = set()
        for node in nodes_below(self.model, path):
            if node.target is torch.ops.aten.scaled_dot_product_attention.default and module_path(node) == path:
                scale, features = argument(node, "scale", None), argument(node, "query").meta["val"].shape[-1]
                found |= {scale * math.sqrt(features)} if isinstance(scale, float) else set()
        return found - {1.0}

    # Refusing

    def _refusal(self, failure: _Failure) -> UnsupportedError:
        if failure.error is not None:
            return self._stopped(failure.error)
        closer = self._attempt({path for path, _ in self.module.named_modules()}) or failure
        path = closer.suspects[0]
        own = [node for node in nodes_below(self.model, path) if module_path(node) == path]
        own = [used for used in (own[0].all_input_nodes if own else []) if used.op == "call_function"] + own
        return UnsupportedError(
            "with the tensors of the model the module computes something else",
            where=self._place(path),
            why=_expected(self.model, own),
            todo=_TODO,
        )

    def _stopped(self, error: Exception) -> UnsupportedError:
        frames = [(path, line) for path, line in self._frames(error) if line] or [("", "")]
        made = ([n for n in nodes_below(self.model, path) if line and source_line(n) == line] for path, line in frames)
        at = next(filter(None, made), [])
        path, line = frames[0]
        return UnsupportedError(
            f"the module cannot run with the tensors of the model: {_first_line(error)}",
            where=f"{self._place(path)}\n{line}".strip(),
            why=_expected(self.model, at),
            todo=_TODO,
        )

    def _place(self, path: str) -> str:
        return (
            f"module '{path}' ({type(self.module.get_submodule(path)).__name__})"
            if path
            else f"the module itself ({type(self.module).__name__})"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _expected(model: Model, nodes: list[fx.Node]) -> str | None:
    """Calls with the numbers that the code has to come to."""
    counted = [node for node in nodes if any(type(leaf) is int for leaf in pytree.tree_leaves(node.args))]
    rows = [print_node(node, model) for node in (counted or nodes)[:4]]
    return "the model has there\n" + "\n".join(rows) if rows else None


@contextmanager
def _set(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def _multiplied(layer: nn.Linear, factor: float, share: int) -> Iterator[list[bool]]:
    """The first rows of a layer times a factor, for good when something is put into the list."""
    rows = layer.out_features // share
    tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
    before = [tensor[:rows].clone() for tensor in tensors]
    keep: list[bool] = []
    for tensor in tensors:
        tensor[:rows] *= factor
    try:
        yield keep
    finally:
        if not keep:
            for tensor, values in zip(tensors, before, strict=True):
                tensor[:rows] = values
