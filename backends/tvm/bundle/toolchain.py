"""Linking code for a machine, and compiling the program that runs it there: a C++ compiler for each architecture."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import platformdirs

from graphopt.errors import GraphoptError, UsageError
from graphopt.target import this_machine

__all__ = ["PROGRAM", "compiler", "lay_out", "link", "program", "sources"]

PROGRAM = "graphopt_run"

_COMPILERS = {
    "x86_64": ("x86_64-linux-gnu-g++", "g++-x86-64-linux-gnu"),
    "aarch64": ("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu"),
    "armv7": ("arm-linux-gnueabihf-g++", "g++-arm-linux-gnueabihf"),
    "riscv64": ("riscv64-linux-gnu-g++", "g++-riscv64-linux-gnu"),
}
"""The program, and Debian's package that has it."""

_HEADERS = ("dlpack/dlpack.h", "tvm/ffi/c_api.h")
"""What the program needs of the package apache-tvm-ffi."""

# The compiler's libraries become part of the program, as the device may have older ones, and stay out of sight of TVM's
# libraries, which use the device's.
_OPTIONS = ("-std=c++17", "-O2", "-s", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL")
_ARM = {"armv7": ("-march=armv7-a", "-mfpu=neon", "-mfloat-abi=hard")}


def compiler(arch: str) -> str:
    """The path of the C++ compiler for an architecture.

    Raises:
        UsageError: naming the package that has it.
    """
    name, package = _COMPILERS[arch]
    plain: tuple[str, ...] = ("g++", "c++", "clang++") if arch == this_machine().arch else ()
    for candidate in (*plain, name):
        found = shutil.which(candidate)
        if found:
            return found
    raise UsageError(
        f"there is no C++ compiler for {arch}",
        why=f"'{name}' is not on the PATH; it links the code of a model and compiles {PROGRAM}",
        todo=f"install it; on Debian and Ubuntu it is in the package {package}",
    )


def link(executable: Any, path: Path, arch: str) -> None:
    """Write TVM's executable as a shared library.

    Raises:
        UsageError: when the compiler is missing, or fails (for want of space, say).
    """
    from tvm.support import cc

    command = cc.cross_compiler(compiler(arch), options=["-Wl,--build-id=none"])
    try:
        executable.export_library(str(path), fcompile=command)
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if ": error" in line or "ld:" in line]
        raise UsageError(
            f"the code cannot be linked into '{path.name}'",
            why=(lines or str(error).strip().splitlines() or ["the compiler failed"])[0],
            todo="check that there is space, and that the compiler works",
        ) from error


def sources() -> dict[str, bytes]:
    """The program's sources by path, with the headers of others that they include."""
    native = files("graphopt.backends.tvm.bundle").joinpath("native")
    found = {entry.name: entry.read_bytes() for entry in native.iterdir() if _is_source(entry)}
    spec = find_spec("tvm_ffi")
    for name in _HEADERS:
        folders = (spec.submodule_search_locations or ()) if spec else ()
        places = [Path(folder) / "include" / name for folder in folders]
        here = [place for place in places if place.is_file()]
        if not here:
            raise GraphoptError(f"the header {name} is not installed", todo="install the package apache-tvm-ffi")
        found[f"include/{name}"] = here[0].read_bytes()
    return dict(sorted(found.items()))


def _is_source(entry: Traversable) -> bool:
    return entry.name.endswith((".h", ".cc", ".txt"))


def program(arch: str) -> bytes:
    """The program for an architecture, compiled once and then kept in the cache.

    Raises:
        UsageError: when the compiler is missing or fails.
    """
    command = [compiler(arch), *_OPTIONS, *_ARM.get(arch, ())]
    kept = platformdirs.user_cache_path("graphopt") / "programs" / _key(command) / PROGRAM
    if kept.is_file():
        return kept.read_bytes()
    content = _compiled(command)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_name(f".{PROGRAM}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(kept)
    return content


def _key(command: list[str]) -> str:
    """What the compiled program depends on, as one name."""
    sum_ = hashlib.sha256(repr((command, _version_of(command[0]))).encode())
    for name, content in sources().items():
        sum_.update(f"{name} {len(content)} ".encode() + content)
    return sum_.hexdigest()


@cache
def _version_of(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout


def _compiled(command: list[str]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        lay_out(Path(folder), sources())
        whole = [*command, "-Iinclude", f"{PROGRAM}.cc", "-o", PROGRAM, "-ldl"]
        done = subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["it told no reason"])[-1]
            raise UsageError(f"{command[0]} cannot compile {PROGRAM}", why=why)
        return (Path(folder) / PROGRAM).read_bytes()


def lay_out(folder: Path, content: dict[str, bytes]) -> None:
    """Write files by their paths below a folder."""
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
