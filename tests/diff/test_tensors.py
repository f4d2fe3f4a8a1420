"""What became of a tensor: every relation, and beside each what is nearly it."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.diff import histogram
from graphopt.diff.labels import fingerprint
from graphopt.diff.tensors import TensorDiff, compare

W = torch.randn(24, 10, 3, 3, generator=torch.Generator().manual_seed(0))
M = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
without_3_9 = [i for i in range(24) if i not in (3, 9)]
without_5 = [i for i in range(10) if i != 5]


def told(a: torch.Tensor, b: torch.Tensor) -> TensorDiff:
    there, back = compare(a, b, "a", "b"), compare(b, a, "b", "a")
    mirrored = back.mirrored()
    assert (there.relation, there.axes, there.scale_axis) == (mirrored.relation, mirrored.axes, mirrored.scale_axis)
    assert there.error == pytest.approx(mirrored.error) and there.largest == mirrored.largest
    assert there.scale == (None if mirrored.scale is None else pytest.approx(mirrored.scale))
    return there


def test_equal_means_every_bit_but_the_sign_of_zero() -> None:
    assert told(W, W.clone()).relation == "equal"
    zero = torch.tensor([0.0, 1.0])
    assert told(zero, torch.tensor([-0.0, 1.0])).relation == "equal"
    nan = torch.tensor([math.nan, 1.0])
    assert told(nan, nan.clone()).relation == "equal"
    near = W.clone()
    near[7, 3, 1, 2] += 1e-3
    found = told(W, near)
    assert (found.relation, found.differing) == ("different", 1)
    assert found.largest == pytest.approx(1e-3, rel=1e-3)
    assert found.error == pytest.approx(1e-3 / float(W.norm()), rel=1e-3)


def test_slices_name_what_is_gone() -> None:
    one = told(W, W[without_3_9])
    assert (one.relation, one.axes[0].axis, one.axes[0].removed) == ("sliced", 0, (3, 9))
    two = told(W, W[without_3_9][:, without_5])
    assert [(axis.axis, axis.removed) for axis in two.axes] == [(0, (3, 9)), (1, (5,))]
    assert told(W, W[:, :, 1:]).axes[0].axis == 2
    shuffled = told(W, W[[5, 1, 8]])
    assert (shuffled.relation, shuffled.axes[0].kept) == ("sliced", (5, 1, 8))
    near = W[without_3_9].clone()
    near[0, 0, 0, 0] += 1
    assert told(W, near).relation == "resized"
    assert told(W, torch.randn(22, 10, 3, 3)).relation == "resized"
    assert told(torch.zeros(6), torch.zeros(4)).axes[0].removed == (4, 5), "equal positions: the last are gone"


def test_permutations() -> None:
    order, columns = torch.randperm(24), torch.randperm(10)
    assert told(W, W[order]).axes[0].kept == tuple(order.tolist())
    both = told(W, W[order][:, columns])
    assert [axis.kept for axis in both.axes] == [tuple(order.tolist()), tuple(columns.tolist())]
    assert told(W[:, 0, 0, 0], W[order, 0, 0, 0]).relation == "permuted"
    near = W[order].clone()
    near[2, 1, 0, 0] = -near[2, 1, 0, 0]
    assert told(W, near).relation == "different"


def test_scales() -> None:
    assert told(W, W * 1.5).scale == pytest.approx(1.5)
    assert told(W, -W).scale == pytest.approx(-1)
    assert told(W, W * torch.rand(24, 1, 1, 1)).scale_axis == 0
    assert told(W, W * (0.5 + torch.rand(1, 10, 1, 1))).scale_axis == 1
    assert told(W.half(), (W.half() * 2)).scale == pytest.approx(2)
    near = W * torch.rand(24, 1, 1, 1)
    near[4, 0, 0, 0] += 0.1
    assert told(W, near).relation == "different"
    assert told(torch.randn(9), torch.randn(9)).relation == "different", (
        "any two vectors are scaled position by position"
    )


def test_layouts_and_dtypes() -> None:
    assert told(M, M.T.contiguous()).relation == "transposed"
    square = M[:20]
    assert told(square, square.T.contiguous()).relation == "transposed"
    assert told(M[0], M[0].reshape(1, 20, 1, 1)).relation == "reshaped"
    assert told(M, M.reshape(20, 30)).relation == "reshaped"
    cast = told(M, M.bfloat16())
    assert cast.relation == "cast" and 0 < cast.error < 0.01
    assert (cast.dtype_a, cast.dtype_b) == ("float32", "bfloat16")
    assert told(torch.arange(5), torch.arange(5) + 1).differing == 5
    assert told(torch.tensor([True, False]), torch.tensor([True, True])).relation == "different"
    assert told(torch.randn(3, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)).relation == "different"


def test_what_has_no_numbers() -> None:
    meta = torch.empty(3, 4, device="meta")
    assert told(meta, torch.randn(3, 4)).relation == "unknown"
    assert told(meta, torch.empty(3, 5, device="meta")).relation == "resized"
    assert told(torch.empty(0, 3), torch.empty(0, 3)).relation == "equal"
    assert told(torch.empty(0, 3), torch.empty(0, 4)).relation != "equal"
    assert told(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])).error == math.inf


def test_long_tensors_are_read_in_pieces() -> None:
    long = torch.arange(600_001, dtype=torch.float32)
    near = long.clone()
    near[-1] = 0
    found = told(long, near)
    assert (found.relation, found.differing, found.largest) == ("different", 1, 600_000.0)
    assert found.norm_a == pytest.approx(float(long.double().norm()), rel=1e-6)


def test_fingerprints() -> None:
    large = torch.randn(200, 300)
    assert fingerprint(large).digest == fingerprint(large.T.contiguous()).digest == fingerprint(large.clone()).digest
    assert fingerprint(large).digest != fingerprint(large + 1).digest
    assert fingerprint(torch.zeros(9)).plain and fingerprint(torch.empty(0)).plain and not fingerprint(large).plain
    assert fingerprint(torch.ones(80, 80)).plain


def test_histograms_share_their_range() -> None:
    found = histogram(torch.tensor([0.0, 1.0, 1.0, math.nan]), torch.tensor([[2.0, 4.0]]), bins=4)
    assert (found.low, found.high, found.a, found.b) == (0.0, 4.0, (1, 2, 0, 0), (0, 0, 1, 1))
    assert histogram(torch.ones(3), torch.ones(2), bins=2).a == (0, 3)
    assert histogram(torch.empty(0), torch.ones(2)) is None
    assert histogram(torch.empty(2, device="meta"), torch.ones(2)) is None
    assert histogram(torch.tensor([math.inf]), torch.tensor([math.nan])) is None
