"""The cut of a pass: done, proven against the masked original, and refitted."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.analysis.coupling import Coupling
from graphopt.analysis.removal import Removal
from graphopt.check import Oracle, relative_error, tolerance
from graphopt.errors import CheckFailed
from graphopt.model import Model
from graphopt.passes._output_error import OutputError
from graphopt.passes._refit import refit as refit_layers
from graphopt.precision import full_precision
from graphopt.rewriter import Rewriter
from graphopt.sample import sample_inputs
from graphopt.surgery import cut, masked_outputs
from graphopt.transform import Contract

__all__ = ["cut_and_prove", "cut_copy"]

_ROUNDINGS = 8
"""How many times what one rounding of the weights does to the outputs may be what the cut does, in deep nets."""


def cut_copy(coupling: Coupling, classes: Sequence[int]) -> Model:
    """A copy of the model without the classes.

    Raises:
        Conflict: when that cannot be done.
    """
    copy = coupling.model.clone(share_tensors=True)
    cut(Rewriter(copy), Removal(coupling.onto(copy), classes), "")
    copy.touch()
    return copy


def cut_and_prove(rw: Rewriter, coupling: Coupling, classes: Sequence[int], why: str, *, refit: bool) -> None:
    """Cut the model that `rw` holds, prove that the cut is right, and refit what reads where that is better.

    Raises:
        Conflict: when it cannot be cut.
        CheckFailed: when the cut model is not the masked original.
    """
    original = rw.model.clone(share_tensors=True).eval()
    removal = Removal(coupling.onto(original), classes)
    inputs = list(rw.calib[0]) if rw.calib else sample_inputs(rw.model)
    with full_precision():
        expected = masked_outputs(original, removal, inputs)
    cut(rw, Removal(coupling, classes), why)
    rw.model.touch()
    _prove(rw.model, original, inputs, expected)
    if refit:
        small = rw.model.clone(share_tensors=True).eval()
        _take_over(rw, original, small, set(refit_layers(removal, small, rw.calib)))


def _prove(model: Model, original: Model, inputs: Sequence[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compare with the masked original, as closely as its own rounding allows.

    Raises:
        CheckFailed: when the cut model computes something else.
    """
    with torch.no_grad(), full_precision():
        found = model.clone(share_tensors=True).eval().call_flat(inputs)
    oracle = Oracle(original, [inputs])
    for index, (spec, a, b) in enumerate(zip(model.signature.tensor_outputs, found, expected, strict=True)):
        error = relative_error(a, b)
        if error > tolerance(Contract.EXACT, b.dtype) and error > _ROUNDINGS * oracle.noise[index]:
            raise CheckFailed(
                f"output '{spec.name}' of the cut model is {error:.1e} away from the masked original",
                why="the removal was followed wrongly somewhere",
                todo="report it with the reproducer",
            )


def _take_over(rw: Rewriter, original: Model, small: Model, names: set[str]) -> None:
    """Use refitted weights if the outputs on calibration data are nearer with them."""
    error = OutputError(original, rw.calib)
    cut_only, with_refit = error.of(rw.model.clone(share_tensors=True).eval()), error.of(small)
    rw.findings["output error"] = {"cut": cut_only, "refitted": with_refit}
    if with_refit >= cut_only:
        return
    for node in list(rw.graph.nodes):
        if node.op == "get_attr" and str(node.target) in names:
            rw.set_tensor(node, small.params[str(node.target)].detach(), "refitted to what is left of its inputs")
