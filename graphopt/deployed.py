"""What of a model's latency is left, of both as they are deployed: after `exact`, compiled, timed side by side."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.backend import Artifact
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.pipeline import run
from graphopt.sample import usual_inputs

__all__ = ["Deployed", "as_deployed"]


def as_deployed(model: Model) -> Model:
    """What a build compiles: exact passes come before it, so that they have no part in what is saved."""
    return run(model, "exact", check=False)[0]


class Deployed:
    """A model to compare others with, as both are deployed."""

    def __init__(self, original: Model, watch: Stopwatch) -> None:
        self.watch = watch
        self.inputs = usual_inputs(original)
        self._original = watch.build(as_deployed(original))

    def part(self, model: Model) -> float:
        """Seconds of a model over those of the original, on inputs of the sizes of the user's example."""
        return self.timer(as_deployed(model))()

    def timer(self, deployed: Model) -> Callable[[], float]:
        """Compile a model that is as deployed; every call measures once more what `part` is."""
        compiled: Artifact = self.watch.build(deployed)
        return lambda: self.watch.ratio(compiled, self._original, self.inputs)
