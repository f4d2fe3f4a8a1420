"""Look at the code that is made for ARM: which instructions its hot loops are of, and how fast a model of the processor
takes them to be.

    python -m benchmarks.arm_code                        three nets for cortex-a72
    python -m benchmarks.arm_code mobilenet_v2 --target neoverse-n1

No board is at hand, so this stands in for time. A model is compiled for the target, linked and disassembled. A hot
loop is a loop without another one inside that multiplies and adds floating-point numbers. Counted in them are

    vector      multiply-adds of vectors (fmla), four float32 numbers each
    scalar      multiply-adds of single numbers (fmadd and relatives)
    separate    products of vectors that are not fused with a sum
    spill       vectors stored to or loaded from the stack

llvm-mca, where it is installed, estimates cycles from LLVM's model of the processor: every operand in the first cache,
every branch foreseen. Its number is a bound from below, not a time. `share` is that bound's multiply-adds per cycle
over those of a loop of nothing but independent multiply-adds, by the same model, each loop weighted by its
multiply-adds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import graphopt as go
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.backends.tvm.bundle import toolchain
from graphopt.target import Target

__all__ = ["Loop", "disassembled", "hot_loops", "loops_of", "mix"]

OBJDUMP = {"aarch64": "aarch64-linux-gnu-objdump", "armv7": "arm-linux-gnueabihf-objdump"}
NETS = ("mobilenet_v2", "resnet18", "minilm_128")

_LINE = re.compile(r"^\s*([0-9a-f]+):\s+(\S+)\s*([^/<]*)")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:")
_VECTOR = re.compile(r"^(fmla|fmls|vfma\.f32|vmla\.f32)$")
_SCALAR = re.compile(r"^(fn?madd|fn?msub)$")
_IN_VECTOR = re.compile(r"\bv\d+\.|\bq\d+")
_ITERATIONS = 100


@dataclass(frozen=True)
class Instruction:
    """At an address, a mnemonic and its operands."""

    address: int
    name: str
    operands: str


@dataclass(frozen=True)
class Loop:
    """The instructions from the target of a backward branch to the branch, in a function."""

    function: str
    body: tuple[Instruction, ...]

    def count(self, kind: str) -> int:
        return sum(kind_of(each) == kind for each in self.body)

    @property
    def assembler(self) -> str:
        """The loop as llvm-mca reads it, without branches, whose targets it does not know."""
        return "\n".join(f"{i.name} {i.operands}" for i in self.body if not _branches(i))


def _branches(instruction: Instruction) -> bool:
    name = instruction.name
    return (
        name in ("b", "cbz", "cbnz", "tbz", "tbnz", "bl", "blx", "ret", "bx")
        or name.startswith("b.")
        or (re.fullmatch(r"b(eq|ne|cs|cc|mi|pl|vs|vc|hi|ls|ge|lt|gt|le)(\.[nw])?", name) is not None)
    )


def kind_of(instruction: Instruction) -> str | None:
    """`vector`, `scalar`, `separate` or `spill`; None for all else."""
    name, operands = instruction.name, instruction.operands
    if _VECTOR.match(name):
        return "vector"
    if _SCALAR.match(name) or (name == "vfma.f32" and not _IN_VECTOR.search(operands)):
        return "scalar"
    if name in ("fmul", "vmul.f32"):
        return "separate" if _IN_VECTOR.search(operands) else "scalar"
    if re.match(r"(ldr|ldp|str|stp|ldur|stur|vldr|vstr|vldmia|vstmia)$", name) and re.search(r"\b[qd]\d+", operands):
        return "spill" if re.search(r"\[sp\b", operands) else None
    return None


def disassembled(library: Path, arch: str) -> dict[str, list[Instruction]]:
    """The instructions of every function of a library."""
    command = [OBJDUMP[arch], "-d", "--no-show-raw-insn", str(library)]
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if start := _FUNCTION.match(line):
            current = functions.setdefault(start[1], [])
        elif found := _LINE.match(line):
            current.append(Instruction(int(found[1], 16), found[2], found[3].strip()))
    return functions


def loops_of(function: str, code: list[Instruction]) -> Iterator[Loop]:
    """The loops without another loop inside."""
    places = {instruction.address: at for at, instruction in enumerate(code)}
    spans = []
    for end, instruction in enumerate(code):
        target = instruction.operands.split(",")[-1].strip()
        if _branches(instruction) and re.fullmatch(r"[0-9a-f]+", target):
            start = places.get(int(target, 16), end + 1)
            if start <= end:
                spans.append((start, end))
    for start, end in spans:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            yield Loop(function, tuple(code[start : end + 1]))


def hot_loops(library: Path, arch: str) -> list[Loop]:
    """The innermost loops that multiply and add."""
    loops = (loop for name, code in disassembled(library, arch).items() for loop in loops_of(name, code))
    return [loop for loop in loops if loop.count("vector") + loop.count("scalar")]


def mix(loops: list[Loop]) -> dict[str, int]:
    """Instructions of each kind in some loops."""
    return {kind: sum(loop.count(kind) for loop in loops) for kind in ("vector", "scalar", "separate", "spill")}


def cycles_of(assembler: str, cpu: str, triple: str) -> float | None:
    """Cycles of a round by llvm-mca; None where it does not know an instruction or the processor."""
    command = ["llvm-mca", f"-mtriple={triple}", f"-mcpu={cpu}", f"-iterations={_ITERATIONS}"]
    done = subprocess.run(command, input=assembler, capture_output=True, text=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(found[1]) / _ITERATIONS if found and done.returncode == 0 else None


def estimate(loops: list[Loop], target: Target) -> dict[str, float | int] | None:
    """What llvm-mca makes of the loops; None where there is no llvm-mca."""
    if shutil.which("llvm-mca") is None or target.arch != "aarch64":
        return None
    ideal = "\n".join(f"fmla v{i}.4s, v30.4s, v31.4s" for i in range(28))
    at_best = cycles_of(ideal, target.cpu, "aarch64-linux-gnu")
    known = [(loop.count("vector"), cycles_of(loop.assembler, target.cpu, "aarch64-linux-gnu")) for loop in loops]
    taken = [(count, cycles) for count, cycles in known if cycles]
    if at_best is None or not taken:
        return None
    total, cycles = sum(count for count, _ in taken), sum(cycles for _, cycles in taken)
    shares = sum(count * (count / cycles) for count, cycles in taken) / total / (28 / at_best)
    return {"loops": len(taken), "multiply-adds": total, "cycles": round(cycles), "share": round(shares, 3)}


def _looked_at(name: str, target: Target) -> dict[str, object]:
    from benchmarks.latency_models import build

    model, _ = go.run(build(name, 1).capture(), "exact")
    artifact = go.build(model, target)
    assert isinstance(artifact, TvmArtifact) and artifact.built is not None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "model.so"
        toolchain.link(artifact.built.executable, library, target.arch)
        loops = hot_loops(library, target.arch)
    return {"model": name, "hot loops": len(loops), **mix(loops), "llvm-mca": estimate(loops, target)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("models", nargs="*", default=list(NETS))
    parser.add_argument("--target", default="cortex-a72")
    options = parser.parse_args()
    for name in options.models:
        print(json.dumps({"target": options.target} | _looked_at(name, Target.parse(options.target))), flush=True)


if __name__ == "__main__":
    main()
