"""Asked for a part of the latency by low rank: what does the compiled result take?

    python -m benchmarks.lowrank_latency                  four nets, and the page
    python -m benchmarks.lowrank_latency resnet18 --part 0.8
    python -m benchmarks.lowrank_latency --table          the table in docs/lowrank.md alone

It is measured as `benchmarks.pruned_latency` does: `achieved` by the pass, `again` with artifacts that are built anew.
The weights of image nets are random, and no calibration data is given: nothing is said about accuracy here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.lowrank_table import PAGE
from benchmarks.machine import commit, machine, versions
from benchmarks.pruned_latency import measure

RESULTS = Path(__file__).parent / "results" / "lowrank_latency.json"
BEGIN, END = "<!-- begin: python -m benchmarks.lowrank_latency -->", "<!-- end -->"
NETS = {"deit_tiny": 0.7, "minilm_128": 0.7, "resnet50": 0.8, "mobilenet_v2": 0.9}
COLUMNS = ("asked", "achieved", "again", "macs", "params", "layers", "seconds")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a row for every net."""
    lines = [f"| net | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, row in results["nets"].items():
        shown = row | {"layers": row.get("groups")}
        if "refused" in row:
            lines.append(f"| {name} | {row['asked']} | {row['refused']} |" + " |" * 5)
        else:
            lines.append(f"| {name} | {' | '.join(str(shown[column]) for column in COLUMNS)} |")
    where = results["machine"]
    return "\n".join([*lines, "", f"{where['processor']}, {where['cores']} cores."])


def page(text: str, results: Mapping[str, Any]) -> str:
    """The page with its generated part made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--part", type=float, help=f"by default {', '.join(f'{n} {p}' for n, p in NETS.items())}")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text())["nets"] if RESULTS.exists() else {}
    for name in () if options.table else options.names or NETS:
        found[name] = measure(name, options.part or NETS[name], "low-rank")
        print(name, found[name], flush=True)
        whole = {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": found}
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
