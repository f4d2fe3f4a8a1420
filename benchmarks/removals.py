"""Every group of known nets: is what is left after a removal what the masked original computes?

    python -m benchmarks.removals                       all nets into benchmarks/results/removals.json
    python -m benchmarks.removals swin_t --tries 10     one net, and ten removals of it

Of every family of every group the first unit is removed, and then a random half of the units. Nets with random weights
are measured in float64, so that a wrong channel is not taken for rounding; those with published weights in float32, in
which a difference is compared with what one rounding of the weights does to the outputs. `seconds` is the time it takes
to find the groups, of the net at the size it is used at.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from benchmarks.machine import commit, machine, versions
from benchmarks.removal_nets import MODELS
from graphopt.analysis.coupling import Coupling, couple
from graphopt.analysis.removal import Conflict, Removal
from graphopt.check import Oracle, relative_error
from graphopt.rewriter import Rewriter
from graphopt.sample import sample_inputs
from graphopt.surgery import cut, masked_outputs
from graphopt.verify import verify

RESULTS = Path(__file__).parent / "results" / "removals.json"
ROUNDINGS = 8


def removals(coupling: Coupling) -> Iterator[tuple[str, list[int]]]:
    """For every family of every group: its first unit, and a random half of its units, as classes."""
    generator = torch.Generator().manual_seed(0)
    for group in coupling.groups.values():
        for index, family in enumerate(group.families):
            order = torch.randperm(len(family), generator=generator).tolist()
            for picked in ([0], order[: len(family) // 2]):
                yield f"{group.name}, family {index}, {len(picked)} units", [c for unit in picked for c in family[unit]]


def error_of(coupling: Coupling, classes: list[int], inputs: list[torch.Tensor]) -> float:
    """How far the model without the classes, verified, is from the masked one, relative to the largest output."""
    expected = masked_outputs(coupling.model, Removal(coupling, classes), inputs)
    copy = coupling.model.clone(share_tensors=True)
    rw = Rewriter(copy)
    cut(rw, Removal(coupling.onto(copy), classes), "")
    assert rw.unjournaled() is None
    copy.touch()
    verify(copy)
    with torch.no_grad():
        found = copy.call_flat(inputs)
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def measure(name: str, tries: int | None) -> dict[str, Any]:
    model = MODELS[name]()
    start = time.perf_counter()
    coupling = couple(model)
    groups = coupling.groups
    row: dict[str, Any] = {
        "seconds": round(time.perf_counter() - start, 2),
        "groups": len(groups),
        "units": sum(group.size for group in groups.values()),
        "pinned": {one.name: list(one.reasons) for one in coupling.pinned},
    }
    parameters = pytree.tree_leaves(list(model.parameters()))
    if any(parameter.device.type == "meta" for parameter in parameters):
        return row
    exact = all(parameter.dtype == torch.float64 for parameter in parameters)
    limit = 1e-9 if exact else max(1e-5, ROUNDINGS * max(Oracle(model).noise))
    every = list(removals(coupling))
    chosen = every if tries is None else random.Random(0).sample(every, min(tries, len(every)))
    errors, refused, wrong = [], [], []
    inputs = sample_inputs(model)
    for label, classes in chosen:
        try:
            error = error_of(coupling, classes, inputs)
        except Conflict as conflict:
            refused.append(f"{label}: {conflict.what}")
            continue
        errors.append(error)
        if error > limit:
            wrong.append(f"{label}: {error:.1e}")
    return row | {
        "removals": len(chosen),
        "of": len(every),
        "worst_error": max(errors, default=0.0),
        "limit": limit,
        "refused": refused,
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NET", help=", ".join(MODELS))
    parser.add_argument("--tries", type=int, help="removals of each net, all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.out.read_text())["nets"] if options.out.exists() else {}
    for name in options.names or MODELS:
        found[name] = measure(name, options.tries)
        print(name, {key: value for key, value in found[name].items() if key != "pinned"}, flush=True)
        whole = {"machine": machine(), "versions": versions(), "commit": commit(), "nets": found}
        options.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
