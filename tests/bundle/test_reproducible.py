"""The same model, target and versions give the same bytes, in every process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphopt.backends.tvm.bundle import toolchain
from graphopt.manifest import digests_of, read_manifest
from tests.bundle.cross import words_for

PROGRAM = """
import sys
import graphopt as go
from tests.bundle.test_targets import net_and_input
for target in sys.argv[2:]:
    go.build(net_and_input()[0], target, threads=2).save(f"{sys.argv[1]}/{target}")
"""


def test_two_processes_write_the_same(tmp_path: Path) -> None:
    targets = ("cpu", "cortex-a53")
    words_for("cortex-a53")
    written = []
    for seed in (1, 2):
        place = tmp_path / str(seed)
        place.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "TMPDIR": str(place)}
        command = [sys.executable, "-c", PROGRAM, str(place), *targets]
        subprocess.run(command, check=True, capture_output=True, env=environment)
        written.append({target: digests_of(place / target) for target in targets})
    assert written[0] == written[1]


def test_what_the_manifest_tells(tmp_path: Path) -> None:
    import graphopt as go
    from tests.bundle.test_targets import net_and_input

    model = net_and_input()[0]
    go.build(model, threads=2).save(tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    files = digests_of(tmp_path / "bundle")
    assert manifest["sha256"] == {n: d for n, d in files.items() if not n.startswith("manifest.")}
    assert {"model.so", "graphopt_run", "lib/libtvm_ffi.so", "src/graphopt.h", "src/CMakeLists.txt"} <= set(files)
    assert manifest["schema"] == 4 and manifest["threads"] == 2
    assert manifest["history"] == list(model.history) != []
    assert set(manifest["versions"]) == {"graphopt", "apache-tvm", "apache-tvm-ffi"}
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text()) == manifest
    done = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "bundle", capture_output=True)
    assert done.returncode == 0


def test_the_sources_in_a_bundle_make_its_program(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    toolchain.lay_out(tmp_path / "src", toolchain.sources())
    for command in (["cmake", "-S", "src", "-B", "build"], ["cmake", "--build", "build"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([tmp_path / "build" / "graphopt_run", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "graphopt_run: 'nowhere' is not a bundle, or was altered: manifest.json is missing or empty\n"
