"""The latency benchmark on a net of two layers and on made-up numbers; no time is asserted."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import beside, latency, latency_table
from benchmarks.latency_case import Case, measure, timing
from benchmarks.latency_engines import ENGINES, RIVALS, Built
from benchmarks.latency_models import MODELS, OnnxSubject, TorchSubject
from graphopt.errors import UsageError
from tests.compare import relative_error

FACTS = {
    "machine": {"processor": "A processor", "cores": 2, "memory_gb": 8.0},
    "versions": {"python": "3.11", "torch": "2.13.0"},
}


def small() -> TorchSubject:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return TorchSubject(net, (torch.randn(1, 3, 8, 8),))


def refuses(*_: object) -> Built:
    raise ValueError("an engine that refuses\nevery and/or model, see /some/folder/file.py")


def is_off(subject: TorchSubject, *_: object) -> Built:
    return Built(lambda: [subject.net(*subject.args) * 1.5])


def breaks_later(*_: object) -> Built:
    outcomes = iter([torch.zeros(1, 5)])
    return Built(lambda: next(outcomes))


def has_two_outputs(*_: object) -> Built:
    return Built(lambda: [torch.zeros(1, 5), torch.zeros(1, 5)])


@pytest.fixture(scope="module")
def measured() -> dict:
    odd = {"refuses": refuses, "is-off": is_off, "breaks-later": breaks_later, "has-two-outputs": has_two_outputs}
    names = ("ours", "ours-dynamic", "onnxruntime", "eager", *odd)
    threads = torch.get_num_threads()
    try:
        return measure(Case("small", 1, 1, 2, names), small(), ENGINES | odd, pause=0.0)
    finally:
        torch.set_num_threads(threads)


def test_what_is_measured(measured: dict) -> None:
    engines = json.loads(json.dumps(measured))["engines"]
    for name in ("ours", "ours-dynamic", "onnxruntime", "eager"):
        row = engines[name]
        assert row["min_ms"] <= row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["after_pause_ms"] > 0
        assert row["samples"] >= 2 and row["ready_seconds"] >= 0 and row["error"] < 1e-5
    for name in ("ours", "ours-dynamic"):
        assert {"capture_seconds", "exact_seconds", "compile_seconds", "weight_mb"} <= engines[name].keys()
        assert engines[name]["memory_peak_mb"] >= engines[name]["memory_before_mb"] > 0
    roofline = engines["ours"]["roofline"]
    assert (
        0 < roofline["allowed_ms"] == pytest.approx(sum(allowed for _, allowed in roofline["rules"].values()), rel=0.01)
    )
    assert {"convolution", "product"} <= roofline["rules"].keys() and "roofline" not in engines["ours-dynamic"]
    assert roofline["gflop"] == pytest.approx(2e-9 * (8 * 36 * 27 + 8 * 36 * 5), abs=1e-4)
    assert measured["rounds"] == 2 and measured["onnx_export_seconds"] > 0
    assert (measured["model"], measured["batch"], measured["threads"]) == ("small", 1, 1)


def test_engines_that_fail_stay(measured: dict) -> None:
    engines = measured["engines"]
    assert engines["refuses"] == {"failed": "ValueError: an engine that refuses every and/or model, see file.py"}
    assert engines["breaks-later"] == {"failed": "StopIteration:"}
    assert engines["has-two-outputs"] == {"failed": "ValueError: 2 outputs instead of 1"}
    assert engines["is-off"]["error"] == pytest.approx(0.5)


def test_a_failing_export_fails_the_engines_that_need_it() -> None:
    class Unexportable(TorchSubject):
        def write_onnx(self, folder: Path) -> Path:
            raise NotImplementedError("no ONNX for this")

    subject = Unexportable(nn.Identity(), (torch.ones(1, 2),))
    engines = measure(Case("x", 1, torch.get_num_threads(), 1, ("onnxruntime", "eager")), subject, ENGINES, 0.0)[
        "engines"
    ]
    assert engines["onnxruntime"] == {"failed": "NotImplementedError: no ONNX for this"}
    assert engines["eager"]["error"] == 0


def test_timing() -> None:
    row = timing([0.001, 0.002, 0.003, 0.004, 0.010])
    assert row == {"median_ms": 3.0, "q1_ms": 2.0, "q3_ms": 4.0, "min_ms": 1.0, "samples": 5}
    assert timing([0.5])["q3_ms"] == 500


def test_a_case_that_fails_leaves_a_record() -> None:
    case = Case("no such model", 1, 1, 1, ("ours",))
    row = latency.run_apart(case)
    assert row["failed"] == "KeyError: 'no such model'" and row["model"] == "no such model"
    assert latency.is_done(case, {case.key: row}, "") is False


def test_a_process_that_dies_says_what_it_was_doing() -> None:
    script = "import os, sys; print('first\\nx: ours', file=sys.stderr, flush=True); os.abort()"
    assert latency._run([sys.executable, "-c", script], os.environ) == "the process ended with -6 after: x: ours"


def test_onnx_files_get_the_sizes_of_the_case(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n.0", 3, "h", "w"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
    path = tmp_path / "open.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    subject = OnnxSubject(path, (torch.randn(2, 3, 8, 4),))
    (tmp_path / "fixed").mkdir()
    (value,) = onnx.load(subject.write_onnx(tmp_path / "fixed")).graph.input
    assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == [2, 3, 8, 4]
    assert subject.capture().signature.tensor_inputs[0].dims == (2, 3, 8, 4)
    first, *rest = subject.capture(free_batch=True).signature.tensor_inputs[0].dims
    assert not isinstance(first, int) and rest == [3, 8, 4]
    output: Tensor = subject.module(*subject.args)
    assert relative_error(output, subject.args[0].relu()) == 0


def engine(median: float, error: float | None = 1e-7) -> dict:
    stages = dict.fromkeys(("capture_seconds", "exact_seconds", "compile_seconds", "ready_seconds"), 1.0)
    memory = {"weight_mb": 10.0, "memory_before_mb": 100.0, "memory_peak_mb": 180.0}
    return {"median_ms": median, "error": error, **stages, **memory}


def case(model: str, **engines: dict) -> dict:
    return {"model": model, "batch": 1, "threads": 2, "commit": "abc-dirty", "engines": engines}


def results() -> dict:
    """Ratios 2 and 1/2; a third net on which ours failed, a fourth of which the whole process did."""
    f32 = "openvino-f32"
    roofline = {"gflops_per_second": 90.0, "gb_per_second": 20.0, "gflop": 0.3, "mb_moved": 8.0, "allowed_ms": 4.0}
    rules = {"rules": {"product": [3.0, 2.5], "depthwise": [1.5, 1.5], "between kernels": [0.5, 0.0], "pool": [0.1, 0]}}
    rows = [
        case(
            "a",
            ours=engine(5) | {"roofline": roofline | rules},
            onnxruntime=engine(12),
            inductor=engine(10),
            **{f32: engine(20)},
            eager=engine(1),
        ),
        case("b", ours=engine(8), onnxruntime=engine(4), inductor=engine(2, error=0.1), **{f32: engine(3, error=None)}),
        case("c", ours={"failed": "UnsupportedError: a | b c"}, onnxruntime=engine(150.4)),
        {"model": "d", "batch": 1, "threads": 2, "commit": "abc", "engines": ["ours"], "failed": "it crashed"},
        case("a", ours=engine(4), onnxruntime=engine(1)) | {"batch": 8},
    ]
    return FACTS | {"cases": {f"{row['model']}{row['batch']}": row for row in rows}}


def test_summary() -> None:
    first, second = latency_table.summaries(results())
    assert (first.batch, first.threads, second.batch) == (1, 2, 8)
    assert first.ratios == {"a": 2.0, "b": 0.5} and first.mean == pytest.approx(1.0) and first.worst == "b"
    assert [row.best for row in first.rows] == ["inductor", "onnxruntime", "onnxruntime", None]
    assert first.verdict == "Geometric mean of 2 ratios 1.00, worst 0.50 (b); without c, d."
    assert second.mean == 0.25


def test_the_page_is_made_anew_between_its_markers(capsys: pytest.CaptureFixture[str]) -> None:
    text = f"before\n{latency_table.BEGIN}\nold\n{latency_table.END}\nafter\n"
    once = latency_table.page(text, [results()])
    assert latency_table.page(once, [results()]) == once
    assert once.startswith("before\n") and once.endswith("after\n") and "old" not in once
    assert "| a | 5 | 12 | 20 | 10 | 1 | inductor | 2.00 |" in once
    assert "| b | 8 | 4 | (3) | (2) |  | onnxruntime | 0.50 |" in once
    assert "| c | failed | 150 |" in once
    assert "- c, batch 1, 2 threads, ours: `UnsupportedError: a | b c`" in once
    assert "- d, batch 1, 2 threads, ours: `it crashed`" in once
    assert "| a | 1.0 | 1.0 | 1.0 | 10 | 80 |" in once
    assert "| a | 0.3 | 8 | 4 | 5 | 80% | 2.50 | product 0.5, between kernels 0.5, pool 0.1 |" in once
    with pytest.raises(ValueError, match="needs"):
        latency_table.page("no markers", [results()])
    latency_table.print_tables(results())
    assert "Geometric mean of 2 ratios 1.00" in capsys.readouterr().out


def test_first_calls_after_a_pause_have_a_table_where_they_were_kept() -> None:
    text, found = f"{latency_table.BEGIN}\n{latency_table.END}", results()
    assert "after a pause" not in latency_table.page(text, [found])
    engines = found["cases"]["a1"]["engines"]
    firsts = {"ours": 8.0, "onnxruntime": 20.0, "inductor": 12.0, "eager": 3.0}
    for name, first in firsts.items():
        engines[name] |= {"after_pause_ms": first}
    found["cases"]["b1"]["engines"]["ours"] |= {"after_pause_ms": 9.0}  # the others failed or are not right
    made = latency_table.page(text, [found])
    assert made.count("after a pause") == 1
    assert "| model | ours | onnxruntime | inductor | eager | best other / ours |" in made
    assert "| a | 8 | 20 | 12 | 3 | 1.50 |" in made and "| b | 9 |  |  |  |  |" in made


def test_results_of_several_machines_stand_one_after_the_other(tmp_path: Path) -> None:
    text = f"{latency_table.BEGIN}\n{latency_table.END}"
    assert latency_table.read(tmp_path / "latency.json") == []
    assert "Not measured yet." in latency_table.page(text, [])
    for name, bits in (("latency.json", 512), ("latency-older.json", 256), ("lowrank_latency.json", 128)):
        found = results()
        found["machine"] = found["machine"] | {"processor": "CPU", "target": {"vector_bits": bits}}
        (tmp_path / name).write_text(json.dumps(found))
    made = latency_table.page(text, latency_table.read(tmp_path / "latency.json"))
    assert re.findall("^### (.*)", made, re.M) == ["CPU, vectors of 512 bits", "CPU, vectors of 256 bits"]
    assert made.count("#### Batch 1, 2 threads") == 2


def test_the_page_is_current() -> None:
    text = latency_table.PAGE.read_text()
    assert latency_table.page(text, latency_table.read()) == text, "run: python -m benchmarks.latency_table"


def test_the_table_of_busy_machines_is_current() -> None:
    text, results = beside.PAGE.read_text(), json.loads(beside.RESULTS.read_text())
    assert beside.page(text, results) == text, "run: python -m benchmarks.beside --table"
    rows = [line for line in beside.table(results).splitlines() if line.startswith("| ") and "model" not in line]
    assert len(rows) == len(beside.MODELS) * len(beside.BUSY)


def test_busy_processes_end() -> None:
    with beside.busy_processes(2) as busy:
        assert [process.poll() for process in busy] == [None, None]
    assert all(process.returncode is not None for process in busy)


def test_what_is_measured_again(tmp_path: Path) -> None:
    wanted = Case("a", 1, 2, 3, ("ours", "onnxruntime"))
    held = {wanted.key: case("a", ours=engine(1), onnxruntime=engine(2))}
    assert latency.is_done(wanted, held, "abc")
    assert not latency.is_done(wanted, held, "def")
    assert not latency.is_done(Case("a", 1, 2, 3, ("ours", "inductor")), held, "abc")
    assert not latency.is_done(Case("a", 8, 2, 3, ("ours",)), held, "abc")
    path = tmp_path / "deep/results.json"
    assert latency.earlier(path, FACTS) == {}
    latency.write(path, FACTS, held)
    assert latency.earlier(path, FACTS) == held and [file.name for file in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(UsageError, match="another machine"):
        latency.earlier(path, FACTS | {"versions": {"torch": "3"}})
    with pytest.raises(UsageError, match="another machine"):
        latency.earlier(path, FACTS | {"machine": FACTS["machine"] | {"target": {"l3": 8 << 20}}})


def test_choices(capsys: pytest.CaptureFixture[str]) -> None:
    options = latency.parse(
        ["--models", "resnet18", "--batch", "1,8", "--threads", "2", "--others", "eager", "--dynamic"]
    )
    chosen = list(latency.cases(options))
    assert [(one.batch, one.engines) for one in chosen] == [
        (1, ("ours", "ours-dynamic", "eager")),
        (8, ("ours", "eager")),
    ]
    assert len(list(latency.cases(latency.parse([])))) == len(MODELS) * 4 == 16 * 4
    assert set(RIVALS) < set(latency.OTHERS)
    for wrong in (["--models", "resnet"], ["--others", "ours"], ["--threads", "0"]):
        with pytest.raises(SystemExit):
            latency.parse(wrong)
    assert "there is no model 'resnet'" in capsys.readouterr().err
