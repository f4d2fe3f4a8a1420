"""The tensors a model owns: parameters, buffers and constants by name, with the ties between them."""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from graphopt.errors import GraphoptError
from graphopt.mapped import on_disk

__all__ = ["UNSAFE", "Entry", "ParamKind", "ParamTable"]

UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\"'\\]")
"""What no name may hold: torch writes names between quotes into the code that it generates and runs."""


class ParamKind(enum.Enum):
    """What becomes of a tensor: trained, saved with the state, or only part of the graph."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"  # a non-persistent buffer: part of the program, absent from state_dict


@dataclass(frozen=True)
class Entry:
    """One named tensor."""

    name: str
    tensor: torch.Tensor
    kind: ParamKind


@dataclass
class ParamTable(Mapping[str, torch.Tensor]):
    """A view on the tensors of a GraphModule, by full name.

    `masks` marks elements of a parameter that must stay zero (bool, of the parameter's shape); `precision` names the
    dtype that a floating-point parameter is meant to be stored in. Names that share one tensor are ties: they were
    one tensor in the user's module and must stay one. Where tensors are `mapped` from a file, large new ones are kept
    on disk as well.
    """

    module: fx.GraphModule
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    precision: dict[str, str] = field(default_factory=dict)
    mapped: bool = False
    _names: dict[int, set[str]] | None = field(default=None, init=False, repr=False, compare=False)

    def __getitem__(self, name: str) -> torch.Tensor:
        owner, leaf = self._owner(name)
        for table in (owner._parameters, owner._buffers):
            if (tensor := table.get(leaf)) is not None:
                return tensor
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            self[name]
        except (KeyError, AttributeError):
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in self.entries())

    def __len__(self) -> int:
        return sum(1 for _ in self.entries())

    def entries(self) -> Iterator[Entry]:
        """All tensors, submodule by submodule, in order of registration; tied names are each listed."""
        for path, owner in self.module.named_modules():
            prefix = f"{path}." if path else ""
            for leaf, parameter in owner._parameters.items():
                if parameter is not None:
                    yield Entry(prefix + leaf, parameter, ParamKind.PARAMETER)
            for leaf, buffer in owner._buffers.items():
                if buffer is not None:
                    transient = leaf in owner._non_persistent_buffers_set
                    yield Entry(prefix + leaf, buffer, ParamKind.CONSTANT if transient else ParamKind.BUFFER)

    def kind(self, name: str) -> ParamKind:
        owner, leaf = self._owner(name)
        if leaf in owner._parameters:
            return ParamKind.PARAMETER
        return ParamKind.CONSTANT if leaf in owner._non_persistent_buffers_set else ParamKind.BUFFER

    def ties(self) -> list[frozenset[str]]:
        """The sets of two or more names that share one tensor."""
        names: defaultdict[int, list[str]] = defaultdict(list)
        for entry in self.entries():
            names[id(entry.tensor)].append(entry.name)
        return [frozenset(group) for group in names.values() if len(group) > 1]

    def aliases(self, name: str) -> frozenset[str]:
        """All names of the tensor called `name`, itself included."""
        tensor = self[name]
        if self._names is None:
            self._names = {}
            for entry in self.entries():
                self._names.setdefault(id(entry.tensor), set()).add(entry.name)
        found = self._names.get(id(tensor), set())
        return frozenset(alias for alias in found if self.get(alias) is tensor) | {name}

    def reindex(self) -> None:
        """Look all names up again: the module may have been edited from outside since the last question."""
        self._names = None

    def add(self, name: str, tensor: torch.Tensor, kind: ParamKind) -> None:
        """Register `tensor` under `name`, making the submodules on the way.

        Raises:
            GraphoptError: when something else already has that name, or it could end a string of generated code.
        """
        if UNSAFE.search(name):
            raise GraphoptError(f"{name!r} cannot be the name of a tensor: it holds a quote or a control character")
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.module
        for part in path.split(".") if path else ():
            if part not in owner._modules:
                if hasattr(owner, part):
                    raise GraphoptError(f"'{name}' cannot be added: '{part}' is not a module")
                owner._modules[part] = nn.Module()
            child = owner._modules[part]
            assert child is not None
            owner = child
        if hasattr(owner, leaf):
            raise GraphoptError(f"'{name}' cannot be added: the name is taken")
        tensor = self._placed(tensor)
        if kind is ParamKind.PARAMETER:
            owner.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else _as_parameter(tensor))
        else:
            # The same object under two names is a tie, so a plain tensor must not be wrapped anew.
            plain = tensor.detach() if tensor.requires_grad or isinstance(tensor, nn.Parameter) else tensor
            owner.register_buffer(leaf, plain, persistent=kind is ParamKind.BUFFER)
        self._note(name)

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Give `name`, and every name tied to it, a new value; the old tensor is left as it is."""
        old = self[name]
        kind = self.kind(name)
        tensor = self._placed(tensor)
        if kind is ParamKind.PARAMETER:
            tensor = _as_parameter(tensor, requires_grad=old.requires_grad)
        for alias in self.aliases(name):
            owner, leaf = self._owner(alias)
            table = owner._parameters if leaf in owner._parameters else owner._buffers
            table[leaf] = tensor  # type: ignore[assignment]  # the two tables differ in their value type only
            self._note(alias)

    def remove(self, name: str) -> None:
        """Forget `name`, and the submodules that are empty without it. Names tied to it stay."""
        owner, leaf = self._owner(name)
        for table in (owner._parameters, owner._buffers):
            table.pop(leaf, None)
        owner._non_persistent_buffers_set.discard(leaf)
        self.masks.pop(name, None)
        self.precision.pop(name, None)
        path = name.rpartition(".")[0]
        while path and not any(True for _ in self._below(path)):
            parent, _, child = path.rpartition(".")
            del self.module.get_submodule(parent)._modules[child]
            path = parent

    def fresh_name(self, wanted: str) -> str:
        """`wanted`, or `wanted_1`, `wanted_2`, ... when the name is taken."""
        name, count = wanted, 0
        while self._taken(name):
            count += 1
            name = f"{wanted}_{count}"
        return name

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """On disk where the others are."""
        if not self.mapped or tensor.device.type != "cpu":
            return tensor
        placed = on_disk(tensor)
        parameter = isinstance(tensor, nn.Parameter) and placed is not tensor
        return nn.Parameter(placed, requires_grad=tensor.requires_grad) if parameter else placed

    def _note(self, name: str) -> None:
        if self._names is not None:
            self._names.setdefault(id(self[name]), set()).add(name)

    def _taken(self, name: str) -> bool:
        owner: nn.Module = self.module
        *path, leaf = name.split(".")
        for part in path:
            child = owner._modules.get(part)
            if child is None:
                return hasattr(owner, part)
            owner = child
        return hasattr(owner, leaf)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.module
        for part in path.split(".") if path else ():
            child = owner._modules.get(part)
            if child is None:
                raise KeyError(name)
            owner = child
        return owner, leaf

    def _below(self, path: str) -> Iterator[torch.Tensor]:
        owner = self.module.get_submodule(path)
        yield from owner.parameters()
        yield from owner.buffers()


def _as_parameter(tensor: torch.Tensor, requires_grad: bool = True) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad == requires_grad:
        return tensor
    differentiable = tensor.is_floating_point() or tensor.is_complex()
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad and differentiable)
