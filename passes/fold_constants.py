"""Computing beforehand what does not depend on inputs or parameters."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graphopt.errors import GraphoptError
from graphopt.fake import FakeTensor, is_symbolic
from graphopt.ops import Kind, arguments, is_pure, is_training, lookup, numel
from graphopt.params import ParamKind
from graphopt.passes._facts import is_written
from graphopt.passes._reindexing import name_of, overloads
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Pass

__all__ = ["FoldConstants"]

STORED = "constants."
"""Names of what is stored here start so. Giving such a tensor up allows no growth: many runs grow no more than one."""

ENLARGING = overloads("expand expand_as broadcast_to repeat tile")


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute beforehand what depends on constants only.

    What:
        Calls whose inputs are all constants (tensors that are no parameters), and calls that create tensors of
        fixed size (`arange`, `full`, `zeros_like`, ..), are run once; of a whole sub-graph only the results that
        other operators need are stored. Sizes that are numbers are written into the calls that use them.

    Algebra:
        f(c1, c2, ..) = c for constant tensors ci [..] and c [..]; of g(f(c1), x) only f(c1) is stored.

    When it applies:
        The operator is in the table and pure, no size is free, and the stored result is no larger than the tensors
        that only it needed plus `size-limit` bytes (64 KiB unless told), so that a model does not grow. Parameters
        are never folded, frozen ones neither: they could no longer be trained or loaded. A buffer that is folded
        away leaves the state dict. Left alone, with the reason: results that are too large, calls on parameters,
        tensors with a storage precision, and results that are outputs themselves, which would hand out the model's
        own tensor. Running statistics, operators with a training flag and random numbers are no constants. An
        expansion is left to be done at run time.

    Safety:
        Exact: torch computes the same operators in the same dtypes, without gradients, which constants do not have.

    Cost:
        Fewer operators; bytes as bounded above. Every folded operator runs once.

    Source:
        Constant folding as in Muchnick, Advanced Compiler Design and Implementation, section 12.1.

    Example:
        >>> import torch, graphopt as go
        >>> class Positions(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.arange(4).float().sin()
        >>> model = go.capture(Positions(), (torch.randn(2, 4),))
        >>> smaller, (report,) = go.run(model, "fold-constants")
        >>> [edit.why for edit in report.edits]
        ['computed beforehand: 16 bytes']
    """

    name: ClassVar[str] = "fold-constants"
    size_limit: int = 64 * 1024

    def run(self, rw: Rewriter) -> None:
        """Find what is constant going forward, what has to be stored going backward, then compute it."""
        constants = self._constants(rw)
        stored = _to_store(rw, constants)
        values = _evaluate(rw, constants, stored)
        for node in stored:
            if rw.exhausted:
                return
            value = values[node]
            if isinstance(value, torch.Tensor):
                constant = rw.add_tensor(f"{STORED}{node.name}", value, kind=ParamKind.CONSTANT, like=node)
                rw.replace(node, constant, f"computed beforehand: {value.nbytes} bytes")
            else:
                _write_number(rw, node, value)

    def _constants(self, rw: Rewriter) -> set[Node]:
        """Stored tensors and calls that are the same at every run, in reach of the size limit."""
        constants: set[Node] = set()
        freed: dict[Node, int] = {}
        for node in rw.graph.nodes:
            if node.op == "get_attr" and _is_constant_tensor(rw, node):
                constants.add(node)
                freed[node] = 0 if str(node.target).startswith(STORED) else rw.params[str(node.target)].nbytes
            elif node.op == "call_function" and _is_foldable(rw, node, constants):
                freed[node] = sum(freed.get(used, 0) for used in node.all_input_nodes if len(used.users) == 1)
                size = _bytes(rw.value(node))
                if size <= freed[node] + self.size_limit:
                    constants.add(node)
                else:
                    rw.skip(node, f"its {size} bytes are more than the {freed[node]} it frees and {self.size_limit}")
        return constants


def _is_constant_tensor(rw: Rewriter, node: Node) -> bool:
    name = str(node.target)
    if rw.params.kind(name) is ParamKind.PARAMETER or rw.params[name].device.type == "meta":
        return False
    if is_written(node) or name in rw.params.precision or name in rw.params.masks:
        return False
    return not any(user.op == "call_function" and is_training(user) is not None for user in node.users)


