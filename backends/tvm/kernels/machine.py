"""What kernels need to know of the machine that they are written for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, UNTUNED, Choices, Tuned
from graphopt.target import Target

__all__ = ["Machine"]

_FEWEST_LANES = 4
"""Every CPU worth naming has vectors of 128 bits; targets may not say so."""

_REGISTERS = {"aarch64": 30, "armv7": 16, "riscv64": 8}
"""Vector registers for tiles. AArch64 has 32, two of which its loads of repeated numbers take (with all of them
in tiles, twice as many are spilled); x86-64 has 32 with AVX-512, else 16. RISC-V's are 32 scalars, four to a vector."""

_WORTH_HALVING = 0.9
"""Half as many lanes are twice as many instructions; they had better save some of the time."""

_USUAL_L1, _USUAL_L2 = 32 << 10, 512 << 10


@dataclass(frozen=True)
class Machine:
    """A CPU as a kernel sees it.

    Attributes:
        lanes: float32 numbers in a vector register.
        registers: vector registers.
        l1, l2: cache sizes of one core, bytes.
        threads: threads that the code will run on.
        exact: whether faster forms that round more are ruled out: Winograd's convolution, polynomials for exp.
        arch: the instruction set, as `Target.arch` names it.
        multiply_adds: of whole vectors, that a core does in a cycle.
        choices: what was measured to be best for the kernel at hand.
        tuned: all that was measured; `choices` are drawn from it.
    """

    lanes: int
    registers: int
    l1: int
    l2: int
    threads: int
    exact: bool = False
    arch: str = "x86_64"
    multiply_adds: int = 2
    choices: Choices = RULES_CHOOSE
    tuned: Tuned = field(default=UNTUNED, compare=False)

    @classmethod
    def of(cls, target: Target, threads: int, *, exact: bool = False, tuned: Tuned = UNTUNED) -> Machine:
        lanes = max(_FEWEST_LANES, target.vector_bits // 32)
        registers = _REGISTERS.get(target.arch, 16 if lanes < 16 else 32)
        caches = target.l1 or _USUAL_L1, target.l2 or _USUAL_L2
        multiply_adds = 1 if _in_halves(target) else 2
        return cls(
            lanes,
            registers,
            *caches,
            threads,
            exact,
            target.arch,
            multiply_adds=multiply_adds,
            tuned=tuned,
        )

    def of_lanes(self, lanes: int) -> Machine:
        """The machine as code with vectors of so many lanes, all of a register's or half as many, sees it."""
        if lanes == self.lanes:
            return self
        return replace(self, lanes=lanes, multiply_adds=2)

    def lanes_for(self, columns: int) -> int:
        """Lanes of the vectors in which to compute results of so many columns.

        Where a vector is computed in two halves anyway, half a vector takes half the time: no lanes need be empty.
        Other processors compute as many vectors in a cycle whatever their length.
        """
        half = self.lanes // 2
        if self.multiply_adds != 1:
            return self.lanes
        halves, wholes = -(-columns // half), -(-columns // self.lanes)
        return half if columns < self.lanes or halves / 2 < _WORTH_HALVING * wholes else self.lanes

    def untold(self) -> Machine:
        """The machine without choices for the kernel at hand."""
        return replace(self, choices=RULES_CHOOSE)

    def for_function(self, function: Any) -> Machine:
        """The machine with what is known of the best code for a fused function."""
        choices = self.tuned.choices(function)
        return self if choices == self.choices else replace(self, choices=choices)


def _in_halves(target: Target) -> bool:
    """Whether vectors of 512 bits are computed in two halves, as Zen 4 does (its extensions are those of no other)."""
    needs = target.needs
    return {"avx512_bf16", "avx512_vpopcntdq"} <= needs and not needs & {"avx_vnni", "amx_tile"}
