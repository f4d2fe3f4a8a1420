"""Putting a pruned model back into the user's own module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from graphopt.check import Oracle, relative_error, tolerance
from graphopt.errors import CheckFailed, InputError, UnsupportedError
from graphopt.export import example_sizes
from graphopt.fake import dtype_name
from graphopt.model import Model
from graphopt.precision import full_precision
from graphopt.sample import check_batch, sample_inputs
from graphopt.surgery.module_numbers import Numbers, derived
from graphopt.surgery.module_runs import run_module
from graphopt.surgery.module_tensors import Held, held, match, put
from graphopt.surgery.settle import Settled, settle
from graphopt.transform import Contract

__all__ = ["Change", "write_back"]

_ROUNDINGS = 8
"""How many times what one rounding of the weights does to the outputs the module may differ, in deep nets."""


@dataclass(frozen=True)
class Change:
    """What has changed at one attribute of a module: the shape of a tensor, or a number."""

    path: str
    attribute: str
    before: Any
    after: Any
    note: str = ""

    def __str__(self) -> str:
        name = f"{self.path}.{self.attribute}" if self.path else self.attribute
        return f"{name}: {self.before} -> {self.after}" + (f" ({self.note})" if self.note else "")


@full_precision()
def write_back(model: Model, module: nn.Module) -> list[Change]:
    """Put the tensors of a pruned model into the module that it was captured from, and let the module's numbers follow.

    Numbers of torch's layers (`out_channels`, `groups`, `normalized_shape`, ...) follow from the tensors; integers of
    other modules, such as `self.num_heads`, are found by trying. All of it happens on a copy first, which has to
    compute what the model does, in evaluation mode; only then is the module changed, or nothing of it is. Where
    attention divides by the root of its number of features and that has changed, the layer of the queries is scaled.

    A parameter whose shape stays remains the same object with new values. One whose shape changes is replaced, under
    all names that it has: make optimizers anew, which hold the old ones, and register hooks of the tensor again.
    Modes, `requires_grad`, devices, dtypes and the hooks of modules remain.

    Returns:
        The shapes and numbers that have changed.

    Raises:
        UsageError: when the model is of another module.
        UnsupportedError: when passes have renamed tensors, or the module's code cannot take what is left; it says
            which line.
        CheckFailed: when the module would compute something else.
    """
    evaluated = model.clone(share_tensors=True).eval()
    pairs = match(evaluated, module)
    _refuse_computed(module, pairs)
    trial = _copied(module)
    ours = {one.places[0]: one for one in held(trial)}
    for one, value in pairs:
        put(trial, ours[one.places[0]], value)
    torchs = _follow(evaluated, trial)
    batches = _batches(model)
    settled = settle(evaluated, module, trial, batches[-1])
    numbers = torchs | settled.numbers | _follow(evaluated, trial)
    _prove(evaluated, trial, batches)
    return _take_over(module, trial, pairs, numbers, settled)


def _copied(module: nn.Module) -> nn.Module:
    try:
        trial = copy.deepcopy(module)
    except Exception as error:
        raise UnsupportedError(
            "the module cannot be copied, and changes are tried on a copy",
            where=type(module).__name__,
            why=str(error),
            todo="let copy.deepcopy(module) work",
        ) from error
    # In evaluation mode already it may have parts that always train, which the model has too.
    return trial.eval() if module.training else trial


def _refuse_computed(module: nn.Module, pairs: Sequence[tuple[Held, Tensor]]) -> None:
    """Weights that are computed from other tensors have their sizes in more places than can be seen."""
    for one, value in pairs:
        for path, leaf in one.places if one.tensor.shape != value.shape else ():
            owner, parametrized, _ = f".{path}".partition(".parametrizations")
            hooks = module.get_submodule(path)._forward_pre_hooks.values()
            if parametrized or any(type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
                raise UnsupportedError(
                    f"'{one.names[0]}' has become {list(value.shape)}, and its layer computes its weight from it",
                    where=f"module '{owner[1:]}' ({leaf})",
                    todo="remove the parametrization before the module is captured",
                )


def _follow(model: Model, module: nn.Module) -> Numbers:
    numbers = derived(model, module)
    for (path, name), value in numbers.items():
        setattr(module.get_submodule(path), name, value)
    return numbers


def _batches(model: Model) -> list[list[Tensor]]:
    """The example, and inputs of other sizes where sizes are free: numbers may be equal by chance at one size."""
    batches = [list(model.example) or sample_inputs(model)]
    bounds = model.signature.ranges
    sizes = {name: size + 1 for name, size in example_sizes(model).items() if size + 1 in bounds[name]}
    if sizes:
        try:
            other = sample_inputs(model, sizes=sizes)
            check_batch(model.signature, other, "")
        except InputError:
            return batches
        batches.append([tensor.to(like.device) for tensor, like in zip(other, batches[0], strict=True)])
    return batches


def _prove(model: Model, module: nn.Module, batches: Sequence[Sequence[Tensor]]) -> None:
    """Run the module as the user does and compare, as closely as the model's own rounding allows.

    Raises:
        CheckFailed: when it computes something else.
    """
    oracle = Oracle(model, batches)
    for batch, references in zip(batches, oracle.reference, strict=True):
        where = "inputs " + ", ".join(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}" for tensor in batch)
        why = "its code counts positions in a way that agrees with the model at some sizes only"
        try:
            outputs = run_module(model, module, batch)
        except Exception as failure:
            raise CheckFailed(f"the module would fail: {failure}", where=where, why=why) from failure
        if len(outputs) != len(references):
            raise CheckFailed(f"the module returns {len(outputs)} tensors, the model {len(references)}", where=where)
        for index, (spec, a, b) in enumerate(zip(model.signature.tensor_outputs, outputs, references, strict=True)):
            error = relative_error(a, b)
            if error > tolerance(Contract.EXACT, b.dtype) and error > _ROUNDINGS * oracle.noise[index]:
                what = f"output '{spec.name}' of the module would be {error:.1e} away from the model's"
                raise CheckFailed(what, where=where, why=why)


def _take_over(
    module: nn.Module, trial: nn.Module, pairs: Sequence[tuple[Held, Tensor]], numbers: Numbers, settled: Settled
) -> list[Change]:
    """Give the module all that its changed copy has got; what the copy's runs have written into it stays behind."""
    changes: list[Change] = []
    for one, given in pairs:
        value = given
        for path, leaf in one.places:
            note = ""
            if path in settled.scaled:
                value = getattr(trial.get_submodule(path), leaf)
                note = f"queries times {settled.scaled[path]:.3g}"
            if value.shape != one.tensor.shape or note:
                changes.append(Change(path, leaf, tuple(one.tensor.shape), tuple(value.shape), note))
        put(module, one, value)
    for (path, name), value in numbers.items():
        part = module.get_submodule(path)
        if getattr(part, name) != value:
            changes.append(Change(path, name, getattr(part, name), value))
            setattr(part, name, value)
    return changes
