"""The invariants of the IR, checked after every pass.

    I1  only placeholders, tensors, ATen overloads, arithmetic on sizes, getitem, one output
    I2  every tensor node names an existing tensor; every tensor is used or listed as kept
    I3  fresh fake-tensor propagation succeeds and equals the stored shape, dtype and device of every node
    I4  inputs and outputs equal the signature, symbolic sizes and order included
    I5  topological order, unique names, no dead nodes
    I6  tied names share storage
    I7  masks and precision records fit their parameter
    I8  `training` arguments agree with the model's mode
    I9  no in-place operator but on the running statistics
    I10 literals that encode an axis (view sizes, normalized_shape, groups) agree with the axis they encode

Not checked: the numbers (that is the pipeline's numeric check), strides, and what an operator outside the table means.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import fx

from graphopt.errors import VerifyError
from graphopt.fake import ShapeError, dim_of, dtype_name, shape_text
from graphopt.mode import is_running_statistic, wrong_flags
from graphopt.model import Model
from graphopt.ops import SIZE_ARITHMETIC, is_in_place, is_pure, lookup
from graphopt.printer import excerpt, operator_name, source_of
from graphopt.signature import TensorSpec, ValueSpec

__all__ = ["INVARIANTS", "verify"]


def verify(model: Model) -> None:
    """Check every invariant.

    Raises:
        VerifyError: for the first that does not hold; the message starts with its number.
    """
    for check in INVARIANTS.values():
        check(model)


def _fail(number: str, what: str, node: fx.Node | None = None, model: Model | None = None, todo: str = "") -> NoReturn:
    where = f"{source_of(node)}\n{excerpt(node, model)}" if node is not None else None
    raise VerifyError(
        f"{number} {what}",
        where=where,
        todo=todo or "this is a bug in the pass that ran last: report it with the reproducer",
    )


def _check_nodes(model: Model) -> None:
    outputs = 0
    for node in model.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output":
            outputs += 1
        elif node.op != "call_function" or not _is_known_call(node.target):
            _fail(
                "I1", f"'{node.name}' is {node.op} of {operator_name(node.target)}, not an ATen overload", node, model
            )
    if outputs != 1:
        _fail("I1", f"the graph has {outputs} outputs nodes, not one")


def _is_known_call(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) or target is operator.getitem or target in SIZE_ARITHMETIC


def _check_tensors(model: Model) -> None:
    used: dict[str, fx.Node] = {}
    for node in model.graph.nodes:
        if node.op != "get_attr":
            continue
        if node.target not in model.params:
            _fail("I2", f"'{node.name}' names the tensor '{node.target}', which does not exist", node, model)
        if node.target in used:
            _fail(
                "I2",
                f"the tensor '{node.target}' has two nodes, '{used[node.target].name}' and '{node.name}'",
                node,
                model,
            )
        used[node.target] = node
    known = set(model.params)
    unused = sorted(known - used.keys() - model.kept)
    if unused:
        _fail("I2", f"no operator uses the tensor '{unused[0]}', and it is not listed as kept")
    gone = sorted(model.kept - known)
    if gone:
        _fail("I2", f"'{gone[0]}' is listed as kept and does not exist")


def _check_shapes(model: Model) -> None:
    for node in model.graph.nodes:
        if node.op == "get_attr":
            fresh: Any = model.params[str(node.target)]
        elif node.op == "call_function":
            try:
                fresh = model.shapes.propagate(node)
            except ShapeError as error:
                inputs = ", ".join(model.shapes.describe(arg.meta.get("val")) for arg in node.all_input_nodes)
                _fail("I3", f"{operator_name(node.target)} cannot take ({inputs}): {error}", node, model)
        else:
            continue
        stored = node.meta.get("val")
        if stored is not fresh and shape_text(stored) != shape_text(fresh):
            _fail("I3", f"'{node.name}' is recorded as {shape_text(stored)} and is {shape_text(fresh)}", node, model)


def _check_signature(model: Model) -> None:
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    _compare_specs("input", placeholders, model.signature.inputs, model)
    output = next(node for node in model.graph.nodes if node.op == "output")
    leaves = output.args[0] if isinstance(output.args[0], tuple | list) else (output.args[0],)
    _compare_specs("output", leaves, model.signature.outputs, model)
    _check_ranges(model)


def _check_ranges(model: Model) -> None:
    text = " ".join(str(dim) for spec in model.signature.tensor_inputs for dim in spec.dims)
    used = set(re.findall(r"[^\W\d]\w*", text))
    unused = sorted(model.signature.ranges.keys() - used)
    if unused:
        _fail("I4", f"the signature has a range for '{unused[0]}', which no input has as a size")


def _compare_specs(side: str, leaves: Iterable[Any], specs: tuple[ValueSpec, ...], model: Model) -> None:
    found = list(leaves)
    if len(found) != len(specs):
        _fail("I4", f"the graph has {len(found)} {side}s, the signature {len(specs)}")
    for leaf, spec in zip(found, specs, strict=True):
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
        if isinstance(value, torch.Tensor) and isinstance(spec, TensorSpec):
            dims = tuple(dim_of(size, model.shapes) for size in value.shape)
            fits = dims == spec.dims and dtype_name(value.dtype) == spec.dtype
        else:
            fits = not isinstance(value, torch.Tensor) and not isinstance(spec, TensorSpec)
        if not fits:
            _fail("I4", f"{side} '{spec.name}' is {model.shapes.describe(value)}, the signature says {spec}")


def _check_order(model: Model) -> None:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    for node in model.graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                _fail("I5", f"'{node.name}' uses '{used.name}' before it is computed", node, model)
        if node.name in names:
            _fail("I5", f"two nodes are called '{node.name}'", node, model)
        seen.add(node)
        names.add(node.name)
        if not node.users and (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
            _fail("I5", f"nothing uses '{node.name}'", node, model)


def _check_ties(model: Model) -> None:
    storages: dict[int, str] = {}
    shared = {name: group for group in model.params.ties() for name in group}
    for name, tensor in model.params.items():
        if not tensor.numel() or tensor.device.type == "meta":  # neither has an address
            continue
        address = tensor.untyped_storage().data_ptr()
        first = storages.setdefault(address, name)
        if first != name and name not in shared.get(first, ()):
            _fail("I6", f"'{name}' and '{first}' share storage and are two tensors")


def _check_records(model: Model) -> None:
    for name, mask in model.params.masks.items():
        if name not in model.params:
            _fail("I7", f"there is a mask for '{name}', which does not exist")
        if mask.shape != model.params[name].shape or mask.dtype is not torch.bool:
            shape = list(model.params[name].shape)
            _fail(
                "I7",
                f"the mask of '{name}' is {dtype_name(mask.dtype)}{list(mask.shape)}, the tensor has shape {shape}",
            )
    for name, dtype in model.params.precision.items():
        if name not in model.params:
            _fail("I7", f"there is a precision for '{name}', which does not exist")
        wanted = getattr(torch, dtype, None)
        if not isinstance(wanted, torch.dtype) or not (
            wanted.is_floating_point and model.params[name].is_floating_point()
        ):
            _fail("I7", f"the precision of '{name}' is {dtype!r}, the tensor is {dtype_name(model.params[name].dtype)}")


def _check_mode(model: Model) -> None:
    for node in wrong_flags(model):
        _fail("I8", f"the training flag of '{node.name}' disagrees with the mode '{model.mode}'", node, model)


def _check_writes(model: Model) -> None:
    for node in model.graph.nodes:
        if node.op == "call_function" and is_in_place(node) and not is_running_statistic(node):
            _fail("I9", f"'{node.name}' writes to its argument", node, model)


def _check_literals(model: Model) -> None:
    for node in model.graph.nodes:
        info = lookup(node.target) if node.op == "call_function" else None
        if info is None or info.literals is None:
            continue
        for literal in info.literals(node):
            if not literal.agrees():
                relation = "does not divide" if literal.divides else "is not"
                _fail(
                    "I10",
                    f"{literal.argument} of '{node.name}' holds {literal.value}, which {relation} "
                    f"{literal.size}, the size of axis {literal.axis} of {literal.operand}",
                    node,
                    model,
                )


INVARIANTS: dict[str, Callable[[Model], None]] = {
    "I1": _check_nodes,
    "I2": _check_tensors,
    "I3": _check_shapes,
    "I4": _check_signature,
    "I5": _check_order,
    "I6": _check_ties,
    "I7": _check_records,
    "I8": _check_mode,
    "I9": _check_writes,
    "I10": _check_literals,
}
"""Number of each invariant and its check, in the order in which they run."""
