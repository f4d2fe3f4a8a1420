"""Merging of the linear layers that read one value into one wider layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.errors import UsageError
from graphopt.ops import argument
from graphopt.params import ParamKind
from graphopt.passes._layers import Layer, read_layer
from graphopt.passes._layout import relax_views
from graphopt.passes._pieces import joined_name, why_in_one_piece
from graphopt.rewriter import Node, Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["MergeParallelLinear"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeParallelLinear(Pass):
    """Merge linear layers with one input, such as query, key and value, into one.

    What:
        Linear layers that read the same value become one layer whose output is split. One large product uses a
        machine better than several small ones, and reads x once.

    Algebra:
        [x @ A.T + a, x @ B.T + b] = split(x @ cat(A, B).T + cat(a, b)) with A [m, in] and B [n, in] joined along their
        outputs: [m + n, in]. A missing bias is zero where another layer has one.

    When it applies:
        At least `min-count` layers (2). Left out, each with its reason: a layer whose weight or bias is shared, tied
        or computed, or whose dtype, kind, recorded precision or requires_grad differs from the first's; and one whose
        output is an output of the model or goes into an unknown operator, because the pieces of a split have gaps
        between their rows. A view that cannot read across the gaps becomes a reshape.

    Safety:
        Exact: every output element is the same sum. A missing bias that becomes zeros can be trained afterwards.

    Cost:
        One copy of the weights.

    Source:
        Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.

    Example:
        >>> import torch, graphopt
        >>> class Gated(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.up = torch.nn.Linear(8, 16), torch.nn.Linear(8, 16)
        ...     def forward(self, x):
        ...         return self.gate(x).sigmoid() * self.up(x)
        >>> model = graphopt.capture(Gated().eval(), (torch.randn(2, 8),))
        >>> merged, reports = graphopt.run(model, "merge-parallel-linear")
        >>> list(merged.state_dict())
        ['gate_up.weight', 'gate_up.bias']
    """

    name: ClassVar[str] = "merge-parallel-linear"
    contract: ClassVar[Contract] = Contract.EXACT

    min_count: int = 2

    def __post_init__(self) -> None:
        if self.min_count < 2:
            raise UsageError(f"min-count of '{self.name}' is {self.min_count}", why="one layer cannot be merged")

    def run(self, rw: Rewriter) -> None:
        groups: dict[Node, list[Node]] = {}
        for node in rw.find(aten.linear.default):
            groups.setdefault(argument(node, "input"), []).append(node)
        for nodes in groups.values():
            if rw.exhausted:
                break
            if len(nodes) >= self.min_count:
                self._merge(rw, nodes)
        if rw.changed:
            relax_views(rw)

    def _merge(self, rw: Rewriter, nodes: list[Node]) -> None:
        layers: list[Layer] = []
        common: dict[str, object] = {}
        for node in nodes:
            layer = _mergeable(rw, node, common)
            if isinstance(layer, str):
                rw.skip(node, layer)
            else:
                layers.append(layer)
        if len(layers) >= self.min_count:
            _join(rw, layers)
        elif len(layers) > 1:
            for layer in layers:
                rw.skip(layer.call, f"only {len(layers)} layers could be merged, min-count is {self.min_count}")


def _mergeable(rw: Rewriter, node: Node, common: dict[str, object]) -> Layer | str:
    """The layer, or why it may not be merged with those before it, whose traits are `common`; its own are added."""
    layer = read_layer(rw, node)
    if isinstance(layer, str):
        return layer
    for tensor, reader in ((layer.weight, layer.reader), (layer.bias, node)):
        why = rw.why_shared(tensor, reader) if tensor is not None else None
        if why is not None:
            return why
    traits = _traits(rw, layer)
    for name, value in traits.items():
        if value != common.get(name, value):
            return f"its {name} is {value}, that of the others {common[name]}"
    why = why_in_one_piece(node)
    if why is None:
        common.update(traits)
    return why or layer


def _traits(rw: Rewriter, layer: Layer) -> dict[str, object]:
    """What the layers of one group have to agree in."""
    found: dict[str, object] = {}
    for part, node in (("weight", layer.weight), ("bias", layer.bias)):
        if node is not None:
            name = str(node.target)
            found[f"{part} dtype"] = rw.params[name].dtype
            found[f"{part} kind"] = rw.params.kind(name).value
            found[f"{part} requires_grad"] = rw.params[name].requires_grad
            found[f"{part} precision"] = rw.params.precision.get(name)
    return found


def _join(rw: Rewriter, layers: list[Layer]) -> None:
    first = layers[0].call
    why = f"merged: {', '.join(layer.call.name for layer in layers)}"
    path = joined_name([str(layer.weight.target) for layer in layers])
    weight = _joined(rw, f"{path}.weight", [layer.weight for layer in layers], layers)
    biases = [layer.bias for layer in layers]
    bias = _joined(rw, f"{path}.bias", biases, layers) if any(biases) else None
    merged = rw.call(aten.linear.default, layers[0].input, weight, bias, before=first, like=first)
    sizes = [_outputs(rw, layer) for layer in layers]
    pieces = rw.call(aten.split_with_sizes.default, merged, sizes, -1, before=first, like=first)
    # All are made before any is used: the first replacement erases the node they are put in front of.
    outputs = [rw.call(operator.getitem, pieces, i, before=first, like=layer.call) for i, layer in enumerate(layers)]
    for layer, output in zip(layers, outputs, strict=True):
        rw.replace(layer.call, output, why)


def _outputs(rw: Rewriter, layer: Layer) -> int:
    return int(rw.params[str(layer.weight.target)].shape[layer.weight_out])


def _joined(rw: Rewriter, name: str, nodes: list[Node | None], layers: list[Layer]) -> Node:
    """One tensor of all outputs: weights [n, in], or biases [n] with zeros for those that are missing."""
    given = [node for node in nodes if node is not None]
    like = rw.params[str(given[0].target)].detach()
    parts, masks = [], []
    for node, layer in zip(nodes, layers, strict=True):
        part = rw.params[str(node.target)].detach() if node is not None else like.new_zeros(_outputs(rw, layer))
        mask = rw.params.masks.get(str(node.target)) if node is not None else None
        mask = mask if mask is not None else torch.zeros_like(part, dtype=torch.bool)
        turned = part.ndim == 2 and layer.weight_out == 1
        parts.append(part.t() if turned else part)
        masks.append(mask.t() if turned else mask)
    source = str(given[0].target)
    kind, value = rw.params.kind(source), torch.cat(parts)
    if kind is ParamKind.PARAMETER:
        value = torch.nn.Parameter(value, requires_grad=rw.params[source].requires_grad)
    made = rw.add_tensor(name, value, kind=kind, like=given[0])
    if any(bool(mask.any()) for mask in masks):
        rw.params.masks[str(made.target)] = torch.cat(masks)
    if source in rw.params.precision:
        rw.params.precision[str(made.target)] = rw.params.precision[source]
    return made
