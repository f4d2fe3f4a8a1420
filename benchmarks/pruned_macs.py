"""Nets that other pruners fail on, at a part of their multiply-accumulates: do they run, exported and compiled?

    python -m benchmarks.pruned_macs
    python -m benchmarks.pruned_macs swin_t --part 0.3

`onnx` and `compiled` are how far ONNX Runtime, of the exported file, and the compiled program are from what the pruned
model computes, relative to its largest output.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import graphopt as go
from benchmarks.machine import commit, machine, versions
from benchmarks.removal_nets import image_net, language_net
from graphopt.check import relative_error
from graphopt.model import Model
from graphopt.sample import sample_inputs

RESULTS = Path(__file__).parent / "results" / "pruned_macs.json"
IMAGE_NETS = ("shufflenet_v2_x1_0", "vit_b_16", "swin_t")
NETS = (*IMAGE_NETS, "gpt2", "llama_14_2")


def measure(name: str, part: float) -> dict[str, Any]:
    model = (image_net if name in IMAGE_NETS else language_net)(name, torch.float32)
    start = time.perf_counter()
    small, (report,) = go.run(model, f"prune-channels{{macs={part}}}")
    seconds = time.perf_counter() - start
    assert report.cost_before is not None and report.cost_after is not None
    inputs = sample_inputs(small)
    with torch.no_grad():
        expected = small.call_flat(inputs)
    compiled = torch.utils._pytree.tree_leaves(go.build(small, backend="tvm")(*inputs))
    return {
        "macs": round(report.cost_after.macs / report.cost_before.macs, 3),
        "params": round(report.cost_after.parameters / report.cost_before.parameters, 3),
        "groups": len(report.findings["groups"]),
        "seconds": round(seconds, 1),
        "onnx": furthest(by_onnxruntime(small, inputs), expected),
        "compiled": furthest(compiled, expected),
    }


def furthest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def by_onnxruntime(model: Model, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        model.save(file)
        session = onnxruntime.InferenceSession(file)
        names = [entry.name for entry in session.get_inputs()]
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(NETS))
    parser.add_argument("--part", type=float, default=0.5)
    options = parser.parse_args()
    found = json.loads(RESULTS.read_text())["nets"] if RESULTS.exists() else {}
    for name in options.names or NETS:
        found[name] = {"asked": options.part, **measure(name, options.part)}
        print(name, found[name], flush=True)
        whole = {"machine": machine(), "versions": versions("apache-tvm"), "commit": commit(), "nets": found}
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
