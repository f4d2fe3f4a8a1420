"""Optuna's sampler, seeded anew for every trial. Imports Optuna: import late."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

__all__ = ["SeededSampler"]


class SeededSampler(BaseSampler):
    """Tree-structured Parzen estimators (Bergstra et al., 2011), whose random numbers follow from a seed and the number
    of the trial: a study that is resumed goes on as it would have, and processes beside each other differ.

    Args:
        startup: how many trials have to be there before their results are made use of.
    """

    def __init__(self, seed: int, startup: int) -> None:
        self.seed, self.startup = seed, startup
        self._sampler = self._fresh(0)

    def _fresh(self, number: int) -> TPESampler:
        (seed,) = np.random.SeedSequence([self.seed, number]).generate_state(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return TPESampler(n_startup_trials=self.startup, seed=int(seed), multivariate=True, group=True)

    def reseed_rng(self) -> None:
        """Nothing: every trial has a seed of its own."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._sampler = self._fresh(trial.number)
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._sampler.after_trial(study, trial, state, values)
