"""Inputs at the edges: infinities, NaN, ties, large and small numbers, mixed and narrow integer dtypes.

Each case is `(function, input)`; all are compiled as one model.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor | tuple[Tensor, ...]]

INFINITE = torch.tensor(
    [[[-inf, -inf, -inf, -inf], [1.0, -inf, inf, 2.0], [-inf, 3.0, -1.0, 0.0], [0.0, -0.0, inf, inf]]]
)
NANS = torch.tensor([[1.0, nan, 3.0, -2.0], [0.0, 5.0, nan, 1.0]])
FAR = torch.tensor([-1e30, -200.0, -88.0, -20.0, -1e-7, 0.0, 1e-8, 1e-4, 20.5, 88.0, 200.0, 1e30])
PAIRS = torch.tensor([[1.0, 0.6, -1.0, 0.3, 7.0, -0.9, 1e6, 3.3], [0.1, 0.2, 0.1, -0.1, 0.7, 0.3, 0.1, 1.1]])
TIES = torch.tensor([[2.0, 1.0, 2.0, 1.0, 1.0, 2.0], [0.0, -0.0, 0.0, -1.0, 1.0, -0.0]])

EXTREMES: dict[str, tuple[Function, Tensor]] = {
    f"{name}_{kind}": (function, values)
    for kind, values in {"infinite": INFINITE, "nan": NANS, "ties": TIES}.items()
    for name, function in {
        "amax": lambda x: x.amax(-1),
        "amin": lambda x: (-x).amin(-1),
        "max_dim": lambda x: tuple(x.max(-1)),
        "min_dim": lambda x: tuple(x.min(-1)),
        "argmax": lambda x: x.argmax(-1),
        "argmin": lambda x: (-x).argmin(),
        "maximum": lambda x: torch.maximum(x, x.flip(-1)),
        "minimum": lambda x: torch.minimum(x, x.flip(-1)),
        "max_pool": lambda x: F.max_pool1d(x, 2),
        "max_pool_pad": lambda x: F.max_pool1d(x, 3, 2, 1),
        "adaptive_max": lambda x: F.adaptive_max_pool1d(x, 3),
        "sort": lambda x: tuple(torch.sort(x, stable=True)),
        "sort_down": lambda x: tuple(torch.sort(x, descending=True, stable=True)),
        "topk": lambda x: x.topk(3)[0],
        "relu": F.relu,
        "relu6": F.relu6,
        "clamp": lambda x: x.clamp(-1, 2),
        "clamp_tensor": lambda x: torch.clamp(x, max=x.flip(-1)),
        "hardtanh": F.hardtanh,
        "hardsigmoid": F.hardsigmoid,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "threshold": lambda x: F.threshold(x, 0.5, 9.0),
        "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
        "sign": torch.sign,
        "abs": torch.abs,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "erf": torch.erf,
        "exp": torch.exp,
        "logsumexp": lambda x: x.logsumexp(-1),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "eq": lambda x: x == x.flip(-1),
        "ne": lambda x: x != x.flip(-1),
        "ne_scalar": lambda x: x != 1,
        "not_ne": lambda x: torch.logical_not(x != x),
        "eq_itself": lambda x: x == x,
        "le_itself": lambda x: x <= x,
        "lt": lambda x: x < x.flip(-1),
        "le": lambda x: x <= x.flip(-1),
        "not_lt": lambda x: ~(x < x.flip(-1)),
        "minus_itself": lambda x: x - x,
        "over_itself": lambda x: x / x,
        "times_zero": lambda x: x * 0,
        "max_chain": lambda x: torch.maximum(torch.maximum(x, x.flip(-1)), x),
        "clamp_relu": lambda x: F.relu(x.clamp(-1, 2)),
        "ge": lambda x: x >= 1,
        "isnan": torch.isnan,
        "isinf": torch.isinf,
        "isfinite": torch.isfinite,
        "to_bool": lambda x: x.bool(),
        "logical_not": torch.logical_not,
        "any": lambda x: x.any(-1),
        "all": lambda x: x.all(-1),
        "where": lambda x: torch.where(x > 0, x, -x),
        "nan_to_num": torch.nan_to_num,
        "sum": lambda x: x.sum(-1),
        "cumsum": lambda x: x.cumsum(0),
        "square": lambda x: x**2,
        "pow_zero": lambda x: x**0,
        "norm": lambda x: x.norm(dim=-1),
        "norm_inf": lambda x: torch.linalg.vector_norm(x, inf, -1),
    }.items()
}

FAR_AWAY: dict[str, tuple[Function, Tensor]] = {
    name: (function, FAR)
    for name, function in {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softplus": F.softplus,
        "mish": F.mish,
        "logsigmoid": F.logsigmoid,
        "elu": F.elu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "erf": torch.erf,
        "softmax": lambda x: x.softmax(0),
        "log_softmax": lambda x: x.log_softmax(0),
        "log1p": lambda x: torch.log1p(x.abs()),
        "softsign": F.softsign,
        "atan": torch.atan,
    }.items()
}

ARITHMETIC: dict[str, tuple[Function, Tensor]] = {
    "floor_divide": (lambda p: p[0] // p[1], PAIRS),
    "floor_divide_double": (lambda p: p[0] // p[1], PAIRS.double()),
    "div_trunc": (lambda p: torch.div(p[0], p[1], rounding_mode="trunc"), PAIRS),
    "remainder": (lambda p: torch.remainder(p[0], p[1]), PAIRS),
    "fmod": (lambda p: torch.fmod(p[0], p[1]), PAIRS),
    "fmod_infinite": (lambda x: torch.fmod(x, inf), PAIRS),
    "round_half": (torch.round, torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 2.4999])),
    "pow_of_negative": (lambda x: x**2.5, torch.tensor([-1.0, 0.0, 2.0])),
    "cube_of_integer": (lambda x: x**3, torch.tensor([-3, 0, 2])),
    "large_int64": (lambda a: a * 3 + 1, torch.tensor([2**40, -(2**41)])),
    "int32_overflow": (lambda a: a * 3, torch.tensor([2**30], dtype=torch.int32)),
    "uint8_wraps": (lambda a: a - 5, torch.tensor([3, 200], dtype=torch.uint8)),
    "int_to_float": (lambda a: a.float() / 3, torch.tensor([2**40, -7])),
    "float_to_int": (lambda a: a.long(), torch.tensor([-1.7, 1.7, 2.5])),
    "compare_int_with_float": (lambda a: (a > 2.5, a == 3.0), torch.tensor([2, 3, 4])),
    "int_true_division": (lambda a: a / 2, torch.tensor([3, -5])),
    "clamp_int_by_float": (lambda a: a.clamp(0.5, 2.5), torch.tensor([0, 1, 2, 3])),
    "where_promotes": (lambda a: torch.where(a > 1, a, 0.5), torch.tensor([0, 1, 2, 3])),
    "prod_of_int32": (lambda a: a.prod(), torch.tensor([2, 3, 4], dtype=torch.int32)),
    "max_of_bool": (lambda a: (a > 2).amax(0), torch.tensor([1, 3])),
    "max_of_low_int64": (lambda a: a.max(), torch.tensor([-(2**62), -(2**61)])),
    "mean_of_many_halves": (lambda a: a.half().mean(), torch.full((70000,), 2.0)),
    "sum_of_many_halves": (lambda a: a.half().sum(0), torch.full((5000,), 3.0)),
    "zero_d": (lambda a: a * a + 1, torch.tensor(3.0)),
    "no_elements": (lambda x: (torch.cat([x, x[:0]]), x[:0].sum(0)), torch.ones(2, 3)),
    "fill_infinite": (lambda a: a.masked_fill(a > 1, -inf), torch.tensor([0.0, 2.0])),
    "broadcast_mask": (lambda a: a.masked_fill(a[:1] > 1, 7), torch.tensor([[0.0, 2.0], [3.0, 4.0]])),
    "attention_all_masked": (
        lambda q: F.scaled_dot_product_attention(q, q, q, q[..., :3] * 0 - inf),
        torch.rand(1, 2, 3, 4) + 1,
    ),
    "attention_some_masked": (
        lambda q: F.scaled_dot_product_attention(q, q, q, q[..., :3] > 1.5),
        torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)) + 1,
    ),
}

CASES = {
    **EXTREMES,
    **{f"far_{name}": case for name, case in FAR_AWAY.items()},
    **{f"arithmetic_{name}": case for name, case in ARITHMETIC.items()},
}
