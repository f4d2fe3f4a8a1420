"""The house: who imports whom, what is installed, what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "graphopt": "graphopt",
    "passes": "graphopt.passes",
    "backends": "graphopt.backends",
    "tools": "graphopt.tools",
}

# Each room of the core and the rooms it may import; `frontends`, `passes`, `backends` and `tools` come on top.
LAYERS = [
    {"errors", "names"},
    {"target", "cpus", "files", "precision", "signature", "space", "tree", "ops", "mapped", "manifest"},
    {"fake"},
    {"params"},
    {"model", "printer"},
    {"mode"},
    {"export", "verify"},
    {"sample", "graph_json", "analysis", "transform", "solve", "depth"},
    {"archive", "rewriter", "check", "registry", "backend"},
    {"match", "instruments", "repro", "surgery", "measure"},
    {"pipeline", "train"},
    {"deployed"},
    {"diff", "search"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of graphopt that are imported when `path` is: not those inside functions or for type checking."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for statement in body:
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("graphopt"):
                base = statement.module or ""
                found.update({base} | {f"{base}.{alias.name}" for alias in statement.names})
            elif isinstance(statement, ast.Import):
                found.update(alias.name for alias in statement.names if alias.name.startswith("graphopt"))
            elif isinstance(statement, ast.If) and "TYPE_CHECKING" not in ast.unparse(statement.test):
                visit(statement.body)

    visit(ast.parse(path.read_text()).body)
    return found & modules().keys()


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_who_may_import_whom() -> None:
    wrong = []
    for name, path in modules().items():
        own = room(name)
        for used in imports(path):
            other = room(used)
            if own == other or used == "graphopt":
                continue
            if own in LEVEL:
                sound = other in LEVEL and LEVEL[other] <= LEVEL[own]
                sound |= own == "export" and other == "frontends"
            elif own == "passes" or own == "backends" or own == "frontends":
                sound = other in LEVEL
            else:
                sound = own in ("tools", "")
            if not sound:
                wrong.append(f"{name} imports {used}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_room_has_a_place() -> None:
    rooms = {room(name) for name in modules()} - {""}
    assert rooms <= LEVEL.keys() | {"frontends", "passes", "backends", "tools"}, rooms - LEVEL.keys()


def test_listed_packages_are_the_folders() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {name for name, path in modules().items() if path.name == "__init__.py"}


def test_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        "/".join(name.split(".")) + ("/__init__.py" if path.name == "__init__.py" else ".py")
        for name, path in modules().items()
    }
    assert expected <= names, expected - names
    data = {"py.typed", "targets.json", "cpus.json", "backends/tvm/threads.ll", "backends/tvm/bundle/native/graphopt.h"}
    data |= {f"diff/page/{name}" for name in ("index.html", "style.css", "main.js", "vendor/elk-worker.min.js")}
    assert {f"graphopt/{name}" for name in data} <= names
    assert not {name.split("/")[0] for name in names if not name.startswith("graphopt")}


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    ).stdout.strip()


def test_import_is_light() -> None:
    for first, absent in (
        ("graphopt.signature, graphopt.errors", ("torch", "tvm", "onnx")),
        ("graphopt; graphopt.run", ("tvm", "onnx", "onnxruntime")),
    ):
        assert run_python(f"import sys, {first}; print([m for m in {absent} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("package", ["passes", "backends", "tools"])
def test_bare_import_is_refused(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0 and f"graphopt.{package}" in done.stderr


def test_public_names_exist() -> None:
    import graphopt

    assert all(getattr(graphopt, name) is not None for name in graphopt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        graphopt.nothing  # noqa: B018 - the access is the test
