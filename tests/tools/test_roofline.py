"""`graphopt bench --roofline`: counts are right, shares are shares; no time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.command import NETS, graphopt, output, refused


@pytest.fixture(autouse=True)
def small_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.tvm.ceilings._LEAST_COPY", 1 << 20)
    monkeypatch.setattr("graphopt.backends.tvm.ceilings._MOST_COPY", 1 << 20)
    monkeypatch.setattr("graphopt.backends.tvm.ceilings._STEPS", 1000)


def test_counts_shares_and_ceilings(model_file: Path) -> None:
    found = output("bench", model_file, "--roofline", "--batch", 3, "--rounds", 3, "--threads", 1)
    assert found["threads"] == 1 and all(value > 0 for value in found["ceilings"].values())
    (result,) = found["results"]
    kernels = result["kernels"]
    assert sum(kernel["flops"] or 0 for kernel in kernels) == 2 * 3 * (8 * 6 * 6 * 3 * 9 + 288 * 10)
    assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
    assert all(kernel["seconds"] > 0 and kernel["bytes"] > 0 for kernel in kernels if kernel["calls"])
    assert [kernel["calls"] for kernel in kernels].count(0) == 1, "what happens between the kernels"
    assert result["seconds"] > 0 and result["rounds"] == 3
    assert result["achieved"] == pytest.approx(result["allowed_seconds"] / result["seconds"])


def test_the_table_goes_to_stdout_and_the_sum_to_stderr() -> None:
    result = graphopt("bench", f"{NETS}:running_sum", "--roofline", "--rounds", 1, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert all(word in result.stdout for word in ("GFLOP/s", "GB/s", "cumsum", "linear", "(memory and shapes)"))
    assert "of it is achieved" in result.stderr


def test_what_cannot_be_looked_into(bundle: Path) -> None:
    refused(graphopt("bench", bundle, "--roofline"), 2, "is a bundle", "name the model")
    refused(graphopt("bench", "none.onnx", "--roofline", "--backend", "onnxruntime"), 2, "not of 'onnxruntime'")
