"""Seeded inputs that fit a model's signature, for checks and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graphopt.errors import InputError
from graphopt.export import example_sizes, usual_sizes
from graphopt.fake import dtype_name
from graphopt.model import Model
from graphopt.signature import Signature, size_of

__all__ = ["check_batch", "sample_inputs", "usual_inputs"]


def sample_inputs(model: Model, *, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[torch.Tensor]:
    """Flat tensor inputs, on the devices of the captured example: normal values for floating point; for integers and
    booleans, draws from the values that the example holds (an index has to stay inside its table), or zeros where there
    is none.

    Args:
        sizes: sizes of the named dims; by default those of the example.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = {**example_sizes(model), **(sizes or {})}
    examples: list[torch.Tensor | None] = list(model.example)
    examples = examples or [None] * len(model.signature.tensor_inputs)
    inputs = []
    for spec, example in zip(model.signature.tensor_inputs, examples, strict=True):
        shape = [dim if isinstance(dim, int) else int(size_of(dim, bound)) for dim in spec.dims]
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            drawn = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
            inputs.append(drawn if example is None else drawn.to(example.device))
        elif example is None or example.numel() == 0:
            inputs.append(torch.zeros(shape, dtype=dtype))
        else:
            picks = torch.randint(example.numel(), shape, generator=generator)
            inputs.append(example.flatten()[picks.flatten().to(example.device)].reshape(shape))
    return inputs


def usual_inputs(model: Model) -> list[torch.Tensor]:
    """Seeded inputs of the sizes that the user's example had, a single image say, to measure times with."""
    return sample_inputs(model, sizes=usual_sizes(model))


def check_batch(signature: Signature, batch: Sequence[torch.Tensor], where: str) -> None:
    """Look at a batch of flat inputs before anything is done with it.

    Raises:
        InputError: when its tensors do not fit the signature, or hold NaN.
    """
    try:
        signature.check([(dtype_name(tensor.dtype), tuple(tensor.shape)) for tensor in batch])
    except InputError as error:
        raise InputError(error.what, where=where, why=error.why, todo=error.todo) from error
    for spec, tensor in zip(signature.tensor_inputs, batch, strict=True):
        if tensor.dtype.is_floating_point and bool(torch.isnan(tensor).any()):
            raise InputError(f"input '{spec.name}' holds NaN", where=where, todo="calibrate with data that has none")
