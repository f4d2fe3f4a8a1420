"""Operators that make tensors from no values: constants and random numbers. Dropout is here as well."""

from __future__ import annotations

from graphopt.ops import literals
from graphopt.ops.axes import Broadcast, Created
from graphopt.ops.info import Kind, OpInfo, rows

__all__ = ["ROWS"]

CONSTANTS = """
    arange arange.start arange.start_step scalar_tensor eye eye.m linspace full_like zeros_like ones_like
    tril_indices triu_indices hann_window hann_window.periodic hamming_window hamming_window.periodic
    blackman_window blackman_window.periodic empty_like
"""
# The values of an empty tensor are unspecified: whoever reads one may get any.
SIZED = "empty.memory_format new_empty full zeros ones new_full new_zeros new_ones"
GENERATORS = """
    rand randn randint randint.low randperm rand_like randn_like randint_like randint_like.low_dtype bernoulli
    bernoulli.p bernoulli.Tensor multinomial normal.Tensor_Tensor normal.Tensor_float normal.float_Tensor
    normal.float_float normal_functional uniform exponential poisson
"""
DROPOUTS = "dropout feature_dropout alpha_dropout feature_alpha_dropout"

ROWS: dict[str, OpInfo] = {
    **rows(CONSTANTS, OpInfo(Kind.CREATION, Created())),
    **rows(SIZED, OpInfo(Kind.CREATION, Created(), literals=literals.output_sizes("size"))),
    **rows(GENERATORS, OpInfo(Kind.RANDOM, Created(), random=True)),
    **rows(DROPOUTS, OpInfo(Kind.RANDOM, Broadcast(("input",)), work=2, training="train", probability="p")),
    **rows("rrelu", OpInfo(Kind.RANDOM, Broadcast(("self",)), work=2, training="training")),
}
