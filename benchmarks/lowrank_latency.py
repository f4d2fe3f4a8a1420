"""Asked for a part of the latency by low rank: what does the compiled result take?

    python -m benchmarks.lowrank_latency                  four nets, and the page
    python -m benchmarks.lowrank_latency resnet18 --part 0.8
    python -m benchmarks.lowrank_latency --table          the table in docs/lowrank.md alone

It is measured as `benchmarks.pruned_latency` does: `achieved` by the pass, `again` with artifacts that are built anew.
The weights of image nets are random, and no calibration data is given: nothing is said about accuracy here.
"""

from __future__ import annotations

from benchmarks.pruned_latency import FOLDER, Asked

LOW_RANK = Asked(
    step="low-rank",
    counted="layers",
    results=FOLDER / "results" / "lowrank_latency.json",
    page=FOLDER.parent / "docs" / "lowrank.md",
    nets={"deit_tiny": 0.7, "minilm_128": 0.7, "resnet50": 0.8, "mobilenet_v2": 0.9},
)

if __name__ == "__main__":
    LOW_RANK.main(__doc__)
