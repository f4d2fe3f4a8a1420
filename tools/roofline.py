"""`graphopt bench --roofline`: each kernel of a compiled model against what this machine can do at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError
from graphopt.target import Target
from graphopt.tools.console import counted, emit_json, say, show_table, working
from graphopt.tools.sources import is_bundle, read_model

if TYPE_CHECKING:
    from graphopt.backends.tvm.ceilings import Ceilings
    from graphopt.backends.tvm.profile import Kernel, Profile
    from graphopt.model import Model
    from graphopt.pipeline import Pipeline

__all__ = ["check_roofline", "least_seconds", "roofline"]

_PACKAGES = ("graphopt", "torch", "numpy", "apache-tvm")


def check_roofline(sources: Sequence[str], backend: str) -> None:
    """Refuse what cannot be looked into.

    Raises:
        UsageError: for a bundle, which does not tell what its functions compute, and another backend than tvm.
    """
    bundles = [source for source in sources if is_bundle(source)]
    if bundles:
        raise UsageError(
            f"--roofline takes models, '{bundles[0]}' is a bundle",
            why="a bundle does not tell what its functions compute",
            todo="name the model that it was built from",
        )
    if backend != "tvm":
        raise UsageError(f"--roofline looks into code of the backend 'tvm', not of '{backend}'")


def roofline(
    sources: Sequence[str],
    pipeline: str,
    threads: int | None,
    rounds: int,
    sizes_of: Any,
    *,
    as_json: bool,
) -> None:
    """Compile every model, time its kernels and tell how far they are from the ceilings.

    Args:
        sizes_of: numbers for the free sizes of a model, from its name and signature.
    """
    with working("starting"):
        from graphopt.tools.pipelines import parse

    steps, count = parse(pipeline), threads or Target.parse("cpu").cores
    profiles = {}
    for source in sources:
        model = read_model(source)
        profiles[source] = _profile(source, model, steps, count, rounds, sizes_of(source, model.signature))
    with working("measuring what this machine can do"):
        from graphopt.backends.tvm.ceilings import measured_ceilings

        ceilings = measured_ceilings(count)
    if as_json:
        emit_json(_to_json(profiles, ceilings))
    else:
        for source, found in profiles.items():
            _show(source, found, ceilings)


def _profile(
    source: str, model: Model, steps: Pipeline, threads: int, rounds: int, sizes: Mapping[str, int]
) -> Profile:
    from graphopt.backend import build
    from graphopt.backends.tvm.artifact import TvmArtifact
    from graphopt.backends.tvm.profile import profile
    from graphopt.sample import sample_inputs
    from graphopt.tools.pipelines import apply

    inputs = sample_inputs(model, sizes=sizes)
    optimized, _ = apply(model, steps)
    with working(f"compiling and measuring {source}"):
        artifact = build(optimized, threads=threads)
        assert isinstance(artifact, TvmArtifact)
        return profile(artifact, inputs, rounds=rounds)


def least_seconds(kernel: Kernel, ceilings: Ceilings) -> float | None:
    """What the roofline allows: the longer of computing and moving at the ceilings; None where the work is unknown."""
    if kernel.flops is None or kernel.bytes is None:
        return None
    return max(kernel.flops / ceilings.flops, kernel.bytes / ceilings.bytes)


def _to_json(profiles: Mapping[str, Profile], ceilings: Ceilings) -> dict[str, Any]:
    from graphopt.tools.machine import machine, versions

    return {
        "machine": machine(),
        "threads": ceilings.threads,
        "versions": versions(_PACKAGES),
        "ceilings": {"flops_per_second": ceilings.flops, "bytes_per_second": ceilings.bytes},
        "results": [{"source": source, **_facts(found, ceilings)} for source, found in profiles.items()],
    }


def _facts(found: Profile, ceilings: Ceilings) -> dict[str, Any]:
    total = sum(kernel.seconds for kernel in found.kernels)
    allowed = sum(least_seconds(kernel, ceilings) or 0.0 for kernel in found.kernels)
    return {
        "seconds": found.timing.median,
        "rounds": found.timing.rounds,
        "allowed_seconds": allowed,
        "achieved": allowed / found.timing.median,
        "kernels": [
            {
                "name": kernel.name,
                "calls": kernel.calls,
                "seconds": kernel.seconds,
                "share": kernel.seconds / total,
                "flops": kernel.flops,
                "bytes": kernel.bytes,
                "flops_per_second": _rate(kernel.flops, kernel.seconds),
                "bytes_per_second": _rate(kernel.bytes, kernel.seconds),
                "allowed_seconds": least_seconds(kernel, ceilings),
            }
            for kernel in found.kernels
        ],
    }


def _rate(amount: int | None, seconds: float) -> float | None:
    return amount / seconds if amount and seconds else None


def _show(source: str, found: Profile, ceilings: Ceilings) -> None:
    facts = _facts(found, ceilings)
    numbers = ("calls", "ms", "share", "GFLOP/s", "GB/s", "allowed ms")
    rows = [
        (
            kernel["name"],
            kernel["calls"] or "",
            f"{kernel['seconds'] * 1e3:.3f}",
            f"{kernel['share']:.1%}",
            _number(kernel["flops_per_second"], 1e-9),
            _number(kernel["bytes_per_second"], 1e-9),
            _number(kernel["allowed_seconds"], 1e3, 3),
        )
        for kernel in facts["kernels"]
    ]
    show_table(("kernel", *numbers), rows, title=source, right=numbers)
    say(
        f"{source}: {facts['seconds'] * 1e3:.3f} ms on {counted(ceilings.threads, 'thread')}; the roofline of "
        f"{ceilings.flops / 1e9:.0f} GFLOP/s and {ceilings.bytes / 1e9:.1f} GB/s allows "
        f"{facts['allowed_seconds'] * 1e3:.3f} ms: {facts['achieved']:.0%} of it is achieved"
    )


def _number(value: float | None, scale: float, digits: int = 1) -> str:
    return "" if value is None else f"{value * scale:.{digits}f}"
