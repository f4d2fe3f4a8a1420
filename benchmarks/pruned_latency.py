"""Asked for a part of the latency: what does the compiled result take?

    python -m benchmarks.pruned_latency                  eight nets at half, and the page
    python -m benchmarks.pruned_latency resnet18 --part 0.7
    python -m benchmarks.pruned_latency --table          the table in docs/pruning.md alone

`exact` is applied first. `achieved` is what the pass has measured when it chose its plan; `again` is measured after
that, with artifacts that are built anew and take turns with the original's. The weights of image nets are random, so
nothing is said about accuracy here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import graphopt as go
from benchmarks.latency_models import build
from benchmarks.machine import commit, machine, versions
from graphopt.measure import Stopwatch
from graphopt.solve import BudgetError
from graphopt.target import Target

RESULTS = Path(__file__).parent / "results" / "pruned_latency.json"
PAGE = Path(__file__).parent.parent / "docs" / "pruning.md"
BEGIN, END = "<!-- begin: python -m benchmarks.pruned_latency -->", "<!-- end -->"
COLUMNS = ("asked", "achieved", "again", "macs", "params", "groups", "seconds")
NETS = (
    "mobilenet_v2",
    "resnet18",
    "squeezenet1_1",
    "resnet50",
    "efficientnet_b0",
    "regnet_y_400mf",
    "deit_tiny",
    "convnext_tiny",
)


def measure(name: str, part: float, step: str = "prune-channels") -> dict[str, Any]:
    """What a net takes after a pass that is asked for a part of its latency."""
    subject = build(name, 1)
    model, _ = go.run(subject.capture(), "exact", check=False)
    start = time.perf_counter()
    try:
        small, (report,) = go.run(model, f"{step}{{latency={part}}}", check=False)
    except BudgetError as error:
        return {"asked": part, "refused": error.what, "seconds": round(time.perf_counter() - start, 1)}
    seconds = time.perf_counter() - start
    watch = Stopwatch(Target.parse("cpu"))
    assert report.cost_before is not None and report.cost_after is not None
    return {
        "asked": part,
        "achieved": round(report.findings["achieved"]["latency"], 3),
        "again": round(watch.ratio(watch.build(small), watch.build(model), list(subject.args)), 3),
        "macs": round(report.cost_after.macs / report.cost_before.macs, 3),
        "params": round(report.cost_after.parameters / report.cost_before.parameters, 3),
        "groups": len(report.findings["groups" if step == "prune-channels" else "layers"]),
        "seconds": round(seconds, 1),
    }


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for every net."""
    lines = [f"| net | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, row in results["nets"].items():
        lines.append(f"| {name} | {' | '.join(str(row.get(column, 'refused')) for column in COLUMNS)} |")
    where = results["machine"]
    return "\n".join([*lines, "", f"{where['processor']}, {where['cores']} cores."])


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--part", type=float, default=0.5)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text())["nets"] if RESULTS.exists() else {}
    for name in () if options.table else options.names or NETS:
        found[name] = measure(name, options.part)
        print(name, found[name], flush=True)
        whole = {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": found}
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
