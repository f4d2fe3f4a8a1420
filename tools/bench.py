"""`graphopt bench`: time models and bundles against other software, round by round in turn."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.errors import GraphoptError, UsageError
from graphopt.names import nearest
from graphopt.target import Target
from graphopt.tools.console import emit_json, say, show_table, working
from graphopt.tools.roofline import check_roofline
from graphopt.tools.roofline import roofline as show_roofline
from graphopt.tools.sources import AsJson, BackendName, PipelineText, Threads, is_bundle, parse_sizes, read_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graphopt.backend import Timing
    from graphopt.model import Model
    from graphopt.signature import Signature

__all__ = ["bench"]

_OTHERS = ("inductor", "openvino")
_PACKAGES = ("graphopt", "torch", "numpy", "apache-tvm", "onnxruntime", "openvino")
_PAUSE_SECONDS = 0.1
"""Before each turn: the threads of the system before spin for a while, on the cores that the next one needs."""


@dataclass
class Contender:
    """One system with one model: how to run it, on what, and the seconds of its rounds.

    `error` is its largest error relative to the largest output of eager PyTorch; None for a bundle, which holds no
    model to compare with.
    """

    source: str
    system: str
    run: Callable[[list[Any]], list[Any]]
    tensors: list[Any]
    preparation: float
    error: float | None = None
    times: list[float] = field(default_factory=list)

    def timing(self) -> Timing:
        from graphopt.backend import Timing

        quartiles = statistics.quantiles(self.times, n=4, method="inclusive") if len(self.times) > 1 else self.times * 3
        q1, median, q3 = quartiles
        return Timing(median, q1, q3, len(self.times))


def bench(
    sources: Annotated[list[str], typer.Argument(metavar="IN|DIR...", help="Models and bundles.", show_default=False)],
    against: Annotated[
        str, typer.Option(help="Backends, inductor, openvino; empty for none.")
    ] = "onnxruntime,reference",
    pipeline: PipelineText = "exact",
    backend: BackendName = "tvm",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 20,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Number for the first axis, where that is free.")] = None,
    at: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SIZE", help="Number for a free size; may be repeated.")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Instead: time each kernel against what this machine can do.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, after passes and compiled by --backend, and the same model as it is in other software.

    All take turns in every round, each with one call before the timed one. Nothing else should be running.
    """
    systems = _systems(against, backend)
    sizes = parse_sizes(at or ())
    if roofline:
        check_roofline(sources, backend)
        show_roofline(
            sources, pipeline, threads, rounds, lambda name, of: _sizes(name, of, batch, sizes), as_json=as_json
        )
        return
    skipped: list[dict[str, str]] = []
    contenders: list[Contender] = []
    for source in sources:
        if is_bundle(source):
            contenders.append(_bundle(source, batch, sizes))
        else:
            contenders += _models(source, pipeline, [backend, *systems], threads, batch, sizes, skipped)
    _measure(contenders, rounds)
    for row in skipped:
        say(f"left out: {row['system']} for {row['source']}: {row['why']}")
    if as_json:
        emit_json(_to_json(contenders, skipped, threads))
    else:
        _show(contenders)


def _systems(against: str, backend: str) -> list[str]:
    from graphopt.backend import backend_names

    known = [*backend_names(), *_OTHERS]
    asked = [name.strip() for name in against.split(",") if name.strip()]
    wrong = [f"there is no system '{name}': {nearest(name, known)}" for name in asked if name not in known]
    if backend not in backend_names():
        wrong.append(f"there is no backend '{backend}': {nearest(backend, backend_names())}")
    if wrong:
        raise UsageError("; ".join(wrong))
    return [name for name in dict.fromkeys(asked) if name != backend]


def _bundle(source: str, batch: int | None, sizes: Mapping[str, int]) -> Contender:
    from graphopt.backend import load_artifact
    from graphopt.tools.arrays import require_plain, sample_arrays

    start = time.perf_counter()
    artifact = load_artifact(source)
    seconds = time.perf_counter() - start
    require_plain(artifact.signature)
    inputs = sample_arrays(artifact.signature, _sizes(source, artifact.signature, batch, sizes))
    return Contender(source, "bundle", artifact.run, inputs, seconds)


