"""A captured model against the ONNX file that torch exported of it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt as go
from benchmarks.diff_history import nets
from graphopt.diff import GraphDiff
from graphopt.params import ParamKind

__all__ = ["exported", "measure", "parametric"]


def exported(net: nn.Module, inputs: tuple[torch.Tensor, ...], *, optimize: bool) -> go.Model:
    """The module as torch exports it to ONNX, read back; `optimize` folds batch norms and constants on the way."""
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "net.onnx"
        program = torch.onnx.export(net, inputs, dynamo=True, optimize=optimize, verbose=False)
        assert program is not None
        program.save(path, external_data=False)
        return go.load(path)


def parametric(diff: GraphDiff) -> tuple[int, int, int, list[str]]:
    """Operators of the first model that read parameters: how many are matched, how many are part of a region that
    was rewritten, of how many; and the names of the others.
    """
    view, params = diff.a.view, diff.a.view.model.params
    partner = diff.partner()
    inside = {index for entry in diff.entries if entry.kind == "rewritten" for index in entry.a}
    matched, rewritten, left = 0, 0, []
    for item in view.calls():
        if not any(params.kind(row.tensor) is ParamKind.PARAMETER for row in view.tensors(item.index).values()):
            continue
        if item.index in partner:
            matched += 1
        elif item.index in inside:
            rewritten += 1
        else:
            left.append(item.name)
    return matched, rewritten, matched + rewritten + len(left), left


def measure() -> dict[str, Any]:
    """The share of parametric operators that are matched, by net and kind of export."""
    found: dict[str, Any] = {}
    for name, make in nets().items():
        net, inputs = make()
        model = go.capture(net, inputs)
        for optimize in (False, True):
            matched, rewritten, total, left = parametric(go.diff(model, exported(net, inputs, optimize=optimize)))
            found[f"{name} {'optimized' if optimize else 'as it is'}"] = {
                "parametric": total,
                "matched": matched,
                "in_rewritten_regions": rewritten,
                "share": round((matched + rewritten) / total, 4),
                "left": left[:10],
            }
    return {"exports": found, "least_share": min(row["share"] for row in found.values())}
