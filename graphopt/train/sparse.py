"""What the optimizers that bring units to zero have in common: the base rule, the zeros that stay, and the state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from graphopt.errors import UsageError
from graphopt.names import nearest
from graphopt.train.choice import Quota
from graphopt.train.units import trainable_units

if TYPE_CHECKING:
    from graphopt.model import Model

__all__ = ["SparseOptimizer"]

_RULES: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


class SparseOptimizer(Optimizer):
    """A torch optimizer that brings part of a model's units to zero while it trains, and keeps them there.

    It is used as any other one: `zero_grad`, `backward`, `step`; schedulers set the rate in `param_groups`;
    `state_dict` holds all it takes to go on where a run was broken off. Which units go is a function of parameters and
    gradients alone, so the processes of a `DistributedDataParallel` run, which have the same of both, agree on it.

    Zero units can be removed by `remove-zeros` where nothing reads anything of them. Before a layer norm that is not
    so: leave the groups of its inputs alone.

    Args:
        model: to train, in either mode; `model.module` is what to call or to wrap.
        lr: the rate.
        sparsity: the part of the units that becomes zero, at least 0 and below 1. With 0 this is the base rule.
        steps: calls of `step` that bringing them to zero takes.
        start_step: calls of `step` before that.
        rule: the base rule, one of torch's: `sgd`, `adam` or `adamw`.
        params: as for any torch optimizer; by default all parameters that have gradients.
        only, leave: names of groups to take and to leave alone; see `graphopt groups`.
        families: for groups by name which family of units; by default the finest.
        step: of which the widths that stay are multiples, where a group has at least twice as many units.
        most: the largest part of a group that may go. One unit stays in any case.
        options: of the base rule, such as `momentum` or `weight_decay`.

    Attributes:
        units: what can become zero; tensors [units] are in their order.
        zero: [units] bool, what is zero and stays so.
        chosen: [units] bool, what is to become zero, as far as that is known.
        taken: steps so far.
        finished: whether all is done and the rest is training as usual.

    Raises:
        UsageError: for an argument that is out of its range or unknown to the base rule, a group that does not exist,
            and a sparsity that cannot be reached.
    """

    _kept: ClassVar[tuple[str, ...]] = ("taken", "finished", "zero", "chosen")
    """Attributes that belong to the state."""
    _fixed: ClassVar[tuple[str, ...]] = ("steps", "start_step")
    """Attributes that have to be the same where a state is loaded."""

    def __init__(
        self,
        model: Model,
        lr: float,
        sparsity: float,
        *,
        steps: int,
        start_step: int = 0,
        rule: str = "sgd",
        params: Any = None,
        only: Sequence[str] = (),
        leave: Sequence[str] = (),
        families: Mapping[str, int] | None = None,
        step: int = 1,
        most: float = 0.9,
        **options: Any,
    ) -> None:
        if steps < 1 or start_step < 0:
            raise UsageError(f"steps is {steps} and start_step {start_step}, they have to be at least 1 and 0")
        if rule not in _RULES:
            raise UsageError(f"there is no base rule '{rule}'", todo=nearest(rule, _RULES))
        given = [p for p in model.parameters() if p.requires_grad] if params is None else params
        try:
            self._base = _RULES[rule](given, lr=lr, **options)  # type: ignore[call-arg]  # all three have a rate
        except (TypeError, ValueError) as error:
            raise UsageError(f"the base rule '{rule}' refuses its options: {error}") from error
        super().__init__(self._base.param_groups, self._base.defaults)
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        self.units = trainable_units(model, trained, only=only, leave=leave, families=families)
        self.quota = Quota(self.units, sparsity, step, most)
        self.steps, self.start_step = steps, start_step
        self.taken, self.finished = 0, self.quota.goal == 0
        self.zero = torch.zeros(self.units.count, dtype=torch.bool)
        self.chosen = self.zero.clone()

    @abstractmethod
    def _advance(self, at: int) -> None:
        """One step on the way to zero, number `at` of them; sets `finished` with the last one."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: computes the loss and its gradients anew; rarely needed.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.finished or self.taken < self.start_step:
            self._base_step()
        else:
            self._advance(self.taken - self.start_step)
        self.hold()  # whatever momentum and decay have made of them
        self.taken += 1
        return loss

    def _base_step(self) -> None:
        """What the base rule does. It works on the groups and the state of this optimizer, which are its own."""
        self._base.param_groups, self._base.state = self.param_groups, self.state
        self._base.step()

    def _choose(self, scores: Tensor, count: int) -> Tensor:
        """The units with the lowest scores [units], those that are chosen already first of all."""
        return self.quota.lowest(scores.masked_fill(self.chosen, -torch.inf), count)

    def hold(self) -> None:
        """Set to zero what stays zero, after something else, such as a mean of weights, has been written there."""
        self.units.zero(self.zero)

    def zeros(self) -> dict[str, list[int]]:
        """For each group by name the numbers of the units that are zero and stay so."""
        return {s.name: self.zero[s.start : s.stop].nonzero().flatten().tolist() for s in self.units.spans}

    def state_dict(self) -> dict[str, Any]:
        """The state of any torch optimizer, and under `sparse` which units are to go and how far that has come."""
        return {
            **super().state_dict(),
            "sparse": self._signature() | {name: getattr(self, name) for name in self._kept},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the optimizer was that the state is of. The model's own state has to be loaded, too.

        Raises:
            UsageError: when that was another kind of optimizer, or one of other units.
        """
        sparse = state_dict.get("sparse", {})
        for name, mine in self._signature().items():
            if sparse.get(name) != mine:
                raise UsageError(
                    f"the state is not one of this {type(self).__name__}",
                    why=f"under '{name}' it says {sparse.get(name, 'nothing')}, and not {mine}",
                    todo="make the optimizer with the arguments of the run that is to go on",
                )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "sparse"})
        for name in self._kept:
            value = deepcopy(sparse[name])
            setattr(self, name, value.cpu() if isinstance(value, Tensor) else value)

    def _signature(self) -> dict[str, Any]:
        """What has to be the same where a state is loaded."""
        plan = {name: getattr(self, name) for name in self._fixed}
        units = {span.name: [span.family, span.size] for span in self.units.spans}
        return {"kind": type(self).__name__, "units": units, "plan": plan | {"goal": self.quota.goal}}
