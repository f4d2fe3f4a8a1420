"""Asked for a part of the latency: what does the compiled result take?

    python -m benchmarks.pruned_latency                     eight nets at half, into benchmarks/results/pruned_latency.json
    python -m benchmarks.pruned_latency resnet18 --part 0.7

`exact` is applied first. `achieved` is what the pass has measured when it chose its plan; `again` is measured afterwards
with artifacts built anew, which take turns with the original's. The weights of image nets are random, so nothing is said
about accuracy here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import graphopt as go
from benchmarks.latency_models import build
from benchmarks.machine import commit, machine, versions
from graphopt.measure import Stopwatch
from graphopt.solve import BudgetError
from graphopt.target import Target

RESULTS = Path(__file__).parent / "results" / "pruned_latency.json"
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


def measure(name: str, part: float) -> dict[str, Any]:
    subject = build(name, 1)
    model, _ = go.run(subject.capture(), "exact", check=False)
    start = time.perf_counter()
    try:
        small, (report,) = go.run(model, f"prune-channels{{latency={part}}}", check=False)
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
        "groups": len(report.findings["groups"]),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--part", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text())["nets"] if options.out.exists() else {}
    for name in options.names or NETS:
        found[name] = measure(name, options.part)
        print(name, found[name], flush=True)
        whole = {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": found}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