def _models(
    source: str,
    pipeline: str,
    systems: list[str],
    threads: int | None,
    batch: int | None,
    sizes: Mapping[str, int],
    skipped: list[dict[str, str]],
) -> list[Contender]:
    """The model made ready in every system; the first runs the result of the pipeline, the others the model itself."""
    with working("starting"):
        import torch

        from graphopt.sample import sample_inputs
        from graphopt.tools.pipelines import apply, parse

    # Switching between two numbers of threads around every call would cost more than the call.
    torch.set_num_threads(threads or Target.parse("cpu").cores)
    steps = parse(pipeline)
    model = read_model(source)
    inputs = sample_inputs(model, sizes=_sizes(source, model.signature, batch, sizes))
    optimized, _ = apply(model, steps)
    reference = model.call_flat(inputs)
    found = []
    for position, system in enumerate(systems):
        try:
            with working(f"compiling {source} with {system}"):
                contender = _prepared(source, system, model if position else optimized, threads, inputs)
                contender.error = _error(contender.run(inputs), reference)
        except GraphoptError as error:
            if position == 0:
                raise
            skipped.append({"source": source, "system": system, "why": error.what})
            continue
        found.append(contender)
    return found


def _prepared(source: str, system: str, model: Model, threads: int | None, inputs: list[Any]) -> Contender:
    from graphopt.backend import backend_names, build

    start = time.perf_counter()
    run: Callable[[list[Any]], list[Any]]
    if system in backend_names():
        run = build(model, backend=system, threads=threads).run
    else:
        from graphopt.tools.rivals import is_installed, prepare

        if not is_installed(system):
            raise UsageError("not installed")
        run = prepare(system, model, threads or Target.parse("cpu").cores)
    run(inputs)
    return Contender(source, system, run, inputs, time.perf_counter() - start)


def _error(outputs: list[Any], reference: list[Any]) -> float:
    from graphopt.check import relative_error

    return max((relative_error(ours, theirs) for ours, theirs in zip(outputs, reference, strict=True)), default=0.0)


def _sizes(source: str, signature: Signature, batch: int | None, sizes: Mapping[str, int]) -> dict[str, int]:
    """Numbers for the free sizes of one model, from `--batch` and `--at`."""
    free = signature.ranges
    unknown = [name for name in sizes if name not in free]
    if unknown:
        raise UsageError(
            f"'{source}' has no free size '{unknown[0]}'", todo=f"free sizes are {', '.join(free) or 'none'}"
        )
    first = {spec.dims[0] for spec in signature.tensor_inputs if spec.dims}
    named = {name: batch for name in free if batch is not None and name in first}
    if batch is not None and not named and first != {batch}:
        raise UsageError(
            f"the first axis of '{source}' is fixed", todo="leave --batch out, or capture the model with a free batch"
        )
    return named | dict(sizes)


def _measure(contenders: list[Contender], rounds: int) -> None:
    from graphopt.backend import Timing

    with working("measuring") as tell:
        for round_ in range(1, rounds + 1):
            tell(f"measuring: round {round_} of {rounds}")
            for contender in contenders:
                time.sleep(_PAUSE_SECONDS)
                timing = Timing.measure(lambda c=contender: c.run(c.tensors), rounds=1, warmup=1)  # type: ignore[misc]  # mypy cannot type a lambda with a default
                contender.times.append(timing.median)


def _to_json(contenders: list[Contender], skipped: list[dict[str, str]], threads: int | None) -> dict[str, Any]:
    from graphopt.tools.machine import machine, versions

    facts = machine()
    return {
        "machine": facts,
        "threads": threads or facts["target"]["cores"],
        "versions": versions(_PACKAGES),
        "results": [_row(contender) for contender in contenders],
        "left_out": skipped,
    }


def _row(contender: Contender) -> dict[str, Any]:
    timing = contender.timing()
    return {
        "source": contender.source,
        "system": contender.system,
        "inputs": [list(tensor.shape) for tensor in contender.tensors],
        "seconds": {"median": timing.median, "q1": timing.q1, "q3": timing.q3},
        "rounds": timing.rounds,
        "preparation_seconds": contender.preparation,
        "relative_error": contender.error,
    }


def _show(contenders: list[Contender]) -> None:
    numbers = ("median ms", "q1", "q3", "times the first", "ready after s", "error")
    first = contenders[0].timing().median
    rows = []
    for contender in contenders:
        timing = contender.timing()
        error = "" if contender.error is None else f"{contender.error:.1e}"
        spread = [f"{seconds * 1000:.3f}" for seconds in (timing.median, timing.q1, timing.q3)]
        rows.append(
            (
                contender.source,
                contender.system,
                *spread,
                f"{timing.median / first:.3g}",
                f"{contender.preparation:.1f}",
                error,
            )
        )
    show_table(("source", "system", *numbers), rows, right=numbers)
