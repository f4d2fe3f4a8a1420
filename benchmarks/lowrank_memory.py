"""Memory that factorising a large transformer takes, layer by layer, with its weights on disk.

    python -m benchmarks.lowrank_memory                      a Llama-shaped model of 1.1 billion parameters: 4.4 GB
    python -m benchmarks.lowrank_memory --layers 2 --dry     a small part of it

The model, with random weights, is written to a `.gopt` file (in `--folder`, which needs room
for three such files). Other processes then bring it to half its parameters, without data and with calibration data of
four batches of 64 tokens, and save the result, as `graphopt opt` does. `memory` is the most that a process held of its
own at a time (`RssAnon`), above what it held before it read the model; pages of mapped files, which the system may drop
at any time, are shown apart (`RssFile`). It is compared with the bytes of the largest layer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt as go
from benchmarks.lowrank_table import MEMORY as RESULTS
from benchmarks.lowrank_table import PAGE, page
from benchmarks.machine import commit, machine, versions

PIPELINES = {
    "without data": "low-rank{params=0.5,forms=linear}",
    "with data": "low-rank{params=0.5,forms=linear,solver=activation,refit=false}",
}
TOKENS, BATCHES = 64, 4


def write_model(path: Path, layers: int) -> None:
    """The shape of TinyLlama: 32,000 words, 2,048 features, 32 heads, 4 of keys and values, 5,632 in the middle."""
    from benchmarks.torchvision_ops import define_missing

    define_missing()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    net = LlamaForCausalLM(config).eval()

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(input_ids=ids).logits
            return logits

    go.capture(Words().eval(), (torch.randint(config.vocab_size, (1, TOKENS)),)).save(path)


class Watch:
    """The most memory that this process held since it was made, in bytes, looked at every hundredth of a second."""

    def __init__(self) -> None:
        self.most = dict.fromkeys(("RssAnon", "RssFile"), 0)
        self.start = self._now()
        threading.Thread(target=self._look, daemon=True).start()

    def above(self, kind: str) -> int:
        return self.most[kind] - self.start[kind]

    def _look(self) -> None:
        while True:
            self.most = {kind: max(size, self.most[kind]) for kind, size in self._now().items()}
            time.sleep(0.01)

    def _now(self) -> dict[str, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {kind: 1024 * int(lines[kind].split()[0]) for kind in self.most}


def factorised(path: Path, kind: str) -> dict[str, Any]:
    """One run of this process."""
    tiny = go.capture(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)).eval(), (torch.ones(9, 24),))
    go.run(tiny, PIPELINES[kind], calib=[(torch.randn(9, 24),)] * 9, check=False)  # loads the libraries
    watch, start = Watch(), time.perf_counter()
    model = go.load(path, mapped=True)
    parameters = list(model.parameters())
    whole, largest = (of(p.numel() * p.element_size() for p in parameters) for of in (sum, max))
    generator = torch.Generator().manual_seed(1)
    drawn = [(torch.randint(32000, (1, TOKENS), generator=generator),) for _ in range(BATCHES)]
    calib = drawn if kind == "with data" else ()
    small, (report,) = go.run(model, PIPELINES[kind], calib=calib, check=False)
    solved = {name: watch.above(name) for name in watch.most}
    small.save(path.with_name("small.gopt"))
    return {
        "pipeline": PIPELINES[kind],
        "parameters": sum(p.numel() for p in parameters),
        "kept": sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in parameters),
        "layers": len(report.findings["layers"]),
        "weight_bytes": whole,
        "largest_bytes": largest,
        "memory_bytes": watch.above("RssAnon"),
        "memory_before_saving_bytes": solved["RssAnon"],
        "before_bytes": watch.start["RssAnon"],
        "file_pages_bytes": watch.above("RssFile"),
        "part_of_largest": watch.above("RssAnon") / largest,
        "seconds": time.perf_counter() - start,
    }


def keep(rows: dict[str, Any]) -> None:
    """Write rows to the results, beside those of other kinds, and the table of docs/lowrank.md."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    where = {"machine": machine(), "versions": versions("transformers"), "commit": commit()}
    RESULTS.write_text(json.dumps(known | {kind: row | where for kind, row in rows.items()}, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--kinds", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    parser.add_argument("--folder", type=Path, default=None, help="where the models are written (default: a new one)")
    parser.add_argument("--dry", action="store_true", help="leave the results as they are")
    parser.add_argument("--one", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(factorised(Path(options.one[0]), options.one[1])))
        return
    rows = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "large.gopt"
        # In a process of its own: the model is not to stay in this one's memory.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(path, options.layers))
        writer.start()
        writer.join()
        for kind in options.kinds:
            command = [sys.executable, "-m", "benchmarks.lowrank_memory", "--one", str(path), kind]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows[kind] = json.loads(done.stdout.splitlines()[-1])
            print(kind, rows[kind], flush=True)
    if not options.dry:
        keep(rows)


if __name__ == "__main__":
    main()
