"""Comparing numbers the way this project does: relative to the largest reference output."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils import _pytree as pytree


def relative_error(actual: Any, reference: Any) -> float:
    """Largest absolute difference over the largest absolute reference value, over all tensors of two equal trees.

    Integers and booleans must be equal. NaN must meet NaN, and an infinity the same infinity. NaN where the reference
    is finite is an infinite error.
    """
    ours, our_tree = pytree.tree_flatten(actual)
    theirs, their_tree = pytree.tree_flatten(reference)
    assert our_tree == their_tree, f"different structures: {our_tree} and {their_tree}"
    worst = scale = 0.0
    for ours_leaf, theirs_leaf in zip(ours, theirs, strict=True):
        if not isinstance(theirs_leaf, torch.Tensor):
            assert ours_leaf == theirs_leaf, f"{ours_leaf!r} is not {theirs_leaf!r}"
            continue
        difference, largest = _difference(ours_leaf, theirs_leaf)
        worst, scale = max(worst, difference), max(scale, largest)
    return worst / scale if scale else worst


def _difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    assert a.shape == b.shape, f"shape {tuple(a.shape)} is not {tuple(b.shape)}"
    assert a.dtype == b.dtype, f"dtype {a.dtype} is not {b.dtype}"
    if not b.dtype.is_floating_point:
        assert torch.equal(a, b), "integer outputs differ"
        return 0.0, 0.0
    x, y = a.detach().double(), b.detach().double()
    odd = ~torch.isfinite(y)
    same = (x == y) | (x.isnan() & y.isnan())
    assert bool(same[odd].all()), "infinities or NaN differ"
    x, y = x[~odd], y[~odd]
    if not y.numel():
        return 0.0, 0.0
    return float((x - y).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()), float(y.abs().max())
