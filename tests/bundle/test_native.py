"""The parts that the C++ loader has of its own (SHA-256, JSON, .npy, sizes, features), against Python's."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graphopt import cpus
from graphopt.backends.tvm.bundle import toolchain
from graphopt.errors import LoadError
from graphopt.signature import size_of
from graphopt.target import Target
from tests.bundle.cross import emulator

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Probe:
    """The program of native_probe.cc: one question, one answer."""

    def __init__(self, folder: Path) -> None:
        toolchain.lay_out(folder, toolchain.sources())
        source = Path(__file__).with_name("native_probe.cc")
        command = [toolchain.compiler(Target.parse("cpu").arch), "-std=c++17", "-O1", "-g", "-Wall", *SANITIZERS]
        command += [f"-I{folder}", f"-I{folder}/include", str(source), "-o", str(folder / "probe")]
        subprocess.run(command, check=True, capture_output=True)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([folder / "probe"], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        self.folder = folder

    def __call__(self, question: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"it died of: {question}"
        return answer.rstrip("\n")

    def of_file(self, what: str, content: bytes) -> str:
        (self.folder / "content").write_bytes(content)
        return self(f"{what} {self.folder / 'content'}")


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Probe]:
    made = Probe(tmp_path_factory.mktemp("probe"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    assert made.process.wait(10) == 0


@pytest.mark.parametrize("size", [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256(size: int, probe: Probe) -> None:
    content = np.random.default_rng(size).bytes(size)
    assert probe.of_file("sha256", content) == hashlib.sha256(content).hexdigest()
    assert probe.of_file("plainly", content) == hashlib.sha256(content).hexdigest()


_SHA2 = {"x86_64": "sha_ni", "aarch64": "sha2"}


def test_a_processor_that_has_instructions_for_sha256_is_known(probe: Probe) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    name = _SHA2.get(Target.parse("cpu").arch, "none")
    assert probe(f"feature {name}") == ("yes" if name in flags else "no")


def test_sha256_on_arm(tmp_path: Path) -> None:
    """By the instructions for it, which the processor that qemu stands for has, and without them."""
    words = emulator("aarch64")
    compiler = toolchain.compiler("aarch64")
    toolchain.lay_out(tmp_path, toolchain.sources())
    source, program = Path(__file__).with_name("native_probe.cc"), tmp_path / "probe"
    includes = (f"-I{tmp_path}", f"-I{tmp_path}/include")
    subprocess.run([compiler, "-std=c++17", "-O2", "-Wall", "-static", *includes, source, "-o", program], check=True)
    content = np.random.default_rng(0).bytes(5000)
    (tmp_path / "content").write_bytes(content)
    asked = f"feature sha2\nsha256 {tmp_path}/content\nplainly {tmp_path}/content\n"
    command = [words[0], "-cpu", "cortex-a72", program]
    told = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout.split()
    assert told == ["yes", *[hashlib.sha256(content).hexdigest()] * 2]


def shown(value: Any) -> str:
    """A JSON value as the probe writes it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return "real"
    if isinstance(value, str):
        return '"' + "".join(f"{byte} " for byte in value.encode()) + '"'
    if isinstance(value, list):
        return "[" + "".join(f"{shown(item)}," for item in value) + "]"
    return "{" + "".join(f"{shown(name)}:{shown(item)}," for name, item in value.items()) + "}"


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | _TEXT
_JSON = st.recursive(_LEAVES, lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner), max_leaves=12)


