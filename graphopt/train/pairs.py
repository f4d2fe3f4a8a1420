"""The pairs of factors that a net holds, for training that changes their ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.ops import argument
from graphopt.params import ParamKind
from graphopt.rewriter import Node, Rewriter
from graphopt.train.factors import Factored, selected

__all__ = ["Pair", "find_pairs", "module_of", "ranks_of", "set_ranks"]

aten = torch.ops.aten

_CALLS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layers in a row that act by the product of their matrices alone.

    Attributes:
        name: of the layer that they are together.
        inner: [r, in, *window] of the first layer, as a matrix B [r, in * window].
        outer: [out, r, *window] of the second one, as a matrix A [out * window, r].
        inner_name, outer_name: those in the module's `named_parameters`.
    """

    name: str
    inner: nn.Parameter
    outer: nn.Parameter
    inner_name: str
    outer_name: str
    _resized: Callable[[int], None] = field(repr=False)

    @property
    def rank(self) -> int:
        return self.inner.shape[0]

    @property
    def full(self) -> int:
        """The largest rank that a product of such factors has."""
        return min(self.inner[0].numel(), self.outer.numel() // self.rank)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [out * window, r] and B [r, in * window], for which gradients flow."""
        return _rows(self.outer), self.inner.flatten(1)

    def gradients(self) -> tuple[Tensor, Tensor] | None:
        """Those of A and B; None where the loss depends on neither."""
        if self.inner.grad is None or self.outer.grad is None:
            return None
        return _rows(self.outer.grad), self.inner.grad.flatten(1)

    @torch.no_grad()
    def write(self, outer: Tensor, inner: Tensor) -> None:
        """Store other matrices A and B, of any rank; gradients are dropped."""
        rank, *window = inner.shape[0], *self.outer.shape[2:]
        before = self.rank
        _store(self.outer, outer.reshape(self.outer.shape[0], *window, rank).movedim(-1, 1))
        _store(self.inner, inner.reshape(rank, *self.inner.shape[1:]))
        if rank != before:
            self._resized(rank)


def find_pairs(net: nn.Module | Model, only: Sequence[str] = (), leave: Sequence[str] = ()) -> list[Pair]:
    """The pairs of factors of a net that `as_factors` has made, or of a captured model: two layers in a row of which
    the first adds no bias and is read by the second alone.

    Raises:
        UsageError: when there is none, with what stands against those that look like one; for names of none.
    """
    found = dict(_of_graph(net) if isinstance(net, Model) else _of_module(net))
    pairs = {name: pair for name, pair in found.items() if isinstance(pair, Pair)}
    if not pairs:
        reasons = [f"'{name}': {reason}" for name, reason in found.items() if isinstance(reason, str)]
        why = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
        todo = "low-rank{forms=linear;kxk-1x1}" if isinstance(net, Model) else "graphopt.train.as_factors"
        raise UsageError("no layer of it is written as factors", why=why or None, todo=f"write it so: {todo}")
    named = {name: reason for name, reason in found.items() if name in only and isinstance(reason, str)}
    if named:
        raise UsageError("; ".join(f"'{name}' is no pair of factors: {reason}" for name, reason in named.items()))
    taken = selected(pairs, only, leave)
    if not taken:
        raise UsageError("no pair of factors is left to train")
    return [pair for name, pair in pairs.items() if name in taken]


def module_of(net: nn.Module | Model) -> nn.Module:
    """What is called in training."""
    return net.module if isinstance(net, Model) else net


def ranks_of(pairs: Sequence[Pair]) -> dict[str, int]:
    """The rank of each pair by name."""
    return {pair.name: pair.rank for pair in pairs}


def set_ranks(pairs: Sequence[Pair], ranks: Mapping[str, int]) -> None:
    """Give pairs the ranks of a saved state, with zeros in them where they become larger, before weights are loaded.

    Raises:
        UsageError: when these are not the ranks of the same pairs.
    """
    if set(ranks) != {pair.name for pair in pairs}:
        raise UsageError(
            "the state is of other factors",
            why=f"it has {', '.join(sorted(ranks)) or 'none'}",
            todo="make the same net",
        )
    for pair in pairs:
        outer, inner = pair.matrices()
        more = ranks[pair.name] - pair.rank
        if more:
            pad = nn.functional.pad
            pair.write(pad(outer, (0, more)), pad(inner, (0, 0, 0, more)))


def _rows(outer: Tensor) -> Tensor:
    """[out, r, *window] as [out * window, r]."""
    return outer.movedim(1, -1).flatten(0, -2)


def _store(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.grad = None
    value = value.to(parameter).contiguous()
    if value.shape != parameter.shape:
        # Any graph that is still around (the last loss) has autograd expect gradients of the old shape; it forgets
        # about that only when the type changes.
        parameter.data = torch.empty(0, dtype=torch.complex64, device=parameter.device)
        parameter.data = value.clone()
    else:
        parameter.copy_(value)


def _of_module(net: nn.Module) -> Iterator[tuple[str, Pair | str]]:
    for name, module in net.named_modules():
        if isinstance(module, Factored):
            inner, outer = module[0].weight, module[1].weight
            assert isinstance(inner, nn.Parameter) and isinstance(outer, nn.Parameter)
            start = f"{name}." if name else ""
            names = (f"{start}0.weight", f"{start}1.weight")
            frozen = not (inner.requires_grad and outer.requires_grad)
            pair = Pair(name, inner, outer, *names, partial(_resize_module, module))
            yield name, "its factors are frozen" if frozen else pair


def _resize_module(module: Factored, rank: int) -> None:
    """Let the layers say what they are."""
    kind = "features" if isinstance(module[0], nn.Linear) else "channels"
    setattr(module[0], f"out_{kind}", rank)
    setattr(module[1], f"in_{kind}", rank)


def _of_graph(model: Model) -> Iterator[tuple[str, Pair | str]]:
    rw = Rewriter(model)  # for reading
    for node in rw.find(*_CALLS):
        first = argument(node, "input")
        before = first.args[0] if isinstance(first, Node) and first.op == "call_function" and first.args else None
        if isinstance(before, Node) and first.target not in _CALLS and before.target is node.target:
            yield node.name, f"'{first.name}' stands between '{before.name}' and it"
        elif isinstance(first, Node) and first.target is node.target:
            inner, outer = str(argument(first, "weight").target), str(argument(node, "weight").target)
            name = inner.removesuffix(".weight").removesuffix(".0").removesuffix(".factors")
            why = _why_no_pair(rw, first, node)
            if why is not None:
                yield name, why
                continue
            resized = partial(_resize_graph, model, first, node)
            first_weight, second_weight = rw.params[inner], rw.params[outer]
            assert isinstance(first_weight, nn.Parameter) and isinstance(second_weight, nn.Parameter)
            yield name, Pair(name, first_weight, second_weight, inner, outer, resized)


def _why_no_pair(rw: Rewriter, first: Node, second: Node) -> str | None:
    """Why two layers in a row are no factors that can be trained as such."""
    if len(first.users) > 1:
        return f"what '{first.name}' makes is also read by others than '{second.name}'"
    if argument(first, "bias") is not None:
        return f"'{first.name}' adds a bias"
    for node in (first, second):
        weight = argument(node, "weight")
        if rw.tensor(weight) is None:
            return f"the weight of '{node.name}' is computed"
        if (why := rw.why_shared(weight, node)) is not None:
            return why
        name = str(weight.target)
        if rw.params.kind(name) is not ParamKind.PARAMETER or not rw.params[name].requires_grad:
            return f"'{name}' is not trained"
        if name in rw.params.masks:
            return f"the mask of '{name}' keeps elements zero"
        if node.target is not _CALLS[0] and argument(node, "groups") != 1:
            return f"'{node.name}' has groups"
    return None


def _resize_graph(model: Model, first: Node, second: Node, rank: int) -> None:
    """Let the graph know the new shapes."""
    for node in (first, second):
        weight = argument(node, "weight")
        weight.meta["val"] = model.shapes.fake(model.params[str(weight.target)])
    first.meta["val"] = model.shapes.propagate(first)
    second.meta["val"] = model.shapes.propagate(second)