def _is_foldable(rw: Rewriter, node: Node, constants: set[Node]) -> bool:
    info = lookup(node.target)
    if info is None or not is_pure(node) or is_training(node) is not None or not _is_fixed(rw.value(node)):
        return False
    if isinstance(rw.value(node), int | float):
        return info.kind is Kind.SIZE
    if info.kind is Kind.CREATION:
        return all(isinstance(rw.value(used), FakeTensor) or used in constants for used in node.all_input_nodes)
    inputs = node.all_input_nodes
    others = [used for used in inputs if used not in constants]
    if inputs and others and all(_is_parameter(rw, used) for used in others):
        _note_parameter(rw, node, others[0])
    return bool(inputs) and not others


def _note_parameter(rw: Rewriter, node: Node, parameter: Node) -> None:
    """Record a call that would be folded if it did not read a parameter; plain reads by a layer are not meant."""
    rw.skip(node, f"it reads the parameter '{parameter.target}', which can be trained")


def _is_parameter(rw: Rewriter, node: Node) -> bool:
    return node.op == "get_attr" and rw.params.kind(str(node.target)) is ParamKind.PARAMETER


def _is_fixed(value: Any) -> bool:
    """Whether a value is made of tensors of fixed size and of numbers."""
    if isinstance(value, tuple | list):
        return all(_is_fixed(item) for item in value)
    if isinstance(value, FakeTensor):
        return not is_symbolic(value)
    return isinstance(value, int | float)


def _bytes(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(_bytes(item) for item in value)
    return int(numel(value)) * value.element_size() if isinstance(value, FakeTensor) else 0


def _to_store(rw: Rewriter, constants: set[Node]) -> list[Node]:
    """The constant calls whose results other operators need, in order; takes out of `constants` what stays a call."""
    stored: list[Node] = []
    for node in reversed(rw.graph.nodes):
        if node not in constants or node.op != "call_function":
            continue
        needed_by = [user for user in node.users if user not in constants]
        if not needed_by:
            continue
        if _stays(rw, node, needed_by):
            constants.discard(node)
        else:
            stored.append(node)
    return stored[::-1]


def _stays(rw: Rewriter, node: Node, needed_by: list[Node]) -> bool:
    value = rw.value(node)
    if any(user.op == "output" for user in needed_by):
        rw.skip(node, "it is an output, which would be the model's own tensor")
        return True
    if isinstance(value, int | float):
        return not any(isinstance(user.target, torch._ops.OpOverload) for user in needed_by)
    if not isinstance(value, FakeTensor):
        return True
    return name_of(node) in ENLARGING and _bytes(value) > _bytes(rw.value(node.all_input_nodes[0]))


def _evaluate(rw: Rewriter, constants: set[Node], stored: list[Node]) -> dict[Node, Any]:
    """The values of `stored`. A value in between is dropped after its last use."""
    wanted = set(stored)
    needed: set[Node] = set()
    uses: Counter[Node] = Counter()
    for node in reversed(rw.graph.nodes):
        if node in wanted or node in needed:
            inputs = [used for used in node.all_input_nodes if used in constants] if node.op == "call_function" else []
            needed.update((node, *inputs))
            uses.update(inputs)
    values: dict[Node, Any] = {}
    for node in rw.graph.nodes:
        if node not in needed:
            continue
        values[node] = rw.tensor(node) if node.op == "get_attr" else _compute(rw, node, values)
        for used in node.all_input_nodes:
            uses[used] -= 1
            if uses[used] == 0 and used not in wanted:
                values.pop(used, None)
    return values


def _compute(rw: Rewriter, node: Node, values: dict[Node, Any]) -> Any:
    """Run a call on known values; what it gives owns its memory."""
    expected = rw.value(node)
    if isinstance(expected, int | float):
        return expected

    def known(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [known(item) for item in argument]
        if not isinstance(argument, Node) or argument in values:
            return values[argument] if isinstance(argument, Node) else argument
        # A creating operator asks its input for dtype and device, and for the size that its output has.
        like = rw.fake(argument)
        return torch.empty(expected.shape, dtype=like.dtype, device=like.device)

    with torch.no_grad():
        if isinstance(node.target, torch._ops.OpOverload):
            result = node.target(**{name: known(value) for name, value in arguments(node).items()})
        else:
            result = operator.getitem(*(known(value) for value in node.args))
    if isinstance(result, torch.Tensor):
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise GraphoptError(f"'{node.name}' is {result.dtype}{list(result.shape)}, not what its fake value says")
        return result.clone(memory_format=torch.contiguous_format)
    return result


def _write_number(rw: Rewriter, node: Node, value: float) -> None:
    """Write a size into the calls that take it."""

    def written(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [written(item) for item in argument]
        return value if argument is node else argument

    for user in list(node.users):
        if isinstance(user.target, torch._ops.OpOverload):
            changed = {name: new for name, old in arguments(user).items() if (new := written(old)) != old}
            rw.update(user, f"'{node.name}' is always {value}", **changed)
