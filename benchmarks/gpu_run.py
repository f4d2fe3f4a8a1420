"""The second half of the GPU benchmark: checks and times what the first half made, against what is installed there."""

from __future__ import annotations

import copy
import json
import lzma
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_models import Case, inputs, make, with_buffers
from benchmarks.gpu_verify import run_checks
from graphopt.backend import load_artifact

__all__ = ["run"]

ROUNDS, CALLS = 25, 20
"""Rounds of all contestants in turn, and calls in a row whose time is taken together."""

ALLOWED = {"float16": 1e-2, "bfloat16": 8e-2, "float32": 1e-4}
"""Errors relative to the largest output, unless eager torch errs as much in the same dtype."""

ROUNDED = 1.5

Runner = Callable[[], Any]


def run(folder: Path, out: Path, seconds: float, compiled: bool, profiles: bool = False) -> list[str]:
    """Measure every case into a JSON file, which is written anew after each. Returns what is wrong.

    Args:
        seconds: no case is begun, and none is compiled by torch, when so much time has passed.
        compiled: whether to have torch compile the models as well.
        profiles: whether to add the time of every kernel of ours.
    """
    deadline = time.monotonic() + seconds
    made = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    cases = [Case(**case) for case in made["cases"] if (folder / case_name(case) / "manifest.json").is_file()]
    results: dict[str, Any] = {"machine": _machine(), "built": made, "tensorrt": _tensorrt(), "cases": {}}
    if (folder / "checks").is_dir():
        results["checks"] = run_checks(folder / "checks")
        _write(out, results)
    subjects = []
    for case in cases:
        if time.monotonic() < deadline:
            subject = _Subject(folder, case)
            results["cases"][case.name] = subject.checked()
            if profiles:
                results["cases"][case.name]["kernels"] = subject.kernels()
            subjects.append(subject)
            _write(out, results)
    for with_torch in (False, True) if compiled else (False,):
        for subject in subjects:
            if time.monotonic() < deadline:
                results["cases"][subject.case.name].update(subject.timed(with_torch))
                _write(out, results)
    everything = {**results["cases"], **results.get("checks", {})}
    return [f"{name}: {found.get('error', 'failed')}" for name, found in everything.items() if not found["right"]]


def case_name(case: dict[str, Any]) -> str:
    return Case(**case).name


def _write(out: Path, results: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1), encoding="utf-8")


