"""The node cases of ONNX through the importer: how many come out right, are refused by name, or are wrong.

    python -m benchmarks.onnx_conformance                  run all, write results/onnx_conformance.json and docs/onnx.md
    python -m benchmarks.onnx_conformance --only softmax   print the cases whose name has this in it
    python -m benchmarks.onnx_conformance --eager          without torch.export, in seconds
    python -m benchmarks.onnx_conformance --page           write docs/onnx.md from the results

A case holds a model of one operator (or of the functions it is defined by), inputs and expected outputs. It is
imported, captured by torch.export, run, and compared with rtol 1e-3 and atol 1e-7, dtypes and shapes included.
Some operands (a shape to reshape to, axes to reduce) are inputs of the case although a compiler must know them:
such a case is refused, then imported again with these inputs fixed, and counted in a column of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine, versions
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.frontends.onnx.call import UnknownValue
from graphopt.frontends.onnx.dtypes import from_numpy, to_tensor
from graphopt.frontends.onnx.module import OnnxModule
from graphopt.frontends.onnx.reader import read_model
from graphopt.frontends.onnx.values import Refusal

__all__ = ["Outcome", "cases", "run_case"]

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/onnx_conformance.json"
PAGE = ROOT / "docs/onnx.md"
OTHERS = (
    {"importer": "TVM 0.27 relax.frontend.onnx", "passed": 737, "wrong": 51},
    {"importer": "onnx2torch 1.5.15", "passed": 323, "wrong": 27},
)
"""Figures of other importers over the same cases with the same tolerance, measured apart from this program."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `passed`, `fixed` (passed with operands fixed), `refused` or `wrong`.

    `rounding` marks a case that passes by the second criterion only; see `differs`.
    """

    case: str
    status: str
    detail: str = ""
    rounding: bool = False


def cases() -> list[Any]:
    """All node cases that come with onnx."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy overflows where casts saturate
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def as_tensor(value: Any) -> Tensor:
    import numpy as np
    import onnx

    if isinstance(value, onnx.TensorProto):
        return to_tensor(value)
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        raise UnsupportedError("a string is no tensor")
    return from_numpy(array)


def run_case(case: Any, *, export: bool = True) -> Outcome:
    """Import and run one case, with and without `torch.export`."""
    inputs, expected = case.data_sets[0]
    given = dict(zip((value.name for value in case.model.graph.input), inputs, strict=False))
    fixed: dict[str, Tensor] = {}
    while True:
        try:
            return _compare(case, _run(case.model, given, fixed, export), expected, "fixed" if fixed else "passed")
        except UnknownValue as error:
            needed = [name for name in error.inputs if name not in fixed]
            if not needed:
                return Outcome(case.name, "refused", error.what)
            fixed |= {name: as_tensor(given[name]) for name in needed}
        except (GraphoptError, Refusal) as error:
            return Outcome(case.name, "refused", str(error).splitlines()[0])


def _run(proto: Any, given: Mapping[str, Any], fixed: Mapping[str, Tensor], export: bool) -> Sequence[Tensor]:
    graph = read_model(proto, fixed)
    module = OnnxModule(graph).eval()
    tensors = [as_tensor(given[spec.name]) for spec in graph.inputs]
    with torch.no_grad():
        result = module(*tensors)  # torch lacks kernels that only running shows
        if export:
            from graphopt.frontends.torch import capture

            names = [spec.name for spec in graph.inputs]
            model = capture(module, tensors, input_names=names, output_names=list(graph.outputs))
            result = model(*tensors)
    return result if isinstance(result, tuple) else (result,)


def _compare(case: Any, actual: Sequence[Tensor], expected: Sequence[Any], status: str) -> Outcome:
    if len(actual) != len(expected):
        return Outcome(case.name, "wrong", f"{len(actual)} outputs instead of {len(expected)}")
    rounding = False
    for ours, theirs in zip(actual, expected, strict=True):
        problem = differs(ours.detach(), as_tensor(theirs), case.rtol, case.atol)
        if problem is None:
            continue
        if problem != "rounding":
            return Outcome(case.name, "wrong", problem)
        rounding = True
    return Outcome(case.name, status, rounding=rounding)


def differs(ours: Tensor, theirs: Tensor, rtol: float, atol: float) -> str | None:
    """How two tensors differ; None if each element agrees to `rtol` and `atol`, bfloat16 to 2^-6.

    `rounding` says that some element does not, but is off by at most two units in the last place of the largest one:
    the expected values, computed with numpy in the same precision, are themselves no nearer to the truth.
    """
    if ours.dtype is not theirs.dtype or ours.shape != theirs.shape:
        return f"{ours.dtype}{list(ours.shape)} instead of {theirs.dtype}{list(theirs.shape)}"
    if not ours.dtype.is_floating_point and not ours.dtype.is_complex:
        return None if torch.equal(ours, theirs) else "integers differ"
    kind = ours.dtype
    a, b = (t.to(torch.complex128 if kind.is_complex else torch.float64) for t in (ours, theirs))
    if torch.allclose(a, b, rtol=max(rtol, 2**-6) if kind is torch.bfloat16 else rtol, atol=atol, equal_nan=True):
        return None
    if not torch.isfinite(b).all() or not torch.isfinite(a).all():
        return "values differ, some are not finite"
    error, scale = float((a - b).abs().max()), float(b.abs().max())
    return "rounding" if error <= 2 * torch.finfo(kind).eps * scale else f"values differ by {error:.3g} of {scale:.3g}"


