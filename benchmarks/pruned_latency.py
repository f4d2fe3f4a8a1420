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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphopt as go
from benchmarks.latency_models import build
from benchmarks.machine import commit, machine, versions
from graphopt.measure import Stopwatch
from graphopt.solve import BudgetError
from graphopt.target import Target

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Asked:
    """What one pass makes of nets that are asked for a part of their latency.

    Attributes:
        step: the pass.
        counted: what of its findings is counted, and the name of that column.
        results, page: the names of the files.
        nets: the part that each is asked for.
    """

    step: str
    counted: str
    results: Path
    page: Path
    nets: Mapping[str, float]

    @property
    def columns(self) -> tuple[str, ...]:
        return ("asked", "achieved", "again", "macs", "params", self.counted, "seconds")

    def measure(self, name: str, part: float) -> dict[str, Any]:
        subject = build(name, 1)
        model, _ = go.run(subject.capture(), "exact", check=False)
        start = time.perf_counter()
        try:
            small, (report,) = go.run(model, f"{self.step}{{latency={part}}}", check=False)
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
            self.counted: len(report.findings[self.counted]),
            "seconds": round(seconds, 1),
        }

    def table(self, results: Mapping[str, Any]) -> str:
        """Markdown: a row for every net."""
        lines = [f"| net | {' | '.join(self.columns)} |", "|---|" + "---:|" * len(self.columns)]
        for name, row in results["nets"].items():
            lines.append(f"| {name} | {' | '.join(str(row.get(column, 'refused')) for column in self.columns)} |")
        where = results["machine"]
        return "\n".join([*lines, "", f"{where['processor']}, {where['cores']} cores."])

    def text(self, text: str, results: Mapping[str, Any]) -> str:
        """The page with its generated part made anew."""
        begin, end = f"<!-- begin: python -m benchmarks.{self.results.stem} -->", "<!-- end -->"
        before, rest = text.split(begin)
        return f"{before}{begin}\n\n{self.table(results)}\n\n{end}{rest.split(end, 1)[1]}"

    def main(self, told: str | None) -> None:
        parser = argparse.ArgumentParser(description=told, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(self.nets))
        parser.add_argument("--part", type=float, help="the part asked for, where it is not the usual one")
        parser.add_argument("--table", action="store_true", help="measure nothing")
        options = parser.parse_args()
        found = json.loads(self.results.read_text())["nets"] if self.results.exists() else {}
        for name in () if options.table else options.names or self.nets:
            found[name] = self.measure(name, options.part or self.nets.get(name, 0.5))
            print(name, found[name], flush=True)
            whole = {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": found}
            self.results.write_text(json.dumps(whole, indent=1) + "\n")
        self.page.write_text(self.text(self.page.read_text(), json.loads(self.results.read_text())))


PRUNED = Asked(
    step="prune-channels",
    counted="groups",
    results=FOLDER / "results" / "pruned_latency.json",
    page=FOLDER.parent / "docs" / "pruning.md",
    nets=dict.fromkeys(
        (
            "mobilenet_v2", "resnet18", "squeezenet1_1", "resnet50", "efficientnet_b0", "regnet_y_400mf", "deit_tiny",
            "convnext_tiny",
        ),
        0.5,
    ),
)  # fmt: skip

if __name__ == "__main__":
    PRUNED.main(__doc__)
