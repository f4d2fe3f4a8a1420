"""What `graphopt build` tells of the code that it made, and its choice of exactness."""

from __future__ import annotations

import json
from pathlib import Path

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
