"""The oracle of a cut: the whole model, in which nobody hears of what is removed.

Every operator that sums over positions gets zeros in the place of the removed ones, as if the columns of its weight
were zero; every statistic is one of the positions that stay. The outputs are what the cut model has to compute. No
weight is cut and no literal counted here, and the layers are the original ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx import Node

from graphopt.analysis.removal import Kept, Removal
from graphopt.ops import Contracted, Normalized, Product, Reduced, argument, lookup, operands

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["masked_outputs"]


def masked_outputs(model: Model, removal: Removal, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The flat outputs of `model`, which the removal is of, with the removed positions left out of every sum."""
    leaves = iter(inputs)
    values = [next(leaves) if hasattr(spec, "dims") else spec.value for spec in model.signature.inputs]
    with torch.no_grad():
        results = _Masked(model.module, removal).run(*values, enable_io_processing=False)
    found = results if isinstance(results, tuple | list) else [results]
    return [value for value in found if isinstance(value, torch.Tensor)]


class _Masked(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, removal: Removal) -> None:
        super().__init__(module)
        self.removal = removal

    def run_node(self, n: Node) -> Any:
        info = lookup(n.target) if n.op == "call_function" else None
        axes = info.axes if info is not None else None
        if isinstance(axes, Contracted):
            return self._with(n, {argument(n, axes.input): _zeroed})
        if isinstance(axes, Product):
            return self._with(n, dict.fromkeys(operands(n), _zeroed))
        if isinstance(axes, Reduced):
            mixed = axes.mixed(n)
            return self._with(n, {argument(n, "self"): lambda tensor, kept: _selected(tensor, _along(kept, mixed))})
        if isinstance(axes, Normalized) and axes.over in ("trailing", "group"):
            return self._normalized(n, axes)
        return super().run_node(n)

    def _with(self, node: Node, changed: dict[Node, Any]) -> Any:
        """Run the node with inputs that are masked or cut."""
        kept = {used: self.removal.of(used) for used in changed if used.op != "get_attr"}
        if all(positions is None for one in kept.values() for positions in one):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        names = {used: changed[used](self.env[used], kept[used]) for used in kept}
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: names.get(used, self.env[used]))
        return node.target(*args, **kwargs)  # type: ignore[operator]  # an overload

    def _normalized(self, node: Node, axes: Normalized) -> torch.Tensor:
        """Normalise what stays, and put it back into its places."""
        source = argument(node, "input")
        kept = self.removal.of(source)
        if all(positions is None for positions in kept):
            result: torch.Tensor = super().run_node(node)
            return result
        whole = self.env[source]
        left = _selected(whole, kept)
        parameters = [self._parameter(argument(node, name), node, axes, kept) for name in axes.parameters]
        if axes.over == "trailing":
            shape = list(left.shape[left.dim() - len(argument(node, "normalized_shape")) :])
            rest = [argument(node, "eps")]
            made = node.target(left, shape, *parameters, *rest)  # type: ignore[operator]  # an overload
        else:
            groups, positions = argument(node, "num_groups"), kept[1]
            if positions is not None:
                groups = torch.unique(positions // (whole.shape[1] // groups)).numel()
            made = node.target(left, groups, *parameters, argument(node, "eps"))  # type: ignore[operator]  # an overload
        back = torch.zeros_like(whole)
        places = [torch.arange(size) if one is None else one for size, one in zip(whole.shape, kept, strict=True)]
        places = [one.to(whole.device) for one in places]
        back[torch.meshgrid(*places, indexing="ij")] = made
        return back

    def _parameter(self, value: Any, node: Node, axes: Normalized, kept: Kept) -> Any:
        if not isinstance(value, Node):
            return value
        tensor = self.env[value]
        own = kept[1:2] if axes.over == "group" else kept[len(kept) - tensor.dim() :]
        return _selected(tensor, own)


def _along(kept: Kept, axes: tuple[int, ...]) -> Kept:
    """What stays along some axes; all along the others."""
    return tuple(positions if axis in axes else None for axis, positions in enumerate(kept))


def _zeroed(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    for axis, positions in enumerate(kept):
        if positions is not None:
            gone = torch.ones(tensor.shape[axis], dtype=torch.bool)
            gone[positions] = False
            tensor = tensor.index_fill(axis, gone.nonzero().flatten().to(tensor.device), 0)
    return tensor


def _selected(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    for axis, positions in enumerate(kept):
        if positions is not None:
            tensor = tensor.index_select(axis, positions.to(tensor.device))
    return tensor
