"""What became of a weight: equal, in another order, sliced, scaled, in another layout or dtype, or different."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from graphopt.diff.slices import permutation, slices
from graphopt.diff.streaming import Distance, distance, wide
from graphopt.fake import dtype_name

__all__ = ["AxisMap", "Relation", "TensorDiff", "compare"]

Relation = Literal[
    "equal", "permuted", "sliced", "scaled", "transposed", "reshaped", "cast", "different", "resized", "unknown"
]

_ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""How far rounding may put a scaled tensor off, relative to its norm."""
_PROBES = 8
_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class AxisMap:
    """Which positions of an axis became which.

    `kept` are the positions of the longer side (of `a`, where both are as long) in the order of the other side.
    """

    axis: int
    size_a: int
    size_b: int
    kept: tuple[int, ...]

    @property
    def removed(self) -> tuple[int, ...]:
        """The positions of the longer side that the other does not have."""
        return tuple(sorted(set(range(max(self.size_a, self.size_b))) - set(self.kept)))

    def mirrored(self) -> AxisMap:
        kept = self.kept
        if self.size_a == self.size_b:
            kept = tuple(sorted(range(len(kept)), key=kept.__getitem__))
        return AxisMap(self.axis, self.size_b, self.size_a, kept)


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """Two stored tensors that belong together.

    Attributes:
        name_a, name_b: their names.
        relation: `equal` bit for bit; `permuted` and `sliced` along `axes`; `scaled` by `scale`, or by one factor for
            each position of `scale_axis`; `transposed` or `reshaped` with the same numbers; `cast` to another dtype;
            `different` numbers; `resized`: shapes that no slicing explains; `unknown` where there are no numbers.
        error: norm of the difference over the larger norm, after what the relation explains; `gap` is the same before.
            None where it cannot be said.
        largest: the largest absolute difference; `differing` is how many elements differ.
    """

    name_a: str
    name_b: str
    relation: Relation
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype_a: str
    dtype_b: str
    axes: tuple[AxisMap, ...] = ()
    scale: float | None = None
    scale_axis: int | None = None
    error: float | None = None
    gap: float | None = None
    largest: float | None = None
    differing: int | None = None
    norm_a: float | None = None
    norm_b: float | None = None

    def mirrored(self) -> TensorDiff:
        """The same seen from the other side."""
        return replace(
            self,
            name_a=self.name_b,
            name_b=self.name_a,
            shape_a=self.shape_b,
            shape_b=self.shape_a,
            dtype_a=self.dtype_b,
            dtype_b=self.dtype_a,
            axes=tuple(axis.mirrored() for axis in self.axes),
            scale=1 / self.scale if self.scale else self.scale,
            norm_a=self.norm_b,
            norm_b=self.norm_a,
        )

    def to_json(self) -> dict[str, Any]:
        rows = {key: value for key, value in asdict(self).items() if value is not None and value != ()}
        if self.axes:
            rows["axes"] = [asdict(axis) | {"removed": list(axis.removed)} for axis in self.axes]
        return rows


@dataclass(slots=True)
class _Finding:
    relation: Relation
    facts: dict[str, Any] = field(default_factory=dict)


def compare(a: torch.Tensor, b: torch.Tensor, name_a: str = "", name_b: str = "") -> TensorDiff:
    """Say how tensor `a` became tensor `b`."""
    found = _compare(a.detach(), b.detach())
    return TensorDiff(
        name_a,
        name_b,
        found.relation,
        tuple(a.shape),
        tuple(b.shape),
        dtype_name(a.dtype),
        dtype_name(b.dtype),
        **found.facts,
    )


