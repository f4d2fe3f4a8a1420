"""What `graphopt build` tells of the code that it made, and its choice of exactness."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tools.command import NETS, graphopt, output, refused


def test_verbose_names_what_no_kernel_took(tmp_path: Path) -> None:
    result = graphopt("build", f"{NETS}:running_sum", "-o", tmp_path / "bundle", "--threads", 1, "--verbose")
    assert result.exit_code == 0
    assert "kernels wrote 1 function: product 1\n" in result.stderr
    assert "no kernel for 1 function, which the general schedule wrote:\n  cumsum\n" in result.stderr
    assert "cumsum" not in result.stdout


def test_json_holds_the_functions_of_every_rule(tmp_path: Path) -> None:
    found = output("build", f"{NETS}:running_sum", "-o", tmp_path / "bundle", "--threads", 1)
    assert found["coverage"]["general"] == ["cumsum"] and len(found["coverage"]["rules"]["product"]) == 1
    assert found["exact_float"] is False


def test_exact_code_is_recorded(tmp_path: Path) -> None:
    build = ("build", f"{NETS}:running_sum", "-o", tmp_path / "bundle", "--threads", 1, "--exact-float")
    assert output(*build)["exact_float"] is True
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["exact_float"] is True


def test_a_backend_that_cannot_promise_it_refuses_before_anything_is_read(tmp_path: Path) -> None:
    build = ("build", "none.onnx", "-o", tmp_path / "bundle", "--backend", "onnxruntime", "--exact-float")
    refused(graphopt(*build), 2, "does not know exact floating point", "'tvm' or 'reference'")


def test_numbers_are_compared_and_times_taken_when_asked(tmp_path: Path) -> None:
    build = ("build", f"{NETS}:running_sum", "-o", tmp_path / "bundle", "--threads", 1)
    found = output(*build)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert 0 <= manifest["check"]["error"] < 1e-5 and manifest["check"] == found["check"]
    assert "latency" not in manifest and found["latency"] is None
    found = output(*build, "--no-check", "--measure")
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert "check" not in manifest and found["check"] is None
    assert 0 < manifest["latency"]["q1"] <= manifest["latency"]["ms"] <= manifest["latency"]["q3"]


def test_code_that_gives_other_numbers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.backends.tvm import TvmArtifact

    run = TvmArtifact.run
    build = ("build", f"{NETS}:running_sum", "-o", tmp_path / "bundle", "--threads", 1)
    for factor, code in ((1.00001, 0), (1.01, 1)):
        monkeypatch.setattr(TvmArtifact, "run", lambda self, x, f=factor: [result * f for result in run(self, x)])
        result = graphopt(*build)
        assert result.exit_code == code
        assert (tmp_path / "bundle").exists() == (code == 0)
        if code:
            refused(result, 1, "differs by 1.0e-02 of the largest output", "--no-check")
        else:
            shutil.rmtree(tmp_path / "bundle")


def test_errors_are_rounded_up_to_one_digit() -> None:
    from graphopt.tools.trial import _rounded_up

    assert [_rounded_up(x) for x in (0.0, 1e-7, 1.01e-7, 9.5e-7, 3.2e-4)] == [0.0, 1e-7, 2e-7, 1e-6, 4e-4]
