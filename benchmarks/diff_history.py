"""How much of what passes did is re-discovered from the two models alone, and told with the name of the pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import graphopt as go
from benchmarks.lively import calibrate, enliven
from benchmarks.torchvision_ops import define_missing
from graphopt.diff import Entry, GraphDiff
from graphopt.model import Model
from graphopt.transform import Edit, EditKind, Report

__all__ = ["PIPELINES", "measure", "nets", "rediscovered"]

PIPELINES = ("exact", "prune-channels{macs=0.6}", "low-rank{params=0.4}", "exact,prune-channels{params=0.7}")

_KINDS = {
    "prune-channels": {"pruned", "rewritten"},
    "fold-batch-norm": {"rewritten"},
    "low-rank": {"rewritten"},
    "merge-parallel-linear": {"rewritten"},
}
"""Kinds of entry that an edit of a pass may be found as; elsewhere a region that is gone or became another."""


def nets(*, small: bool = False) -> dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]]:
    """Makers of the nets and their inputs; `small` ones have small images and a short BERT."""
    return {
        "resnet18": lambda: _image_net("resnet18", 64 if small else 224),
        "mobilenet_v2": lambda: _image_net("mobilenet_v2", 64 if small else 224),
        "bert": lambda: _bert(small),
    }


def _image_net(name: str, size: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    define_missing()
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None)
    with torch.no_grad():
        enliven(net)
        calibrate(net, [(torch.randn(4, 3, 64, 64),)])
    return net.eval(), (torch.randn(2, 3, size, size),)


def _bert(small: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    define_missing()  # transformers imports torchvision where it is installed
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(**(sizes | {"vocab_size": 200} if small else {}), attn_implementation="sdpa")
    config.return_dict = False
    net = BertModel(config)
    with torch.no_grad():
        enliven(net)
    return net.eval(), (torch.randint(0, 200, (2, 16)),)


def rediscovered(before: Model, after: Model, reports: list[Report]) -> tuple[int, int, list[str]]:
    """How many edits of the journals the diff reports as the right kind of region with the right pass, of how many,
    and those that it does not. Edits of nodes that an earlier pass made, and that neither model has, do not count.
    """
    diff = go.diff(before, after, cost=False)
    homes = _Homes(diff)
    right, missed = 0, []
    for report in reports:
        for edit in report.edits:
            if not homes.knows(edit):
                continue
            entries = homes.of(edit)
            kinds = _KINDS.get(report.name, {"removed", "rewritten", "changed"})
            if any(entry.kind in kinds and report.name in entry.passes for entry in entries):
                right += 1
            else:
                missed.append(f"{report.name} {edit.kind.value} {edit.node}: {edit.why}")
    return right, right + len(missed), missed


class _Homes:
    """The entries by the nodes and tensors of the first model that they are about."""

    def __init__(self, diff: GraphDiff) -> None:
        self.names = {item.name: item for item in diff.a.view.items}
        self.by_node: dict[str, list[Entry]] = {}
        self.follows: dict[str, list[Entry]] = {}
        resized = {pair.a for pair in diff.pairs if any(change.derived for change in pair.changes)}
        for entry in diff.entries:
            for index in entry.a:
                item = diff.a.view.items[index]
                self.by_node.setdefault(item.name, []).append(entry)
                for _, source in item.operands:
                    if diff.a.view.items[source].kind == "tensor":
                        self.by_node.setdefault(diff.a.view.items[source].name, []).append(entry)
        for index in resized:  # sizes that were written anew because of an entry
            name = diff.a.view.items[index].name
            self.follows[name] = [entry for entry in diff.entries if entry.kind == "pruned"]

    def knows(self, edit: Edit) -> bool:
        return edit.node in self.names

    def of(self, edit: Edit) -> list[Entry]:
        found = self.by_node.get(edit.node, [])
        return found + (self.follows.get(edit.node, []) if edit.kind is EditKind.UPDATE else [])


def measure() -> dict[str, Any]:
    """The share of edits that are re-discovered, by net and pipeline."""
    found: dict[str, Any] = {}
    for name, make in nets().items():
        net, inputs = make()
        model = go.capture(net, inputs)
        for pipeline in PIPELINES:
            after, reports = go.run(model, pipeline, check=False)
            right, edits, missed = rediscovered(model, after, reports)
            passes = Counter(report.name for report in reports for _ in report.edits)
            found[f"{name} {pipeline}"] = {
                "edits": edits,
                "right": right,
                "share": round(right / edits, 4) if edits else 1.0,
                "missed": missed[:10],
                "journal": dict(passes),
            }
    return {"nets": found, "least_share": min(row["share"] for row in found.values())}