def _compare(a: torch.Tensor, b: torch.Tensor) -> _Finding:
    same_shape = a.shape == b.shape
    if a.device.type == "meta" or b.device.type == "meta":
        return _Finding("unknown" if same_shape else "resized")
    if same_shape:
        if a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return _Finding("equal")
        return _same_shape(a, b)
    if a.numel() == b.numel() and a.dtype == b.dtype:
        matrices = [tensor.reshape([size for size in tensor.shape if size != 1]) for tensor in (a, b)]
        if matrices[0].shape == matrices[1].shape and distance(*matrices) is None:
            return _Finding("reshaped", {"error": 0.0})
        if matrices[0].dim() == 2 and torch.equal(matrices[0].T, matrices[1]):
            return _Finding("transposed", {"error": 0.0})
        if torch.equal(a.reshape(-1), b.reshape(-1)):
            return _Finding("reshaped", {"error": 0.0})
    large, small = (a, b) if a.numel() >= b.numel() else (b, a)
    kept = slices(large, small)
    if kept is None:
        return _Finding("resized")
    axes = tuple(AxisMap(axis, a.shape[axis], b.shape[axis], positions) for axis, positions in kept.items())
    return _Finding("sliced", {"axes": axes, "error": 0.0})


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> _Finding:
    gap = distance(a, b)
    if gap is None or (gap.squared == 0 and gap.differing == 0 and a.dtype == b.dtype):
        return _Finding("equal")  # zeros of either sign are equal too
    facts: dict[str, Any] = {
        "error": gap.relative,
        "gap": gap.relative,
        "largest": gap.largest,
        "differing": gap.differing,
        "norm_a": gap.norm_a,
        "norm_b": gap.norm_b,
    }
    if a.dtype != b.dtype:
        return _Finding("cast", facts)
    if a.dtype.is_floating_point and math.isfinite(gap.relative) and min(gap.squared_a, gap.squared_b) > 0:
        scaled = _scaled(a, b, gap)
        if scaled is not None:
            return _Finding("scaled", facts | scaled)
    if math.isclose(gap.squared_a, gap.squared_b, rel_tol=1e-4):
        if a.dim() == 2 and a.shape[0] == a.shape[1] and torch.equal(a.T, b):
            return _Finding("transposed", {"error": 0.0})
        maps = permutation(a, b)
        if maps is not None:
            axes = tuple(AxisMap(axis, a.shape[axis], a.shape[axis], order) for axis, order in maps.items())
            return _Finding("permuted", facts | {"axes": axes, "error": 0.0})
    return _Finding("different", facts)


def _scaled(a: torch.Tensor, b: torch.Tensor, gap: Distance) -> dict[str, Any] | None:
    """The factor, or the axis with one factor for each position, by which `b` is `a`."""
    limit = _ROUNDING.get(a.dtype, 2e-2)
    cosine = gap.inner / math.sqrt(gap.squared_a * gap.squared_b)
    if a.numel() > 1 and abs(cosine) > 1 - max(limit, 1e-5):
        # From the larger to the smaller side, so that either order of the two finds the same.
        x, y = (a, b) if gap.squared_a >= gap.squared_b else (b, a)
        factor = gap.inner / max(gap.squared_a, gap.squared_b)
        if _is_multiple(x, y, factor, limit):
            return {"scale": factor if x is a else 1 / factor, "error": 0.0}
    for axis in range(min(a.dim(), 2)):
        if a.numel() > a.shape[axis] and _scaled_along(a, b, axis, limit):
            return {"scale_axis": axis, "error": 0.0}
    return None


def _is_multiple(x: torch.Tensor, y: torch.Tensor, factor: float, limit: float) -> bool:
    """Whether `y` is `factor` times `x`; a few numbers are looked at before all are."""
    u, v = wide(x), wide(y)
    for step in (max(u.numel() // _SAMPLE, 1), 1):
        part_u, part_v = u[::step].double(), v[::step].double()
        # Next to nothing of a sample may happen to be next to nothing of the whole, so the sample is judged mildly.
        if float((part_v - factor * part_u).norm()) > (limit if step == 1 else 10 * limit) * float(part_v.norm()):
            return False
    return True


def _scaled_along(a: torch.Tensor, b: torch.Tensor, axis: int, limit: float) -> bool:
    """Whether every position of the axis is scaled by a factor of its own; a few positions are looked at first."""
    size = a.shape[axis]
    probe = torch.arange(0, size, max(size // _PROBES, 1))
    for positions in (probe, None):
        x, y = (tensor if positions is None else tensor.index_select(axis, positions) for tensor in (a, b))
        x, y = (tensor.movedim(axis, 0).flatten(1).double() for tensor in (x, y))
        norms = (x * x).sum(1) * (y * y).sum(1)
        rest = norms - (x * y).sum(1) ** 2
        if bool((rest > 1e2 * limit**2 * norms).any()):
            return False
        # A position may be all zero, but then on both sides: what is lost cannot be scaled back.
        if bool(((norms == 0) & ((x != 0).any(1) | (y != 0).any(1))).any()):
            return False
    return True
