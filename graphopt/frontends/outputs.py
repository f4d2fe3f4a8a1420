"""What a traced graph returns: names of its outputs, and outputs that no signature can describe, which are refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError
from graphopt.fake import Shapes, data_dependent
from graphopt.model import output_leaves
from graphopt.printer import operator_name, source_of

__all__ = ["output_names", "refuse_data_dependent"]

_FIXED = "return a tensor of fixed shape, such as torch.where(mask, x, 0), or the mask, and select outside of the model"
_TENSOR = "return the tensor itself, without .item(), int() or float()"


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """Names from the keys of the returned structure: `logits`, `output_0`, or `output` for a lone tensor."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = []
    for path, _ in pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        name = "_".join(keys) or "output"
        names.append(f"output_{name}" if name[0].isdigit() else name)
    return names


def refuse_data_dependent(graph: fx.Graph, shapes: Shapes, names: Sequence[str]) -> None:
    """Refuse outputs whose shape, or whose value as a Python number, is known only once the numbers are.

    Such sizes inside of the graph are no trouble as long as no output has them.

    Raises:
        UnsupportedError: for the first such output, with the operator that makes its size.
    """
    for name, leaf in zip(names, output_leaves(graph), strict=True):
        value = leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
        unknown = data_dependent(value)
        if not unknown:
            continue
        maker = next(node for node in graph.nodes if unknown & data_dependent(node.meta.get("val")))
        what, todo = ("shape", _FIXED) if isinstance(value, torch.Tensor) else ("value", _TENSOR)
        late = ", ".join(sorted(map(str, unknown)))
        raise UnsupportedError(
            f"the {what} of output '{name}' depends on the values of a tensor",
            where=source_of(maker),
            why=f"it is {shapes.describe(value)}, and {late} is known only once {operator_name(maker.target)} has run",
            todo=todo,
        )
