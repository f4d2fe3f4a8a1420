"""The engines of the latency benchmark: what each makes of a model, and one call of the result.

Every engine is used as its documentation says, with its own defaults, but for the number of threads. A call takes
what a user has (torch tensors, or numpy arrays over the same memory) and returns when the outputs are there.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import graphopt as go
from benchmarks.latency_models import Subject
from benchmarks.latency_roofline import roofline
from benchmarks.machine import memory
from graphopt.backends.tvm.artifact import TvmArtifact

__all__ = ["ENGINES", "RIVALS", "Built", "Engine", "tensors_of"]


@dataclass(frozen=True)
class Built:
    """A model made ready in an engine: a call on the model's inputs, and what its making says about itself."""

    call: Callable[[], Any]
    facts: dict[str, Any] = field(default_factory=dict)


Engine = Callable[[Subject, int, Callable[[], Path]], Built]
"""Takes the model, the number of threads, and what gives the model's ONNX file."""


def tensors_of(result: Any) -> list[Tensor]:
    """The outputs of a call in order, as torch tensors."""
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(result)]


def _ours(free_batch: bool, subject: Subject, threads: int, onnx: Callable[[], Path]) -> Built:
    """Capture or load, exact passes, compile. What these import, TVM's compiler for one, is in time and memory."""
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest memory so far is now this
    times = [time.perf_counter()]
    model = subject.capture(free_batch=free_batch)
    times.append(time.perf_counter())
    exact, _ = go.run(model, "exact")
    times.append(time.perf_counter())
    artifact = go.build(exact, target="cpu", backend="tvm", threads=threads)
    times.append(time.perf_counter())
    weights = sum(entry.tensor.untyped_storage().nbytes() for entry in model.params.entries())
    facts = {
        "capture_seconds": round(times[1] - times[0], 2),
        "exact_seconds": round(times[2] - times[1], 2),
        "compile_seconds": round(times[3] - times[2], 2),
        "weight_mb": round(weights / 1e6, 1),
        "memory_before_mb": round(before / 1e6, 1),
        "memory_peak_mb": round(memory("VmHWM") / 1e6, 1),
    }
    if not free_batch:
        assert isinstance(artifact, TvmArtifact)
        facts["roofline"] = roofline(artifact, list(subject.args))
    return Built(lambda: artifact(*subject.args), facts)


def _onnxruntime(subject: Subject, threads: int, onnx: Callable[[], Path]) -> Built:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(onnx(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    given = dict(zip(names, (tensor.numpy() for tensor in subject.args), strict=True))
    return Built(lambda: session.run(None, given))


def _openvino(precision: str, subject: Subject, threads: int, onnx: Callable[[], Path]) -> Built:
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(onnx(), "CPU", options)
    request = compiled.create_infer_request()
    given = [tensor.numpy() for tensor in subject.args]

    def call() -> list[Any]:
        found = request.infer(given, share_inputs=True, share_outputs=True)
        return [found[output] for output in compiled.outputs]

    return Built(call, {"precision": compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()})


def _inductor(subject: Subject, threads: int, onnx: Callable[[], Path]) -> Built:
    """torch.compile with its weights taken as constants ("freezing"), or without where that fails."""
    import torch._inductor.config as inductor

    for inductor.freezing in (True, False):
        torch.compiler.reset()
        call = _without_gradients(torch.compile(subject.module, dynamic=False), subject.args)
        try:
            call()  # which compiles
            break
        except Exception:
            if not inductor.freezing:
                raise
    return Built(call, {"freezing": inductor.freezing})


def _eager(subject: Subject, threads: int, onnx: Callable[[], Path]) -> Built:
    return Built(_without_gradients(subject.module, subject.args))


def _without_gradients(module: Callable[..., Any], args: tuple[Tensor, ...]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return module(*args)

    return call


ENGINES: dict[str, Engine] = {
    "ours": partial(_ours, False),
    "ours-dynamic": partial(_ours, True),
    "onnxruntime": _onnxruntime,
    "openvino-f32": partial(_openvino, "f32"),
    "openvino-default": partial(_openvino, ""),
    "inductor": _inductor,
    "eager": _eager,
}
"""In the order in which they are made ready: ours first, so that its memory is not hidden behind that of others."""
RIVALS = ("onnxruntime", "openvino-f32", "inductor")
"""The compilers that keep float32, with the best of which ours is compared."""