def summary(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    from graphopt.frontends.onnx import operators  # noqa: F401  # fills the registry
    from graphopt.frontends.onnx.registry import registered

    counts = Counter(outcome.status for outcome in outcomes)
    opsets: dict[str, list[list[int]]] = {}
    for entry in registered():
        opsets.setdefault(entry.name, []).append([entry.since, entry.until])
    return {
        "machine": machine(),
        "versions": versions("onnx", "torch", "graphopt"),
        "cases": len(outcomes),
        "seconds": round(seconds, 1),
        "counts": {status: counts[status] for status in ("passed", "fixed", "refused", "wrong")},
        "rounding": [outcome.case for outcome in outcomes if outcome.rounding],
        "others": list(OTHERS),
        "refused": {outcome.case: outcome.detail for outcome in outcomes if outcome.status == "refused"},
        "wrong": [asdict(outcome) for outcome in outcomes if outcome.status == "wrong"],
        "operators": opsets,
    }


def page(facts: Mapping[str, Any]) -> str:
    """docs/onnx.md."""
    counts = facts["counts"]
    rows = [("graphopt", counts["passed"] + counts["fixed"], counts["refused"], counts["wrong"])]
    for other in facts["others"]:
        rest = facts["cases"] - other["passed"] - other["wrong"]
        rows.append((other["importer"], other["passed"], rest, other["wrong"]))
    table = ["| importer | right | refused or failed | wrong |", "|---|---|---|---|"]
    table += [f"| {name} | {right} | {refused} | {wrong} |" for name, right, refused, wrong in rows]
    reasons = Counter(_reason(detail) for detail in facts["refused"].values())
    refusals = ["| cases | why |", "|---|---|", *(f"| {n} | {why} |" for why, n in reasons.most_common())]
    handled = [f"{name} ({_opsets(ranges)})" for name, ranges in facts["operators"].items()]
    return _PAGE.format(
        cases=facts["cases"],
        table="\n".join(table),
        passed=counts["passed"],
        fixed=counts["fixed"],
        rounding=", ".join(f"`{name}`" for name in facts["rounding"]) or "none",
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        seconds=facts["seconds"],
        refusals="\n".join(refusals),
        operators=", ".join(handled),
    )


def _reason(detail: str) -> str:
    """A refusal without what is particular to the case."""
    if detail.startswith("ONNX operator "):
        head, _, why = detail.partition("): ")
        domain = head.partition("domain '")[2].partition("'")[0]
        return f"`{head.split()[2]}`: {why}" if domain == "ai.onnx" else f"operators of domain `{domain}`"
    return detail


def _opsets(ranges: Sequence[Sequence[int]]) -> str:
    first, last = min(since for since, _ in ranges), max(until for _, until in ranges)
    return f"{first} to {last}"


_PAGE = """# ONNX models

Written by `python -m benchmarks.onnx_conformance`.

    model = graphopt.load("net.onnx")

runs the graph node by node with torch functions under `torch.export`. The result is an ordinary model: weights are
parameters under their ONNX names and can be trained, inputs and outputs keep their names, and dims that the file
leaves open stay free. What a graph asks of them (a multiple of 32, at least 33 pixels) is found and written into
the signature; a dim that the graph allows one size only is fixed, with a warning.

`graphopt.frontends.onnx.load_onnx(path, constants={{...}}, sizes={{...}})` fixes inputs at values, such as the shape
that a Reshape takes, and free dims at sizes.

- A stored tensor is a parameter when it is floating point, has at least one axis and is used as more than data;
  batch norm statistics, bounds, scales and quantisation parameters are buffers.
- A dot in a name makes nested modules (`layer1.0.weight`). A name that is also the prefix of another, or an attribute
  of `nn.Module`, gets a `_` appended; a name with an empty part between dots has `_` for its dots.
- Opsets 7 to 28 of the default domain. Whatever is not understood - an operator, an attribute, an opset, a type - is
  refused with operator, domain, opset and node. Control flow (If, Loop, Scan), sequences, optional values,
  strings, random operators and results whose size depends on data are refused.
- External data must be a plain file in the model's folder; absolute paths, `..` and symbolic links are refused
  before anything is read.

## The node cases of ONNX

{cases} cases, rtol 1e-3, atol 1e-7 (bfloat16: 2^-6, as in onnx's runner), dtypes and shapes included.

{table}

Of graphopt's, {passed} are right as they stand, {fixed} with operands fixed that the case has as inputs and a compiler
must know (axes, shapes, sizes). The figures of the others were measured apart, with the same tolerance.

Right only to two units in the last place of the largest output, as the expected values carry rounding of the same
size: {rounding}.

{versions}; {seconds} seconds.

## What is refused

{refusals}

## Operators

{operators}.
"""


def _progress(items: Sequence[Any]) -> Iterator[Any]:
    for i, item in enumerate(items):
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(items)}", end="", file=sys.stderr)
        yield item


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this, and write nothing")
    parser.add_argument("--eager", action="store_true", help="without torch.export, and write nothing")
    parser.add_argument("--page", action="store_true", help="write docs/onnx.md from the results there are")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))
        return
    torch.set_num_threads(1)
    start = time.perf_counter()
    chosen = [case for case in cases() if options.only in case.name]
    outcomes = [run_case(case, export=not options.eager) for case in _progress(chosen)]
    facts = summary(outcomes, time.perf_counter() - start)
    print(facts["counts"])
    if options.only or options.eager:
        print("\n".join(f"{o.status:8} {o.case}  {o.detail}" for o in outcomes if options.only or o.status == "wrong"))
        return
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    PAGE.write_text(page(facts))


if __name__ == "__main__":
    main()