class _Subject:
    """One case: the artifact, and torch's module with the same weights on the GPU."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.args = tuple(arg.cuda() for arg in inputs(case))
        net = with_buffers(make(case.model), np.load(folder / f"{case.model}.npz"))
        self.net = net.to(case.torch_dtype).cuda()
        self.artifact = _load(folder, case)

    def checked(self) -> dict[str, Any]:
        """Errors of ours and of eager torch, relative to the largest reference output."""
        reference = torch.from_numpy(np.load(self.folder / f"{self.case.name}.npy"))
        start = time.perf_counter()
        first = self._output(self.artifact(*self.args))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        again = self._output(self.artifact(*self.args))
        with torch.inference_mode():
            eager = self._output(self.net(*self.args))
        error = _error(again, reference, self.case.batch)
        eager_error = _error(eager, reference, self.case.batch)
        found = {
            "error": error,
            "error_first_call": _error(first, reference, self.case.batch),
            "error_eager": eager_error,
            "right": bool(error <= max(ALLOWED[self.case.dtype], ROUNDED * eager_error)),
            "first_call_s": round(seconds, 3),
        }
        print(self.case.name, {k: f"{v:.2e}" if isinstance(v, float) else v for k, v in found.items()}, flush=True)
        return found

    def _output(self, result: Any) -> Tensor:
        while not isinstance(result, Tensor):
            result = result[0]
        return result

    def kernels(self) -> dict[str, Any]:
        """Microseconds and number of calls of every kernel of one run, the longest first."""
        from torch.profiler import ProfilerActivity, profile

        calls = 10
        runner = self._ours()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(calls):
                runner()
            torch.cuda.synchronize()
        rows = sorted(recorded.key_averages(), key=lambda row: -row.self_device_time_total)
        return {row.key: {"us": row.self_device_time_total / calls, "calls": row.count / calls} for row in rows}

    def timed(self, compiled: bool) -> dict[str, Any]:
        """Medians and quartiles, all contestants in turn."""
        runners = {"ours": self._ours()} | ({} if compiled else self._eager())
        compile_s = None
        if compiled:
            start = time.perf_counter()
            try:
                runners["inductor"] = self._inductor()
            except Exception as error:  # whatever torch raises, the others are still worth measuring
                return {"inductor_error": f"{type(error).__name__}: {str(error)[:300]}"}
            compile_s = round(time.perf_counter() - start, 1)
        times = _measured(runners)
        key = "with_inductor" if compiled else "times"
        shown = {name: (row["latency_us"]["median"], row["queued_us"]["median"]) for name, row in times.items()}
        print(self.case.name, shown, flush=True)
        return {key: times} | ({"inductor_compile_s": compile_s} if compiled else {})

    def _ours(self) -> Runner:
        artifact, tensors = self.artifact, list(self.args)
        return lambda: artifact.run(tensors)

    def _eager(self) -> dict[str, Runner]:
        runners = {"eager": _inference(self.net, self.args)}
        if self.args[0].dim() == 4 and self.case.model != "deit_tiny":
            last: Any = torch.channels_last
            net = copy.deepcopy(self.net).to(memory_format=last)
            args = tuple(arg.to(memory_format=last) for arg in self.args)
            runners["eager-channels-last"] = _inference(net, args)
        runners["eager-graph"] = _graphed(self.net, self.args)
        return runners

    def _inductor(self) -> Runner:
        """TorchInductor with CUDA graphs, which is its fastest way at small batches."""
        torch._dynamo.reset()
        compiled: Any = torch.compile(self.net, mode="reduce-overhead", dynamic=False)
        call = _inference(compiled, self.args)
        for _ in range(4):
            call()
        return call


def _inference(net: Any, args: tuple[Tensor, ...]) -> Runner:
    def call() -> Any:
        with torch.inference_mode():
            return net(*args)

    return call


def _graphed(net: nn.Module, args: tuple[Tensor, ...]) -> Runner:
    """Eager torch's kernels captured as one CUDA graph."""
    side: Any = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):
            net(*args)
    torch.cuda.current_stream().wait_stream(side)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        net(*args)
    replay: Runner = graph.replay
    return replay


def _load(folder: Path, case: Case) -> Any:
    """The artifact with its weights, which are put together in a temporary folder."""
    with tempfile.TemporaryDirectory() as room:
        whole = Path(room) / case.name
        shutil.copytree(folder / case.name, whole)
        if not (whole / "weights.bin").is_file():
            digest = json.loads((whole / "manifest.json").read_text())["sha256"]["weights.bin"]
            with lzma.open(folder / "weights" / f"{digest}.xz") as file, (whole / "weights.bin").open("wb") as to:
                shutil.copyfileobj(file, to)
        artifact = load_artifact(whole)
        artifact.machine()  # type: ignore[attr-defined]  # of a GPU: reads everything now
        return artifact


def _error(result: Tensor, reference: Tensor, batch: int) -> float:
    """Of the first and the last sample; infinite where a number is none."""
    chosen = result[sorted({0, batch - 1})].detach().float().cpu()
    if not bool(torch.isfinite(chosen).all()):
        return float("inf")
    return float((chosen - reference).abs().max() / reference.abs().max())


def _measured(runners: dict[str, Runner]) -> dict[str, Any]:
    """For each: wall-clock microseconds of single calls that are waited for, and the GPU's of calls in a row."""
    for runner in runners.values():
        for _ in range(5):
            runner()
    torch.cuda.synchronize()
    latency: dict[str, list[float]] = {name: [] for name in runners}
    queued: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                runner()
                torch.cuda.synchronize()
                latency[name].append((time.perf_counter() - start) * 1e6)
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(CALLS):
                runner()
            end.record()
            torch.cuda.synchronize()
            queued[name].append(begin.elapsed_time(end) / CALLS * 1e3)
    return {name: {"latency_us": _spread(latency[name]), "queued_us": _spread(queued[name])} for name in runners}


def _spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 2), "q1": round(q1, 2), "q3": round(q3, 2)}


def _machine() -> dict[str, Any]:
    found: Any = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "arch": f"sm_{found.major}{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "allow_tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }


def _tensorrt() -> str | None:
    """The version of TensorRT, where it is installed."""
    try:
        import tensorrt  # type: ignore[import-not-found]
    except ImportError:
        return None
    return str(tensorrt.__version__)
