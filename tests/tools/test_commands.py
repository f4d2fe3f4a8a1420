"""What every command writes where, and how it ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command

import graphopt as go
from graphopt.analysis.cost import cost
from graphopt.backend import Timing
from graphopt.errors import GraphoptError
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.registry import get_pass, pass_names
from graphopt.tools import bench, console, rivals, sources
from graphopt.tools.main import app
from graphopt.tools.passes import outline
from tests.tools.command import NETS, graphopt, output, refused

ROOT = Path(__file__).resolve().parents[2]
PASSES = "fold-batch-norm,remove-identity"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


HEAVY = ("torch", "tvm", "onnx", "onnxruntime", "onnxscript", "transformers")
NOT_FOR_HELP = (*HEAVY, "numpy", "sympy", "safetensors", "scipy", "PIL")
"""What a command that only prints text has no use for."""


def main(*arguments: object, absent: tuple[str, ...] = HEAVY) -> str:
    """Code that runs a command and tells on stderr which of the packages it imported."""
    words = [str(argument) for argument in arguments]
    return (
        f"import sys; from graphopt.tools.main import app\ntry: app({words!r})\n"
        f"except SystemExit as end: found = [name for name in {absent!r} if name in sys.modules]\n"
        "print(found, file=sys.stderr)"
    )


@pytest.mark.parametrize(
    "words", [("--help",), ("passes",), ("targets",), ("opt", "--help"), ("repro", "--help"), ("--version",)]
)
def test_light_commands_import_nothing_heavy(words: tuple[str, ...]) -> None:
    done = python(main(*words, absent=NOT_FOR_HELP))
    assert done.stderr == "[]\n" and done.stdout


def test_help_names_every_command() -> None:
    result = graphopt("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("opt", "build", "run", "bench", "info", "passes", "explain", "repro"))


# opt


def test_opt_writes_the_model_and_reports(model_file: Path, tmp_path: Path) -> None:
    found = output("opt", model_file, "-p", PASSES, "-o", tmp_path / "out.gopt", "--time")
    before, after = go.load(model_file), go.load(tmp_path / "out.gopt")
    direct, reports = go.run(before, PASSES)
    assert str(after) == str(direct) and after.history == ("fold-batch-norm", "remove-identity")
    assert [len(row["edits"]) for row in found["reports"]] == [len(report.edits) for report in reports]
    assert found["reports"][0]["check"]["error"] < 1e-5 and found["timing"]["children"][0]["name"] == "fold-batch-norm"
    assert found["cost_before"]["parameters"] == 3130 and found["cost_after"]["operators"]["aten.relu.default"] == 1
    assert "nodes" not in found["cost_after"]


def test_opt_tables_go_to_stdout_and_talk_to_stderr(tmp_path: Path) -> None:
    out = tmp_path / "out.pt2"
    result = graphopt("opt", f"{NETS}:small", "-p", PASSES, "-o", out, "--print-after=change", "--time")
    assert result.exit_code == 0 and out.exists()
    assert "fold-batch-norm" in result.stdout and "multiply-accumulates" in result.stdout
    assert "may print" not in result.stdout and "%conv2d" not in result.stdout
    assert "// after fold-batch-norm" in result.stderr and "total  5 edits" in result.stderr
    assert result.stderr.endswith(f"wrote {out}: 5 edits\n")


def test_opt_dumps_limits_and_skips_checks(model_file: Path, tmp_path: Path) -> None:
    arguments = ("opt", model_file, "-p", PASSES, "-o", tmp_path / "out.gopt", "--dump-after", tmp_path / "dump")
    found = output(*arguments, "--no-check")
    assert [path.name for path in sorted((tmp_path / "dump").iterdir())] == [
        "000-fold-batch-norm.txt",
        "001-remove-identity.txt",
    ]
    assert all(row["check"] is None for row in found["reports"])
    limited = output(*arguments, "--limit", 0)
    assert sum(len(row["edits"]) for row in limited["reports"]) == 0


def test_opt_checks_on_the_given_batches(model_file: Path, x_file: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", input=np.load(x_file))
    calib = ("--calib", tmp_path / "calib.npz", "--calib", tmp_path / "calib.npz")
    found = output("opt", model_file, "-p", "fold-batch-norm", "-o", tmp_path / "out.gopt", *calib)
    assert found["reports"][0]["check"]["samples"] == 2


def test_a_failing_pass_leaves_a_reproducer_and_no_model(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, rw: object) -> None:
        raise GraphoptError("this pass fails")

    monkeypatch.setattr(FoldBatchNorm, "run", fail)
    result = graphopt("opt", model_file, "-p", PASSES, "-o", tmp_path / "out.gopt", "--repro", tmp_path / "repro")
    refused(result, 1, "'fold-batch-norm' failed: this pass fails", f"`graphopt repro {tmp_path / 'repro'}`")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["repro"]
    assert json.loads((tmp_path / "repro" / "repro.json").read_text())["pipeline"] == PASSES


# info, explain, passes, targets


def test_info_counts_what_cost_counts(model_file: Path) -> None:
    model = go.load(model_file)
    found = output("info", model_file, "--at", "batch=8", "--per", "node", "--graph")
    expected = cost(model, {"batch": 8})
    assert found["cost"]["macs"] == expected.macs and found["cost"]["operators"] == dict(expected.operators)
    assert [row["name"] for row in found["nodes"]] == [row.name for row in expected.nodes]
    assert found["signature"] == model.signature.to_json() and found["graph"] == str(model) and found["history"] == []


def test_info_tables(model_file: Path) -> None:
    result = graphopt("info", model_file, "--per", "module")
    assert result.exit_code == 0 and not result.stderr
    for text in ("input: float32[batch, 3, 8, 8]", "10656*batch", "batch_norm", "(whole)", "no pass has been applied"):
        assert text in result.stdout
    assert graphopt("info", model_file, "--graph").stdout == f"{go.load(model_file)}\n"


def test_info_names_barriers() -> None:
    result = graphopt("info", f"{NETS}:unknown")
    assert "special_bessel_j0" in result.stdout and "unknown operator" in result.stdout
    assert output("info", f"{NETS}:unknown")["cost"]["barriers"] == {"aten.special_bessel_j0.default": 1}


def test_explain_folds_reasons_and_counts_them(model_file: Path) -> None:
    found = output("explain", model_file, "-p", f"repeat({PASSES})")
    reports = go.run(go.load(model_file), f"repeat({PASSES})")[1]
    by_pass = {row["pass"]: row for row in found["passes"]}
    assert list(by_pass) == ["fold-batch-norm", "remove-identity"]
    assert sum(group["count"] for row in found["passes"] for group in row["edits"]) == sum(
        len(report.edits) for report in reports
    )
    assert by_pass["fold-batch-norm"]["runs"] == 2 and len(found["reports"]) == len(reports)
    text = graphopt("explain", model_file, "-p", PASSES).stdout
    assert (
        "fold-batch-norm: 3 edits, 0 misses\n" in text
        and "  + 1 x replace: folded into 'conv2d'\n      batch_norm\n" in text
    )


def test_explain_folds_reasons_that_differ_in_names() -> None:
    shown = graphopt("explain", f"{NETS}:norms", "-p", "fold-batch-norm")
    assert "  + 3 x replace: folded into '*'\n      batch_norm, batch_norm_1, batch_norm_2\n" in shown.stdout
    shown = graphopt("explain", f"{NETS}:norms", "-p", "fold-batch-norm", "--all")
    assert "      batch_norm_1: replace: folded into 'conv2d_1'\n" in shown.stdout


def test_passes_read_without_import_are_what_they_are() -> None:
    found = output("passes")
    assert [row["name"] for row in found["passes"]] == pass_names() and "exact" in found["presets"]
    for row in found["passes"]:
        cls = get_pass(row["name"])
        assert row == {"name": cls.name, "contract": str(cls.contract), "what": (cls.__doc__ or "").split("\n")[0]}
        assert vars(outline(row["name"])) == row


def test_a_pass_has_a_page() -> None:
    found = output("passes", "fold-batch-norm")
    assert found["contract"] == "exact" and "Algebra:" in found["page"]
    text = graphopt("passes", "fold-batch-norm").stdout
    assert text.startswith("fold-batch-norm (exact)\n\nFold batch normalisation")
    assert graphopt("passes", "exact").stdout.startswith("exact stands for repeat(")
    refused(graphopt("passes", "fold-batch"), 2, "there is no pass 'fold-batch'", "did you mean fold-batch-norm")


def test_targets_mark_this_machine() -> None:
    found = output("targets")
    assert [name for name, row in found.items() if row["this_machine"]] == ["cpu"] and "cortex-a72" in found
    assert "this machine" in graphopt("targets").stdout


# run, build, bench


def test_run_feeds_by_name(model_file: Path, x_file: Path, tmp_path: Path) -> None:
    (tmp_path / "y.npz").write_bytes(b"older")
    found = output("run", model_file, "--input", f"input={x_file}", "-o", tmp_path / "y.npz")
    assert found["outputs"] == [{"name": "output", "dtype": "float32", "shape": [4, 10]}]
    expected = go.load(model_file)(torch.from_numpy(np.load(x_file)))
    with np.load(tmp_path / "y.npz") as saved:
        assert saved.files == ["output"] and np.array_equal(saved["output"], expected.detach().numpy())
    np.savez(tmp_path / "all.npz", input=np.load(x_file))
    assert graphopt("run", model_file, "--inputs", tmp_path / "all.npz", "-o", tmp_path / "z.npz").exit_code == 0
    assert (tmp_path / "z.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


def test_a_bundle_runs_without_torch(model_file: Path, bundle: Path, x_file: Path, tmp_path: Path) -> None:
    done = python(main("run", bundle, "--input", f"input={x_file}", "-o", tmp_path / "y.npz"))
    assert "[]\n" in done.stderr, done.stderr
    with np.load(tmp_path / "y.npz") as saved:
        expected = go.load(model_file)(torch.from_numpy(np.load(x_file))).detach().numpy()
        assert np.abs(saved["output"] - expected).max() < 1e-5 * np.abs(expected).max()
    refused(graphopt("run", bundle, "-o", tmp_path / "y.npz", "--threads", 2), 2, "--threads were chosen when")


def test_build_tells_what_it_made(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["backend"] == "tvm" and manifest["threads"] == 1


def test_bench_takes_turns(model_file: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    measure = Timing.measure

    def note(function, *, rounds, warmup):
        turns.append(function.__defaults__[0].system)
        return measure(function, rounds=rounds, warmup=warmup)

    monkeypatch.setattr(Timing, "measure", note)
    monkeypatch.setattr(rivals, "is_installed", lambda name: False)
    arguments = ("bench", model_file, bundle, "--batch", 3, "--rounds", 4, "--threads", 1, "-p", "fold-batch-norm")
    found = output(*arguments, "--backend", "reference", "--against", "openvino")
    assert turns == ["reference", "bundle"] * 4
    assert [row["system"] for row in found["results"]] == ["reference", "bundle"] and found["threads"] == 1
    for row in found["results"]:
        assert row["inputs"] == [[3, 3, 8, 8]] and row["rounds"] == 4
        assert 0 < row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"]
    assert found["results"][0]["relative_error"] < 1e-5 and found["results"][1]["relative_error"] is None
    assert found["left_out"] == [{"source": str(model_file), "system": "openvino", "why": "not installed"}]
    assert found["machine"]["processor"] and {"graphopt", "torch", "onnxruntime"} <= set(found["versions"])


def test_bench_measures_inductor_the_same_way(model_file: Path) -> None:
    assert set(bench._OTHERS) == set(rivals.RIVALS) and rivals.is_installed("inductor")
    model = go.load(model_file)
    run = rivals._inductor(model, 1)
    with torch._dynamo.config.patch(disable=True):  # compiling takes half a minute and is not ours
        (result,) = run([x := torch.randn(2, 3, 8, 8)])
    assert torch.allclose(result, model(x))


# How commands end


def test_an_interrupt_ends_with_130(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: str, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.frontends.load", interrupt)
    assert graphopt("info", model_file).exit_code == 130


def test_a_reader_that_goes_away_is_no_error(model_file: Path) -> None:
    code = "from graphopt.tools.main import main; import sys; sys.argv = ['graphopt', 'passes', '--json']; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_a_full_stdout_is_one_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "graphopt.tools.main", "passes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: the system refused") and "Traceback" not in done.stderr
    )


def test_debug_adds_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_DEBUG", "1")
    result = graphopt("info", tmp_path / "missing.gopt")
    assert result.exit_code == 2 and "error: there is no file" in result.stderr and "Traceback" in result.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_for_the_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, patience, shown in ((Terminal(), 0.0, True), (Terminal(), 60.0, False), (io.StringIO(), 0.0, False)):
        monkeypatch.setattr(console, "_PATIENCE", patience)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with console.working("compiling"):
            print("talk of the body")
            import time

            time.sleep(0.3)
        assert ("compiling" in stream.getvalue()) == shown
        assert "talk of the body" in stream.getvalue()


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, coloured in ((None, True), ("1", False)):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm-256color")
        if wanted:
            monkeypatch.setenv("NO_COLOR", wanted)
        else:
            monkeypatch.delenv("NO_COLOR", raising=False)
        console.complain(GraphoptError("no"), as_json=False)
        assert ("\x1b[1;31m" in stream.getvalue()) == coloured


def test_completion_offers_passes() -> None:
    assert "fold-batch-norm" in sources._complete_pipeline("fold")
    assert sources._complete_pipeline("exact,fold-b") == ["exact,fold-batch-norm"]


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"a": [float("inf"), float("nan"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.0]}


def test_the_console_script_is_installed() -> None:
    script = shutil.which("graphopt", path=str(Path(sys.executable).parent))
    assert script is not None
    done = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert done.stdout == f"graphopt {go.__version__}\n"


def test_the_manual_has_every_command_and_option() -> None:
    manual = (ROOT / "docs" / "cli.md").read_text()
    for name, command in get_command(app).commands.items():
        section = manual.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert f"    graphopt {name}" in section, name
        options = [
            word for param in command.params for word in (*param.opts, *param.secondary_opts) if word[:2] == "--"
        ]
        missing = [word for word in options if word not in ("--json", "--help") and f"`{word}" not in section]
        assert not missing, f"{name}: {missing}"
