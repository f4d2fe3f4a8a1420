"""A Python for aarch64 in qemu's user mode: another machine, as far as a fleet can tell.

It is put together in the user's cache, of Debian's packages and of wheels; what is pure Python is that of this one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import platformdirs
import pytest

__all__ = ["arm_python"]

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
WHEELS = ("apache-tvm", "apache-tvm-ffi", "numpy", "ml_dtypes", "psutil")
PURE = ("cloudpickle", "platformdirs", "typing_extensions")
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 24, 17)] + ["manylinux2014_aarch64"]
SOURCE = Path(__file__).parents[2]
SCRIPT = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
export PYTHONHOME="$here/root/usr" PYTHONPATH="$here/packages:$here/site" PYTHONSAFEPATH=1 LD_LIBRARY_PATH=
exec qemu-aarch64-static -0 "$here/python" -L "$here/root" "$here/root/usr/bin/python3" "$@"
"""
"""Python takes the zeroth argument for its own program, which it starts anew for other processes: this script."""


def arm_python() -> Path:
    """The program; the test is skipped where it cannot be had."""
    for program in ("qemu-aarch64-static", "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: there is no aarch64 Python to be had")
    kept = platformdirs.user_cache_path("graphopt") / f"arm-python-{version('apache-tvm')}"
    if not kept.exists():
        if os.environ.get("GRAPHOPT_OFFLINE", "0") not in ("", "0"):
            pytest.skip("an aarch64 Python is not in the cache, and GRAPHOPT_OFFLINE is set")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            _debian(Path(folder))
            _site(Path(folder))
            (Path(folder) / "python").write_text(SCRIPT)
            (Path(folder) / "python").chmod(0o755)
            Path(folder).rename(kept)
            Path(folder).mkdir()  # for the one that removes it
    _packages(kept / "packages")
    return kept / "python"


def _debian(folder: Path) -> None:
    """The system: Python and what it needs, unpacked and not installed."""
    places = {"State::Lists": "lists", "State::status": "status", "Cache": "cache"}
    options = [f"-oDir::{what}={folder / 'apt' / name}" for what, name in places.items()]
    options += ["-qq", "-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64"]
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / "apt" / name).mkdir(parents=True)
    (folder / "apt" / "status").touch()
    _call("apt-get", *options, "update")
    _call("apt-get", *options, "install", "-y", "--download-only", "--no-install-recommends", *PACKAGES)
    for package in sorted((folder / "apt" / "cache" / "archives").glob("*.deb")):
        _call("dpkg-deb", "-x", package, folder / "root")
    shutil.rmtree(folder / "apt")


def _site(folder: Path) -> None:
    """TVM's runtime and numpy for that system's Python."""
    python = (folder / "root/usr/bin/python3").readlink().name.removeprefix("python")
    wanted = [f"{name}=={version(name)}" for name in WHEELS]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    where = ["--python-version", python, *platforms, "-d", folder / "wheels"]
    _call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *where, *wanted)
    for wheel in (folder / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            names = [name for name in opened.namelist() if "libtvm_compiler" not in name]
            opened.extractall(folder / "site", names)
    shutil.rmtree(folder / "wheels")


def _packages(folder: Path) -> None:
    """What is tested, and pure packages, as links."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "graphopt").mkdir(parents=True)
    for entry in (SOURCE / "graphopt").iterdir():
        (folder / "graphopt" / entry.name).symlink_to(entry)
    for name in ("passes", "backends", "tools"):
        (folder / "graphopt" / name).symlink_to(SOURCE / name)
    for name in PURE:
        found = importlib.util.find_spec(name)
        if found is not None and found.origin is not None:
            place = Path(found.origin)
            place = place.parent if place.name == "__init__.py" else place
            (folder / place.name).symlink_to(place)


def _call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} does not give an aarch64 Python: {done.stderr.strip()[-500:]}")
