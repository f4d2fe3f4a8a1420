"""Capture of a PyTorch module."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import linecache
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError, UsageError
from graphopt.export import export, from_exported_program, hinted, is_unprovable
from graphopt.model import Model
from graphopt.printer import is_users
from graphopt.signature import Signature
from graphopt.verify import verify

__all__ = ["capture", "user_line"]

_RANGE = re.compile(r"(\w+) = Dim\('\w+'(?:, min=(?P<min>\d+))?(?:, max=(?P<max>\d+))?\)")
_SIZE = re.compile(r"(?:(\d+)\s*\*\s*)?([A-Za-z_]\w*)$")


def capture(
    module: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Mapping[str | int, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Model:
    """Trace `module` on example inputs into a Model, in the mode (train or eval) it is in. The module stays as it is.

    Args:
        args, kwargs: example inputs; tensors may sit in dicts, lists, tuples and registered dataclasses.
        dynamic: sizes that stay free, by input name or position: `{"x": {0: "batch"}}`. Equal names are equal sizes;
            `"8*h"` is a multiple; a `torch.export.Dim` gives a range. A model may narrow the range (at most 512
            positions, say); the signature says so, and calls are held to it. For an input that is a structure, the same
            structure of such dicts.
        input_names, output_names: names for the flat inputs and outputs, in place of torch's.

    Raises:
        UsageError: when `dynamic` names no input, or the example inputs do not fit the module.
        UnsupportedError: for data-dependent control flow and what else cannot be traced, with the user's line.
    """
    args, kwargs = tuple(args), dict(kwargs or {})
    inputs = _bind(module, args, kwargs)
    specs = _dynamic_specs(inputs, dynamic or {}, {})
    given = pytree.tree_leaves((args, kwargs))
    args, kwargs = _without_ones(args, kwargs, inputs, specs)
    hints = None
    try:
        program = _export(module, args, kwargs, specs)
    except Exception as error:
        ranges = _allowed_ranges(str(error))
        hints = hinted(specs) if is_unprovable(error) else None
        if not ranges and hints is None:
            raise _explain(error, module) from error
        specs = _dynamic_specs(inputs, dynamic or {}, ranges)
        try:
            program = _export(module, args, kwargs, specs if hints is None else hints)
        except Exception as second:
            raise _explain(second, module) from second
    model = from_exported_program(
        program,
        mode="train" if module.training else "eval",
        dim_names=_dim_names(inputs, specs),
        input_names=input_names,
        output_names=output_names,
    )
    if hints is not None:
        model.signature = _with_ones(model.signature, specs)
    model.shapes.single = _single(model, [leaf for leaf in given if isinstance(leaf, torch.Tensor)])
    verify(model)
    return model


def _single(model: Model, given: list[torch.Tensor]) -> set[sympy.Symbol]:
    """The free sizes that were 1 in the inputs that were given, where the model takes a 1."""
    ranges = model.signature.ranges
    names = {
        dim
        for spec, tensor in zip(model.signature.tensor_inputs, given, strict=True)
        for dim, size in zip(spec.dims, tensor.shape, strict=True)
        if size == 1 and isinstance(dim, str) and dim in ranges and ranges[dim].min <= 1
    }
    return {symbol for symbol, name in model.shapes.names.items() if name in names}


def _with_ones(signature: Signature, specs: dict[str, Any]) -> Signature:
    """Hints leave out the size one, which torch takes for a special case; named dims keep it, and so do these."""
    asked = {leaf.__name__: int(leaf.min) for leaf in pytree.tree_leaves(specs) if isinstance(leaf, Dim)}
    ranges = {
        name: dataclasses.replace(r, min=min(asked.get(name, 2), r.min)) if r.min == 2 else r
        for name, r in signature.ranges.items()
    }
    return dataclasses.replace(signature, ranges=ranges)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back torch's logs and dumps of half-traced graphs: an error of `capture` says what matters."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    levels = [handler.level for handler in handlers]
    with redirect_stderr(io.StringIO()):
        for handler in handlers:
            handler.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for handler, level in zip(handlers, levels, strict=True):
                handler.setLevel(level)


def _export(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], specs: dict[str, Any]
) -> torch.export.ExportedProgram:
    with _quiet():
        return export(module, args, kwargs, specs)


def _allowed_ranges(error: str) -> dict[str, Any]:
    """The narrower ranges that torch names when a model takes free sizes up to a limit only, such as 512 positions;
    empty when it asks for anything else, such as a multiple or a fixed size."""
    _, _, fixes = error.partition("Suggested fixes:")
    lines = [line.strip() for line in fixes.partition("\n\n")[0].splitlines() if line.strip()]
    found = [_RANGE.fullmatch(line) for line in lines]
    if not all(found):
        return {}
    bounds = {match[1]: {key: int(match[key]) for key in ("min", "max") if match[key]} for match in found if match}
    return {name: Dim(name, **limits) for name, limits in bounds.items()}


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The example inputs by parameter name, in the order torch.export wants them."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(module).__name__}.forward{signature}", why=str(error)
        ) from error
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            inputs |= value
        else:
            inputs[name] = value
    return inputs


def _dynamic_specs(inputs: dict[str, Any], dynamic: Mapping[str | int, Any], dims: dict[str, Any]) -> dict[str, Any]:
    """`dynamic` as torch.export takes it; `dims` holds the sizes that already have a range, by name."""
    names = list(inputs)
    by_name: dict[str, Any] = {}
    for key, spec in dynamic.items():
        name = names[key] if isinstance(key, int) and -len(names) <= key < len(names) else key
        if name not in inputs:
            near = difflib.get_close_matches(str(key), names)
            raise UsageError(
                f"dynamic names the input {key!r}, the module takes {', '.join(names)}",
                todo=f"did you mean '{near[0]}'?" if near else "use the name or the position of an input",
            )
        by_name[str(name)] = spec
    return {name: _spec_tree(value, by_name.get(name), name, dims) for name, value in inputs.items()}


def _spec_tree(value: Any, spec: Any, path: str, dims: dict[str, Any]) -> Any:
    """`spec` completed to the structure of `value`: None for what stays fixed, torch dims for names."""
    if spec is None:
        return _all_fixed(value)
    if isinstance(value, torch.Tensor):
        if not isinstance(spec, Mapping) or not all(isinstance(axis, int) for axis in spec):
            raise UsageError(f"dynamic for '{path}' is {spec!r}, a tensor takes {{axis: name}}")
        wrong = [axis for axis in spec if not -value.ndim <= axis < value.ndim]
        if wrong:
            raise UsageError(f"dynamic for '{path}' names axis {wrong[0]}, the tensor has {value.ndim} axes")
        return {axis % value.ndim: _dim(size, dims) for axis, size in spec.items()}
    if isinstance(value, Mapping) and isinstance(spec, Mapping):
        unknown = [key for key in spec if key not in value]
        if unknown:
            raise UsageError(f"dynamic for '{path}' names {unknown[0]!r}, it holds {', '.join(map(str, value))}")
        return {key: _spec_tree(item, spec.get(key), f"{path}.{key}", dims) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and isinstance(spec, Mapping):
        # torch wants the fields of a registered class as a list.
        names = [field.name for field in dataclasses.fields(value)]
        return [_spec_tree(getattr(value, name), spec.get(name), f"{path}.{name}", dims) for name in names]
    if isinstance(value, list | tuple) and isinstance(spec, list | tuple) and len(value) == len(spec):
        return type(value)(
            _spec_tree(v, s, f"{path}[{i}]", dims) for i, (v, s) in enumerate(zip(value, spec, strict=True))
        )
    raise UsageError(f"dynamic for '{path}' is {spec!r}, which does not have the structure of the input")


def _all_fixed(value: Any) -> Any:
    """None for every tensor in `value`, in the structure that torch.export asks for."""
    if isinstance(value, Mapping):
        return {key: _all_fixed(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_all_fixed(item) for item in value)
    children, spec = pytree.tree_flatten(value)
    return None if spec.is_leaf() else [_all_fixed(child) for child in children]


def _dim(size: Any, dims: dict[str, Any]) -> Any:
    if not isinstance(size, str):
        return size
    match = _SIZE.match(size)
    if match is None:
        raise UsageError(f"dynamic size {size!r} is not a name or a multiple such as '8*h'")
    name = match[2]
    base = dims.setdefault(name, Dim(name))
    return base if match[1] is None else int(match[1]) * base


def _dim_names(inputs: dict[str, Any], specs: dict[str, Any]) -> dict[tuple[int, int], str]:
    """Names of the free sizes by (flat tensor input, axis); multiples are named through their base."""
    names: dict[tuple[int, int], str] = {}
    flat = pytree.tree_leaves(inputs)
    position = 0
    for value, spec in zip(flat, _leaf_specs(specs), strict=True):
        if not isinstance(value, torch.Tensor):
            continue
        for axis, dim in (spec or {}).items():
            if _base_name(dim):
                names[position, axis] = _base_name(dim)
        position += 1
    return names


def _without_ones(
    args: tuple[Any, ...], kwargs: dict[str, Any], inputs: dict[str, Any], specs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with every free size of 1 doubled: torch.export takes a 1 for a fixed size."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    axes = dict(zip(map(id, pytree.tree_leaves(inputs)), _leaf_specs(specs), strict=True))
    single = {
        _base_name(dim)
        for leaf in flat
        for axis, dim in (axes.get(id(leaf)) or {}).items()
        if isinstance(leaf, torch.Tensor) and leaf.shape[axis] == 1
    }
    if not single:
        return args, kwargs
    for position, leaf in enumerate(flat):
        for axis, dim in (axes.get(id(leaf)) or {}).items():
            if _base_name(dim) in single:
                flat[position] = torch.cat([flat[position]] * 2, axis)
    grown: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(flat, spec)
    return grown


def _leaf_specs(specs: dict[str, Any]) -> list[Any]:
    return pytree.tree_leaves(specs, is_leaf=lambda s: s is None or _is_axis_spec(s))


def _base_name(dim: Any) -> str:
    """The name that a size is a multiple of."""
    return str(vars(dim).get("root", dim).__name__) if isinstance(dim, Dim) else ""


def _is_axis_spec(spec: Any) -> bool:
    return isinstance(spec, dict) and bool(spec) and all(isinstance(axis, int) for axis in spec)


def _explain(error: Exception, module: nn.Module) -> UsageError | UnsupportedError:
    """A torch error as one of ours, with the line of the user's code at which tracing stopped."""
    if isinstance(error, UnsupportedError | UsageError):
        return error
    where = user_line(error) or f"{type(module).__name__}.forward"
    text = str(error).strip()
    kind = type(error).__name__
    if "data-dependent" in text.lower() or "GuardOnDataDependent" in kind:
        return UnsupportedError(
            "the model decides by the values of a tensor, which a graph cannot hold",
            where=where,
            why=text.splitlines()[0],
            todo="use torch.where, or move the decision out of forward",
        )
    if "Constraints violated" in text or "constraint" in text.lower():
        return UnsupportedError(
            "a size that `dynamic` leaves free is fixed or restricted by the model",
            where=where,
            why=text,
            todo="leave that size out of `dynamic`, or name a multiple or a range that the model accepts",
        )
    first = text.splitlines()[0] if text else kind
    return UnsupportedError(
        f"torch.export cannot trace the model: {first}",
        where=where,
        why=f"{kind}: {text[:2000]}" if "\n" in text else None,
        todo="call the module on the same inputs; if that works, rewrite the line above with plain tensor operators",
    )


def user_line(error: BaseException) -> str:
    """The innermost frame outside torch and graphopt in the traceback of `error` or of what caused it."""
    found = ""
    current: BaseException | None = error
    while current is not None:
        for frame, line in traceback.walk_tb(current.__traceback__):
            file = frame.f_code.co_filename
            if is_users(file):
                found = f"{file}:{line}: {linecache.getline(file, line).strip()}"
        current = current.__cause__ or current.__context__
    return found