@settings(max_examples=100, deadline=None)
@example(value=5e-324, indent=None, ascii_only=True)
@example(value=[-1e-310, 1.7976931348623157e308], indent=None, ascii_only=True)
@given(value=_JSON, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_json(value: Any, indent: int | None, ascii_only: bool, probe: Probe) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if "Infinity" not in text:
        assert probe.of_file("json", text.encode()) == shown(value)


BAD_JSON = (
    *(
        "",
        "{",
        '{"a"',
        '{"a":}',
        '{"a":1,}',
        "[1,]",
        "[1",
        '"',
        '"\\x"',
        '"\\u12"',
        "tru",
        "1 2",
        "-",
        "1e",
        "1e999",
        "nul",
        "\x00",
    ),
    *('{"a":1,"a":2}', "[" * 100 + "]" * 100, "9" * 30, '"\\ud800"', '"\n"'),
)


@pytest.mark.parametrize("text", BAD_JSON)
def test_json_that_is_none(text: str, probe: Probe) -> None:
    assert probe.of_file("json", text.encode()).startswith("refused: the manifest is damaged")


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=40) | st.text('{}[]",:0123456789truefalsn\\u -.', max_size=40).map(str.encode))
def test_any_bytes_are_json_or_are_refused(content: bytes, probe: Probe) -> None:
    assert probe.of_file("json", content)


_NAMES = {"batch": 3, "h": 17, "w0": 8}
_ATOMS = st.sampled_from([*_NAMES, "0", "1", "2", "7", "100"])
_SIZES = st.recursive(
    _ATOMS,
    lambda e: (
        st.tuples(e, st.sampled_from(["+", "-", "*", "//", "%"]), e).map(lambda t: f"({t[0]}){t[1]}({t[2]})")
        | st.tuples(e, st.sampled_from(["+", "-", "*"]), e).map(" ".join)
        | e.map(lambda t: f"-({t})")
        | e.map(lambda t: f"({t})**2")
        | st.tuples(st.sampled_from(["max", "min"]), e, e).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
    ),
    max_leaves=6,
)
_CONDITIONS = st.tuples(_SIZES, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), _SIZES).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(expression=_SIZES | _CONDITIONS)
def test_sizes(expression: str, probe: Probe) -> None:
    answer = probe(f"size {expression}|{','.join(f'{name}={value}' for name, value in _NAMES.items())}")
    try:
        expected = int(size_of(expression, _NAMES))
    except ZeroDivisionError:
        assert answer.startswith("refused")
        return
    if abs(expected) < 2**62 and not answer.startswith("refused"):
        assert int(answer) == expected
    else:  # numbers beyond 64 bits may have come up on the way
        assert abs(expected) >= 2**62 or "**" in expression or expression.count("*") > 3


@pytest.mark.parametrize("expression", ["", "x", "2*", "(1", "1)", "batch batch", "f(1)", "2**-1", "9" * 20, "(" * 200])
def test_sizes_that_are_none(expression: str, probe: Probe) -> None:
    assert probe(f"size {expression}|batch=3").startswith("refused: the manifest is damaged")
    with pytest.raises((LoadError, RecursionError, MemoryError, AssertionError)):
        value = size_of(expression, {"batch": 3})
        assert isinstance(value, int) and abs(value) < 2**62


@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3), (1, 2, 3, 4)])
def test_arrays_are_copied(dtype: str, shape: tuple[int, ...], probe: Probe) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    np.save(probe.folder / "array.npy", array)
    assert probe(f"npy {probe.folder}/array.npy {probe.folder}/copy.npy") == "done"
    copy = np.load(probe.folder / "copy.npy")
    assert copy.dtype == array.dtype and copy.shape == array.shape and np.array_equal(copy, array)


def test_arrays_that_cannot_be_read(probe: Probe) -> None:
    path = probe.folder / "array.npy"
    for array, text in (
        (np.asfortranarray(np.ones((2, 3))), "column order"),
        (np.ones(3, ">f4"), "'>f4'"),
        (np.ones(3, "c8"), "'<c8'"),
    ):
        np.save(path, array)
        assert text in probe(f"npy {path} {path}.copy")
    np.save(path, np.ones((3, 4)))
    whole = path.read_bytes()
    for size in (0, 5, 9, 20, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        answer = probe(f"npy {path} {path}.copy")
        assert answer.startswith("refused") and str(path) in answer
    assert "cannot be read" in probe(f"npy {probe.folder}/none.npy {path}.copy")


def test_features_are_those_that_linux_names(probe: Probe) -> None:
    here = Target.parse("cpu")
    known = cpus.known_features(here.arch)
    assert {name for name in known if probe(f"feature {name}") == "yes"} == here.needs & known
    assert probe("feature nonsense") == "no"
