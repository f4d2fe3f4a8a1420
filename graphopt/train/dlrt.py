"""DLRT: training on the manifold of low-rank matrices, with ranks that follow the singular values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from graphopt.errors import UsageError
from graphopt.model import Model
from graphopt.names import nearest
from graphopt.train.pairs import find_pairs, module_of, ranks_of, set_ranks
from graphopt.train.run import Diverged

__all__ = ["DLRT"]

_RULES: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
_LINEAR = ("momentum_buffer", "exp_avg")
"""State that is a sum of gradients: it moves to other bases as a gradient does."""
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
"""State that is a sum of squares of single elements, which other bases do not have."""


@dataclass
class Core:
    """One layer W = U S V^T.

    Attributes:
        left: U [m, r], orthonormal columns.
        middle: S [r, r].
        right: V [n, r], orthonormal columns.
        state: of the base rule for S, tensors [r, r] in the bases U and V.
    """

    left: Tensor
    middle: Tensor
    right: Tensor
    state: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, outer: Tensor, inner: Tensor) -> Core:
        """That of a product of any two factors A [m, r] and B [r, n]."""
        left, a = torch.linalg.qr(outer)
        right, b = torch.linalg.qr(inner.T)
        return cls(left, a @ b.T, right)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U S [m, r] and V^T [r, n]."""
        return self.left @ self.middle, self.right.T

    def moved(self, left: Tensor, right: Tensor) -> Core:
        """The same W and state in other bases: exactly where these span the old ones, else the nearest there is."""
        m, n = left.T @ self.left, right.T @ self.right
        return Core(left, m @ self.middle @ n.T, right, _moved(self.state, m, n))

    def truncated(self, tau: float, least: int, most: int) -> Core:
        """The nearest of the smallest rank that is within tau |S| of it, that rank being from least to most."""
        p, values, q = torch.linalg.svd(self.middle)
        tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # [2r] what is left out if the first b stay
        rank = int((tails > tau * tails[0]).sum())
        rank = max(min(rank, most), min(least, len(values)), 1)
        p, q = p[:, :rank], q[:rank].T
        state = _moved(self.state, p.T, q.T)
        return Core(self.left @ p, torch.diag(values[:rank]), self.right @ q, state)


