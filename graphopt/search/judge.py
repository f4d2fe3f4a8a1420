"""What a pipeline makes of a model, measured: its latency and size as deployed, and what it loses."""

from __future__ import annotations

import fcntl
import hashlib
import math
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from graphopt.analysis.cost import cost
from graphopt.deployed import Deployed, as_deployed
from graphopt.errors import GraphoptError, UsageError
from graphopt.measure import Stopwatch, cache_folder
from graphopt.model import Model
from graphopt.pipeline import Pipeline, run
from graphopt.solve import BudgetError
from graphopt.transform import Report

__all__ = ["Batches", "Found", "Judge", "Refused", "agreed"]

Batches = Sequence[Sequence[torch.Tensor]]

_AGREE = 0.02
"""Measurements this near to their median, relative to it, agree."""
_ENOUGH, _MOST = 3, 9
"""How many have to agree, and after how many none is believed."""


class Refused(Exception):
    """Why a pipeline is no result.

    Attributes:
        idle: it changes nothing.
        odd: its options are refused, whatever is asked of them; others may do.
        again: another try of the same may do.
    """

    def __init__(self, reason: str, *, idle: bool = False, odd: bool = False, again: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.idle, self.odd, self.again = reason, idle, odd, again


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        latency: seconds over those of the original, both as deployed.
        size: bytes of weights over those of the original, both as deployed.
        loss: root of the mean square of the outputs' differences from the original's, relative to these; or what the
            user's own function says.
        spread: of the measurements of the latency that agree, relative to it.
        readings: how many measurements there were.
        structure: a digest of the graph and its shapes, of which alone the latency depends.
    """

    latency: float
    size: float
    loss: float
    spread: float
    readings: int
    structure: str

    def to_json(self) -> dict[str, float | int | str]:
        return asdict(self)


class Judge:
    """Runs pipelines on one model and measures what comes out.

    Args:
        calib: what passes calibrate with; `valid`, what the loss is measured on.
        evaluate: the loss of a model in the place of that of its outputs; the less, the better.

    Raises:
        UsageError: where outputs are zero or not finite, so that nothing can be relative to them.
    """

    def __init__(
        self,
        model: Model,
        watch: Stopwatch,
        calib: Batches,
        valid: Batches,
        evaluate: Callable[[Model], float] | None = None,
    ) -> None:
        from graphopt.passes._output_error import OutputError

        self.model, self.calib = model, calib
        self.warned: set[str] = set()
        if evaluate is None:
            error = OutputError(model, valid)
            if not 0 < error.size < math.inf:
                raise UsageError(
                    "the loss cannot be told: the outputs on the data are zero or not finite",
                    todo="give other data, or a loss of your own: evaluate= in Python, --evaluate on the command line",
                )
            evaluate = error.of
        self.evaluate = evaluate
        self.bytes = _weight_bytes(as_deployed(model))
        self.deployed = Deployed(model, watch)

    def judge(self, text: str, known: Mapping[str, Found] | None = None, *, check: bool = False) -> tuple[Found, Model]:
        """Run a pipeline and measure its result.

        Args:
            known: by structure, what has been measured; its latencies are taken.
            check: compare outputs after every pass, as far as it promises something of them.

        Raises:
            Refused: where there is no result, with the reason.
        """
        small = self._made(text, check)
        deployed = as_deployed(small)
        loss = float(self.evaluate(small))
        if not math.isfinite(loss):
            raise Refused("the loss is no finite number")
        structure = hashlib.sha256(str(deployed).encode()).hexdigest()[:16]
        like = (known or {}).get(structure)
        if like is not None:
            latency, spread, readings = like.latency, like.spread, 0
        else:
            latency, spread, readings = self._latency(deployed)
        return Found(latency, _weight_bytes(deployed) / self.bytes, loss, spread, readings, structure), small

    def _made(self, text: str, check: bool) -> Model:
        try:
            with self._each_warning_once():
                small, reports = run(self.model, Pipeline.parse(text), calib=self.calib, check=check)
        except GraphoptError as error:
            is_odd = isinstance(error, UsageError) and not isinstance(error, BudgetError)
            raise Refused(error.what + (f" ({error.why})" if error.why else ""), odd=is_odd) from error
        for report in reports:
            if not report.changed:
                raise Refused(f"'{report.name}' changes nothing{_why(report)}", idle=True)
        return small

    @contextmanager
    def _each_warning_once(self) -> Iterator[None]:
        """Trials warn of the same things over and over."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            if str(warning.message) not in self.warned:
                self.warned.add(str(warning.message))
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

    def _latency(self, deployed: Model) -> tuple[float, float, int]:
        try:
            timer = self.deployed.timer(deployed)
        except GraphoptError as error:
            raise Refused(f"it cannot be compiled: {error.what}") from error
        with _alone():
            return agreed(timer)


def agreed(measure: Callable[[], float]) -> tuple[float, float, int]:
    """The median of measurements that agree, their spread relative to it, and how many there were in all. Ones that do
    not agree are rejected and repeated.

    Raises:
        Refused: where too few agree.
    """
    readings: list[float] = []
    while len(readings) < _MOST:
        readings.append(measure())
        middle = statistics.median(readings)
        near = [one for one in readings if abs(one - middle) <= _AGREE * middle]
        if len(near) >= _ENOUGH:
            latency = statistics.median(near)
            return latency, (max(near) - min(near)) / latency, len(readings)
    low, high = min(readings), max(readings)
    raise Refused(f"the latency is too noisy: {_MOST} measurements from {low:.3f} to {high:.3f}", again=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Searches on one machine take turns with measuring."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "measuring.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _weight_bytes(model: Model) -> float:
    return float(cost(model).weight_bytes)


def _why(report: Report) -> str:
    """The reason that a pass gives most often for leaving something alone."""
    reasons = Counter(miss.reason for miss in report.misses).most_common(1)
    return f": {reasons[0][0]}" if reasons else ""
