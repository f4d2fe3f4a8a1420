"""What building for another machine needs: its compiler, and TVM's runtime out of wheels. What is missing is named."""

from __future__ import annotations

import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from graphopt.backends.tvm.bundle import toolchain, wheels
from graphopt.errors import UnsupportedError, UsageError
from tests.tools.command import NETS, graphopt, refused

TVM, FFI = version("apache-tvm"), version("apache-tvm-ffi")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no wheels from elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(wheels.VARIABLE, raising=False)
    return wheels.cache()


def elf(machine: int) -> bytes:
    return b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little") + bytes(44)


def make_wheels(folder: Path, machine: int, platform: str = "manylinux_2_28_aarch64") -> list[Path]:
    """Two wheels that hold libraries with nothing in them but the name of a machine."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, package in ((f"apache_tvm-{TVM}", "apache-tvm"), (f"apache_tvm_ffi-{FFI}", "apache-tvm-ffi")):
        path = folder / f"{name}-py3-none-{platform}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for of, place in wheels.LIBRARIES.values():
                if of == package:
                    archive.writestr(place, elf(machine))
        made.append(path)
    return made


def test_missing_wheels_are_named_with_the_command_that_fetches_them() -> None:
    with pytest.raises(UsageError, match="TVM's runtime for aarch64 is missing") as caught:
        wheels.libraries("aarch64")
    text = str(caught.value)
    for part in (f"apache-tvm {TVM}", f"apache-tvm-ffi {FFI}", "manylinux_2_28_aarch64", "pip download --no-deps"):
        assert part in text
    assert f"apache-tvm=={TVM} apache-tvm-ffi=={FFI}" in text and "--runtime-wheel" in text


def test_architectures_without_published_wheels_say_so() -> None:
    for ask in (wheels.libraries, wheels.fetch):
        with pytest.raises(UnsupportedError, match="runtime for armv7 is missing") as caught:
            ask("armv7")
        assert "are published for armv7" in str(caught.value) and "linux_armv7" in str(caught.value)


def test_wheels_are_found_in_the_variable_and_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_wheels(tmp_path / "given", 183)
    monkeypatch.setenv(wheels.VARIABLE, str(tmp_path / "given"))
    assert set(wheels.libraries("aarch64")) == set(wheels.LIBRARIES)
    monkeypatch.setenv(wheels.VARIABLE, f"{first}:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match="apache-tvm-ffi") as caught:
        wheels.libraries("aarch64")
    assert f"apache-tvm {TVM}" not in str(caught.value), "only the one that is missing is named"
    wheels.add(second)
    assert all(content == elf(183) for content in wheels.libraries("aarch64").values())
    with pytest.raises(UnsupportedError):
        wheels.libraries("riscv64")


def test_wheels_of_32_bit_arm_are_tagged_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheels(tmp_path / "given", 40, "linux_armv7l")
    monkeypatch.setenv(wheels.VARIABLE, str(tmp_path / "given"))
    assert set(wheels.libraries("armv7")) == set(wheels.LIBRARIES)


def test_wheels_that_hold_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tvm, _ = make_wheels(tmp_path / "given", 62)
    monkeypatch.setenv(wheels.VARIABLE, str(tmp_path / "given"))
    with pytest.raises(UsageError, match="is damaged") as caught:
        wheels.libraries("aarch64")
    assert "is no library for aarch64" in str(caught.value)
    tvm.write_bytes(b"PK nothing")
    with pytest.raises(UsageError, match="is damaged"):
        wheels.libraries("aarch64")
    with pytest.raises(UsageError, match="is damaged"):
        wheels.add(tvm)


@pytest.mark.parametrize("name", ["apache_tvm-0.1-py3-none-manylinux_2_28_aarch64.whl", "numpy-2.0-py3-none-any.whl"])
def test_wheels_of_other_versions_and_packages_are_not_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=f"'{name}' is not a wheel of apache-tvm {TVM} or"):
        wheels.add(tmp_path / name)
    with pytest.raises(UsageError, match="there is no wheel"):
        wheels.add(tmp_path / f"x{name}")


def test_pip_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match="pip cannot download apache-tvm and apache-tvm-ffi for aarch64") as caught:
        wheels.fetch("aarch64")
    assert "No matching distribution" in str(caught.value)


def test_a_compiler_that_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for arch, package in (("aarch64", "g++-aarch64-linux-gnu"), ("armv7", "g++-arm-linux-gnueabihf")):
        with pytest.raises(UsageError, match=f"there is no C\\+\\+ compiler for {arch}") as caught:
            toolchain.compiler(arch)
        assert package in str(caught.value)


def test_the_command_refuses_before_it_reads_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = ("build", "none.onnx", "-o", tmp_path / "out", "--target")
    refused(graphopt(*build, "cortex-a72"), 2, "runtime for aarch64 is missing")
    refused(graphopt(*build, "armv7"), 3, "runtime for armv7 is missing")
    refused(graphopt(*build, "cpu", "--runtime-wheel", tmp_path / "x.whl"), 2, "there is no wheel")
    monkeypatch.setenv("PATH", "/nowhere")
    refused(graphopt(*build, "cortex-a72"), 2, "no C++ compiler for aarch64", "g++-aarch64-linux-gnu")
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_is_given_is_kept_for_later_builds(own_cache: Path, tmp_path: Path) -> None:
    tvm, ffi = make_wheels(tmp_path / "given", 183)
    options = ("--runtime-wheel", tvm, "--runtime-wheel", ffi)
    build = ("build", "none.onnx", "-o", tmp_path / "out", "--target", "cortex-a72")
    refused(graphopt(*build, *options), 2, "none.onnx")  # all parts are here: the model is what is missing
    assert sorted(path.name for path in own_cache.iterdir()) == [tvm.name, ffi.name]
    refused(graphopt(*build), 2, "none.onnx")


def test_the_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(toolchain, "_compiled", lambda command: commands.append(command) or b"a program")
    assert toolchain.program("x86_64") == toolchain.program("x86_64") == b"a program"
    assert [command[0] for command in commands] == [toolchain.compiler("x86_64")]


def test_a_linker_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bin" / "g++"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(toolchain, "program", lambda _arch: b"")
    monkeypatch.setenv("PATH", str(broken.parent))
    result = graphopt("build", f"{NETS}:running_sum", "-o", tmp_path / "out", "--threads", 1)
    refused(result, 2, "cannot be linked", "No space left on device")
    assert not (tmp_path / "out").exists()