class DLRT(Optimizer):
    """A torch optimizer that keeps factorised layers W = U S V^T of low rank, and adapts their ranks in every step.

    A step, for all layers at once, with G the gradient for W (which is never formed):

        K = U S,    K' = K - h G V,        U1 = orth [U | K']
        L = V S^T,  L' = L - h G^T U,      V1 = orth [V | L']
        S1 = (U1^T U) S (V^T V1),  S1' = S1 - h U1^T G V1   (or what the base rule makes of that gradient)
        P diag(s) Q^T = S1', cut to the smallest rank for which the norm of the other s is at most tau |s|,
        U = U1 P,  S = diag(s),  V = V1 Q

    U1 S1 V1^T is still W: with full rank and tau = 0, a step of plain SGD is the step on W itself. [U | K'] spans what
    [U | G V] does, whatever the step size h, and that is what is orthogonalised: small steps lose no digits. A closure
    computes the loss twice in each step, first with factors [K/2 | U/2] [V | L]^T, W again, whose gradients hold
    both G V and G^T U, then for S1; all other parameters are updated once, with the second gradients. Random numbers
    differ between the two, and batch norms count the batch twice.

    The base rule acts on S in the step's own bases, and its state follows them: sums of gradients (momentum, first
    moments) as the matrix that they are, U1 (U1^T U) m (V^T V1) V1^T, from which truncation takes what lies in the
    directions that go; of second moments, which belong to single elements of S and have no meaning in other bases, only
    their mean is kept, for each element. Nothing of one basis is used as if it were of another.

    In the net stand U S and V^T, two ordinary layers. Weights that something else has changed are taken as they are.

        net, _ = as_factors(net, rank=0.5)
        optimizer = DLRT(net, lr=0.05, tau=0.1)
        def closure():
            loss = criterion(net(x), y)
            loss.backward()
            return loss
        optimizer.step(closure)

    Args:
        net: what `as_factors` has returned, or a captured model in which `low-rank` has made factors.
        lr: the rate h, also of the other parameters; schedulers set it in `param_groups`, the factors' in the second.
        tau: the part of |S| that a step may cut off, at least 0 and below 1. What one step adds in a new direction
            has to be more than that to stay: with small rates ranks grow only if tau is small too.
        least, most: bounds of every rank; a layer's own full one is a bound as well.
        rule: the base rule, one of torch's: `sgd`, `adam` or `adamw`.
        only, leave: names of layers, or of modules that they are in; factors that are left alone are parameters like
            others.
        options: of the base rule, such as `momentum` or `weight_decay`; a decay of S is one of W.

    Attributes:
        pairs, cores: the layers in the net, and as U S V^T in float32 at least.

    Raises:
        UsageError: for arguments out of their range, and where nothing is written as factors, with reasons.

    Source:
        Schotthoefer et al., Low-rank lottery tickets, NeurIPS 2022, algorithm 1; the integrator is that of Ceruti,
        Kusch and Lubich, A rank-adaptive robust integrator for dynamical low-rank approximation, BIT 2022.
    """

    def __init__(
        self,
        net: nn.Module | Model,
        lr: float,
        *,
        tau: float = 0.1,
        least: int = 1,
        most: int | None = None,
        rule: str = "sgd",
        only: Sequence[str] = (),
        leave: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if not 0 <= tau < 1:
            raise UsageError(f"tau is {tau:g}, it has to be at least 0 and below 1")
        if least < 1 or (most is not None and most < least):
            raise UsageError(f"least is {least} and most {most}, they have to be at least 1, in this order")
        if rule not in _RULES:
            raise UsageError(f"there is no base rule '{rule}'", todo=nearest(rule, _RULES))
        self.pairs = find_pairs(net, only, leave)
        self.tau, self.least, self.most = tau, least, most
        factors = [p for pair in self.pairs for p in (pair.outer, pair.inner)]
        known = {id(p) for p in factors}
        others = [p for p in module_of(net).parameters() if p.requires_grad and id(p) not in known]
        try:
            groups = [{"params": others}, {"params": factors}]
            self._base = _RULES[rule](groups, lr=lr, **options)  # type: ignore[call-arg]  # all three have a rate
        except (TypeError, ValueError) as error:
            raise UsageError(f"the base rule '{rule}' refuses its options: {error}") from error
        super().__init__(self._base.param_groups, self._base.defaults)
        self.cores = [Core.of(*_wide(pair.matrices())) for pair in self.pairs]
        self._show()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters once.

        Args:
            closure: computes the loss and its gradients, and returns the loss; it is called twice.

        Returns:
            The first loss, that of the weights before the step.

        Raises:
            UsageError: without a closure.
            Diverged: when a loss or a gradient is no number. The net is as it was before the step.
        """
        if closure is None:
            raise UsageError("a step needs the loss twice", todo="give step() a closure that computes it")
        self._follow()
        try:
            loss, cores = self._enlarged(closure)
            self._evaluate(closure)
            for pair, core in zip(self.pairs, cores, strict=True):
                gradients = _wide(pair.gradients())
                if gradients is not None:
                    self._descend(core, core.left.T @ gradients[0])
            self.cores = [
                core.truncated(self.tau, self.least, min(pair.full, self.most or pair.full))
                for pair, core in zip(self.pairs, cores, strict=True)
            ]
        except BaseException:
            self._show()
            raise
        self._show()  # which drops the gradients of the factors, so that the base rule leaves them alone
        self._base.param_groups, self._base.state = self.param_groups, self.state
        self._base.step()
        return loss

    def ranks(self) -> dict[str, int]:
        """The rank of every layer by name."""
        return ranks_of(self.pairs)

    def state_dict(self) -> dict[str, Any]:
        """The state of any torch optimizer, and under `dlrt` every layer as U S V^T with the rule's state for S."""
        cores = {pair.name: deepcopy(vars(core)) for pair, core in zip(self.pairs, self.cores, strict=True)}
        return {**super().state_dict(), "dlrt": {"rule": type(self._base).__name__, "cores": cores}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state. The net's factors become those of it; load the net's own state *afterwards*.

        Raises:
            UsageError: when that was another kind of optimizer, or one of other factors.
        """
        saved = state_dict.get("dlrt", {})
        rule = type(self._base).__name__
        if saved.get("rule") != rule:
            raise UsageError(f"the state is not one of DLRT with {rule}", todo="make it as in the run that is to go on")
        set_ranks(self.pairs, {name: core["right"].shape[1] for name, core in saved["cores"].items()})
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "dlrt"})
        self.cores = [
            Core(**{name: _onto(pair.inner, value) for name, value in saved["cores"][pair.name].items()})
            for pair in self.pairs
        ]
        self._show()

    def _evaluate(self, closure: Callable[[], Any]) -> Tensor:
        """The loss of the net as it is, and new gradients."""
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = closure()
        if loss is None:
            raise UsageError("the closure has returned nothing", todo="let it return the loss")
        value = torch.as_tensor(loss).detach()
        grads = [grad for pair in self.pairs for grad in pair.gradients() or ()]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (value, *grads)):
            raise Diverged(f"the loss is {float(value)}, or a gradient is no number", todo="train with a smaller lr")
        return value

    def _enlarged(self, closure: Callable[[], Any]) -> tuple[Tensor, list[Core]]:
        """The loss, and every layer in the bases U1 and V1, which the net has then."""
        for pair, core in zip(self.pairs, self.cores, strict=True):
            k_step, l_step = core.left @ core.middle, core.right @ core.middle.T
            pair.write(torch.cat([k_step, core.left], 1) / 2, torch.cat([core.right, l_step], 1).T)
        loss, cores = self._evaluate(closure), []
        for pair, core in zip(self.pairs, self.cores, strict=True):
            found, width = _wide(pair.gradients()), core.right.shape[1]
            left, right = core.left, core.right
            if found is not None:
                left = torch.linalg.qr(torch.cat([left, found[0][:, :width]], 1)).Q
                right = torch.linalg.qr(torch.cat([right, found[1][width:].T], 1)).Q
            cores.append(core.moved(left, right))
            pair.write(*cores[-1].factors())
        return loss, cores

    def _descend(self, core: Core, gradient: Tensor) -> None:
        """A step of the base rule on S, whose gradient is U1^T G V1, with the options of the factors' group."""
        options = {name: value for name, value in self.param_groups[1].items() if name != "params"}
        middle = nn.Parameter(core.middle)
        middle.grad = gradient
        rule = type(self._base)([{**options, "params": [middle]}], lr=options["lr"])  # type: ignore[call-arg]
        rule.state[middle] = core.state
        rule.step()
        core.middle, core.state = middle.detach(), rule.state[middle]

    def _follow(self) -> None:
        """Take weights over that were changed by something else, a mean of weights for example."""
        for index, (pair, core) in enumerate(zip(self.pairs, self.cores, strict=True)):
            shown = [matrix.to(pair.inner.dtype) for matrix in core.factors()]
            if all(torch.equal(a, b) for a, b in zip(pair.matrices(), shown, strict=True)):
                continue
            new = Core.of(*_wide(pair.matrices()))
            new.state = _moved(core.state, new.left.T @ core.left, new.right.T @ core.right)
            self.cores[index] = new

    def _show(self) -> None:
        """Let the net have what the cores hold."""
        for pair, core in zip(self.pairs, self.cores, strict=True):
            pair.write(*core.factors())


def _wide(matrices: tuple[Tensor, Tensor] | None) -> Any:
    """Two matrices in float32, or in float64 if they are; None for None."""
    if matrices is None:
        return None
    return tuple(matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in matrices)


def _moved(state: Mapping[str, Any], m: Tensor, n: Tensor) -> dict[str, Any]:
    """The state of a rule for S, for m S n^T."""
    moved = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    for name, value in state.items():
        if name in _LINEAR and value is not None:
            moved[name] = m @ value @ n.T
        elif name in _SQUARES:
            moved[name] = value.mean().expand(len(m), len(n)).clone()
    return moved


def _onto(like: Tensor, value: Any) -> Any:
    """Saved tensors, nested in dicts, as copies on the device of another."""
    if isinstance(value, dict):
        return {name: _onto(like, item) for name, item in value.items()}
    return value.to(like.device, copy=True) if isinstance(value, Tensor) else value
