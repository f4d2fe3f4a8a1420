"""CUDA source to machine code with nvcc, on a machine that need not have a GPU.

TVM keeps the source of the kernels in the library and asks a function for machine code when the library is first run.
Here that function only looks up what was compiled beforehand, so that no compiler is needed where the code runs.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from graphopt.errors import GraphoptError, UnsupportedError

__all__ = ["compiler", "machine_code", "name_of"]

_DEFAULT = Path("/usr/local/cuda/bin/nvcc")
_FLAGS = ("-cubin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-w")


def compiler() -> str | None:
    """The path of nvcc; None where it is not installed."""
    return shutil.which("nvcc") or (str(_DEFAULT) if _DEFAULT.is_file() else None)


def name_of(source: str) -> str:
    """What the machine code of a source is known by."""
    return hashlib.sha256(source.encode()).hexdigest()


def machine_code(source: str, arch: str) -> bytes:
    """The cubin of a CUDA source.

    Args:
        arch: such as `sm_90`.

    Raises:
        UnsupportedError: where nvcc is not installed.
        GraphoptError: when nvcc refuses the source.
    """
    nvcc = compiler()
    if nvcc is None:
        raise UnsupportedError(
            "GPU code cannot be compiled here",
            why="nvcc is neither on the PATH nor in /usr/local/cuda/bin",
            todo="install the CUDA toolkit (a GPU is not needed), or build for a CPU: --target cpu",
        )
    with tempfile.TemporaryDirectory() as folder:
        text, code = Path(folder) / "kernels.cu", Path(folder) / "kernels.cubin"
        text.write_text(source, encoding="utf-8")
        command = [nvcc, *_FLAGS, f"-arch={arch}", "-o", str(code), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise GraphoptError(
                f"nvcc does not accept the generated code for {arch}",
                where="\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000],
                why=f"{nvcc} ended with {done.returncode}",
                todo="check that nvcc knows this architecture (`nvcc --list-gpu-arch`); if so, please report it",
            )
        return code.read_bytes()
