"""Maestro: factors whose columns are put in order of importance, and dropped when they matter no more."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.train.pairs import Pair, find_pairs, module_of, ranks_of, set_ranks

__all__ = ["Maestro"]

_TINY = 1e-30


class Maestro:
    """Ordered dropout over the factors of layers W = U V^T, with shrinking ranks, around an optimizer of your own.

    Each step draws one pair (layer i, rank b), all pairs being as likely, and the forward pass uses the first b columns
    of that layer's U and V and all columns of the others. So the first columns learn what matters most: for a linear
    layer on white inputs they become the singular vectors of what it has to learn, in order, and those of the
    principal components for an autoencoder. A penalty on every tail of columns,

        penalty * sum over layers, sum over b = 1 .. r of |U[:, b:r]| + |V[:, b:r]|   (Frobenius norms, b included),

    brings the last columns to zero, and a layer is cut to b - 1 columns for the first b with

        |U[:, b:r]| |V[:, b:r]| <= eps,

    but to no fewer than one. The tensors become smaller then, those of the optimizer's state with them, which stays
    valid: the columns that are left are the same ones.

        net, _ = as_factors(net)
        maestro = Maestro(net, optimizer, penalty=1e-4)
        loss = criterion(maestro(x), y) + maestro.penalty()
        loss.backward(); optimizer.step(); maestro.step()

    The net is trained in place, and is called itself where all columns are wanted. A convolution's columns are the
    channels between its factors. Draws come from a generator of its own, so that processes with one seed draw the same.

    Args:
        net: what `as_factors` has returned, or a captured model in which `low-rank` has made factors.
        optimizer: of its parameters; leave it out only if it holds no state with the shape of a parameter.
        penalty: the factor of the penalty, at least 0.
        eps: below which product of norms columns are cut, at least 0; it is in the units of W.
        every: after how many steps ranks are looked at, once an epoch in the paper.
        only, leave: names of layers, or of modules that they are in, to take and to leave alone.
        seed: of the draws.

    Attributes:
        drawn: which layer is narrower in the next forward pass, and its rank there.
        taken: steps so far.

    Raises:
        UsageError: for arguments out of their range, and where nothing is written as factors, with reasons.

    Source:
        Horvath et al., Maestro: Uncovering Low-Rank Structures via Trainable Decomposition, ICML 2024, algorithm 1; the
        paper writes `eps` for what is compared with the product of norms as well, and gives no scale.
    """

    def __init__(
        self,
        net: nn.Module | Model,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        penalty: float = 1e-4,
        eps: float = 1e-3,
        every: int = 1,
        only: Sequence[str] = (),
        leave: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not (0 <= penalty < math.inf and 0 <= eps < math.inf) or every < 1:
            raise UsageError(
                f"penalty is {penalty:g}, eps {eps:g} and every {every}",
                todo="give at least 0 for the first two and at least 1 for the third",
            )
        self.net, self.optimizer = net, optimizer
        self.pairs = find_pairs(net, only, leave)
        self.strength, self.eps, self.every = penalty, eps, every
        self.taken = 0
        self._generator = torch.Generator().manual_seed(seed)
        self.drawn = self._draw()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the net makes with the columns that were drawn."""
        index, rank = self.drawn
        pair = self.pairs[index]
        narrow = {pair.inner_name: pair.inner[:rank], pair.outer_name: pair.outer[:, :rank]}
        return functional_call(module_of(self.net), narrow, args, kwargs)

    def penalty(self) -> Tensor:
        """The penalty as it is now, a scalar with gradients; zero ones where a tail is zero."""
        tails = [tail for pair in self.pairs for tail in _tails(pair)]
        return self.strength * torch.stack([tail.sum() for tail in tails]).sum()

    @torch.no_grad()
    def step(self) -> None:
        """Cut what has become negligible, and draw for the next forward pass; call it after the optimizer's step."""
        self.taken += 1
        if self.taken % self.every == 0:
            for pair in self.pairs:
                outer, inner = _tails(pair)
                cut = (outer * inner <= self.eps).nonzero()
                if len(cut):
                    self._shrink(pair, max(1, int(cut[0])))
        self.drawn = self._draw()

    def ranks(self) -> dict[str, int]:
        """The rank of every layer by name."""
        return ranks_of(self.pairs)

    def state_dict(self) -> dict[str, Any]:
        """Ranks, steps and draws: with the states of net and optimizer, all that is needed to go on."""
        return {
            "kind": "Maestro",
            "ranks": self.ranks(),
            "taken": self.taken,
            "drawn": list(self.drawn),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. The net gets the ranks of it, so that its own state can be loaded *afterwards*.

        Raises:
            UsageError: when that is no state of this class, or of other factors.
        """
        if state.get("kind") != "Maestro":
            raise UsageError("the state is not one of Maestro", todo="give what its state_dict() has returned")
        set_ranks(self.pairs, state["ranks"])
        self.taken = state["taken"]
        self.drawn = (state["drawn"][0], state["drawn"][1])
        self._generator.set_state(state["generator"])

    def _draw(self) -> tuple[int, int]:
        """A layer and a rank of it from 1 to its full one, all of them as likely."""
        ranks = [pair.rank for pair in self.pairs]
        number = int(torch.randint(sum(ranks), (), generator=self._generator))
        index = 0
        while number >= ranks[index]:
            number -= ranks[index]
            index += 1
        return index, number + 1

    def _shrink(self, pair: Pair, rank: int) -> None:
        """Keep the first columns, in the optimizer's state too."""
        if rank == pair.rank:
            return
        states = self._cut_state(pair.inner, 0, rank), self._cut_state(pair.outer, 1, rank)
        for parameter, cut in zip((pair.inner, pair.outer), states, strict=True):
            if cut:
                assert self.optimizer is not None
                self.optimizer.state[parameter].update(cut)
        outer, inner = pair.matrices()
        pair.write(outer[:, :rank], inner[:rank])

    def _cut_state(self, parameter: nn.Parameter, axis: int, rank: int) -> dict[str, Tensor]:
        """What of the optimizer's state has the parameter's shape, cut along an axis."""
        state = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        cut = {}
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != parameter.shape:
                raise UsageError(
                    f"'{name}' of {type(self.optimizer).__name__} has the shape {list(value.shape)} for a parameter of"
                    f" {list(parameter.shape)}, and cannot be cut with it",
                    todo="use an optimizer whose state has an element for each of a parameter's, SGD or Adam",
                )
            cut[name] = value.narrow(axis, 0, rank).clone()
        return cut


def _tails(pair: Pair) -> tuple[Tensor, Tensor]:
    """[r] the norms of columns b to r of U, and of V, for every b."""
    wide = torch.promote_types(pair.inner.dtype, torch.float32)  # squares of short floats vanish
    outer, inner = (matrix.to(wide) for matrix in pair.matrices())

    def norms(squares: Tensor) -> Tensor:
        return squares.flip(0).cumsum(0).flip(0).clamp(min=_TINY).sqrt()

    return norms(outer.square().sum(0)), norms(inner.square().sum(1))
