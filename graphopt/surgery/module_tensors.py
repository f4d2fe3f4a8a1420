"""The tensors of a user's module, each with all places it is registered at, and what a model has in their stead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, UnsupportedError, UsageError
from graphopt.fake import dtype_name
from graphopt.model import Model
from graphopt.names import nearest
from graphopt.params import ParamKind

__all__ = ["Held", "held", "match", "put"]

_CUTS = ("prune-channels", "remove-channels")


@dataclass
class Held:
    """One tensor of a module: `places` are all `(path of the owner, attribute)` that hold it."""

    tensor: Tensor
    places: list[tuple[str, str]] = field(default_factory=list)
    persistent: bool = False

    @property
    def names(self) -> list[str]:
        return [f"{path}.{leaf}" if path else leaf for path, leaf in self.places]


def held(module: nn.Module) -> list[Held]:
    """Parameters, buffers and plain tensor attributes, each tensor once."""
    found: dict[int, Held] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor, persistent in _own(owner):
            one = found.setdefault(id(tensor), Held(tensor))
            one.places.append((path, leaf))
            one.persistent |= persistent
    return list(found.values())


def _own(owner: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    for leaf, parameter in owner._parameters.items():
        if parameter is not None:
            yield leaf, parameter, True
    for leaf, buffer in owner._buffers.items():
        if buffer is not None:
            yield leaf, buffer, leaf not in owner._non_persistent_buffers_set
    yield from ((leaf, value, False) for leaf, value in vars(owner).items() if isinstance(value, Tensor))


def put(module: nn.Module, one: Held, value: Tensor) -> None:
    """Give a tensor of the module a new value: in place where the shape stays and it can be written
    to, by a new object in all its places else."""
    old, value = one.tensor, value.detach().to(one.tensor)
    if value.shape == old.shape and torch.equal(old, value):
        return
    if value.shape == old.shape and not old.is_inference() and 0 not in old.stride():
        with torch.no_grad():
            old.copy_(value)
        return
    copy = value.clone()
    new = nn.Parameter(copy, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else copy
    vars(new).update(vars(old))
    for path, leaf in one.places:
        setattr(module.get_submodule(path), leaf, new)


def match(model: Model, module: nn.Module) -> list[tuple[Held, Tensor]]:
    """The tensors of the module with what the model has under their names.

    Raises:
        UsageError: when the model is of another module.
        UnsupportedError: when passes have renamed or dropped tensors.
    """
    tensors = held(module)
    known = {name for one in tensors for name in one.names}
    theirs = [entry.name for entry in model.params.entries() if entry.kind is not ParamKind.CONSTANT]
    pairs = [(one, _value(model, one)) for one in tensors]
    unknown = [name for name in theirs if name not in known]
    lost = [one.names[0] for one, value in pairs if value is None and one.persistent]
    if unknown or lost:
        raise _other_names(model, unknown, lost, known)
    found = [(one, value) for one, value in pairs if value is not None]
    for one, value in found:
        _refuse_misfit(one, value)
    return found


def _value(model: Model, one: Held) -> Tensor | None:
    """What the model has under any name of a tensor; a constant that was cut for its reader goes by another."""
    named = [name for name in one.names if name in model.params]
    cut = [f"{name}_cut" for name in one.names if f"{name}_cut" in model.params]
    values = [model.params[name] for name in named or cut]
    if any(value is not values[0] and not torch.equal(value, values[0]) for value in values):
        raise UnsupportedError(
            f"{_listed(named)} are one tensor in the module and differ in the model",
            todo="untie them in the module before it is captured",
        )
    return values[0] if values else None


def _refuse_misfit(one: Held, value: Tensor) -> None:
    name, old = one.names[0], one.tensor
    if value.is_meta or old.is_meta:
        raise UsageError(f"'{name}' is on the meta device: there are no values to write back")
    if value.dtype != old.dtype:
        raise UsageError(
            f"'{name}' is {dtype_name(old.dtype)} in the module and {dtype_name(value.dtype)} in the model",
            todo="convert the module first, or capture it as it is",
        )
    if value.device != old.device:
        raise UsageError(
            f"'{name}' is on {old.device} in the module and on {value.device} in the model",
            todo="move the module first; it can go back afterwards",
        )
    if value.dim() != old.dim():
        raise UsageError(
            f"'{name}' has the shape {list(old.shape)} in the module and {list(value.shape)} in the model",
            todo="give the module that the model was captured from",
        )


def _other_names(model: Model, unknown: list[str], lost: list[str], known: set[str]) -> GraphoptError:
    what = [f"the module has no {_listed(unknown)}"] if unknown else []
    what += [f"the model has no {_listed(lost)}"] if lost else []
    passes = [step for step in dict.fromkeys(model.history) if not step.startswith(_CUTS)]
    if passes:
        return UnsupportedError(
            "the module cannot take the model back: " + ", and ".join(what),
            why=f"the model went through {_listed(passes)}, and passes may merge, rename and drop tensors",
            todo="capture the module, prune without these passes, write back, and run them on what is captured then",
        )
    near = nearest(unknown[0], known) if unknown else nearest(lost[0], set(model.params))
    return UsageError(
        "the model is of another module: " + ", and ".join(what),
        why=f"'{(unknown or lost)[0]}': {near}" if len(near) < 300 else None,
        todo="give the module that the model was captured from",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(f"'{name}'" for name in names[:4]) + more
