"""What kernels need to know of the GPU that they are written for."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.target import Target

__all__ = ["Gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as a kernel sees it.

    Attributes:
        arch: such as `sm_90`.
        clusters: whether blocks form clusters that reach each other's shared memory.
    """

    arch: str
    clusters: bool

    @classmethod
    def of(cls, target: Target) -> Gpu:
        return cls(target.arch, int(target.arch.removeprefix("sm_").rstrip("af")) >= 90)
