"""What of a model's latency is left, of both as they are deployed: after `exact`, compiled, timed side by side."""

from __future__ import annotations

from graphopt.backend import Artifact
from graphopt.measure import Stopwatch
from graphopt.model import Model
from graphopt.pipeline import run
from graphopt.sample import usual_inputs

__all__ = ["Deployed"]


class Deployed:
    """A model to compare others with. Exact passes come before a build, so that they have no part in what is saved."""

    def __init__(self, original: Model, watch: Stopwatch) -> None:
        self.watch = watch
        self.inputs = usual_inputs(original)
        self._original = self._compiled(original)

    def part(self, model: Model) -> float:
        """Seconds of a model over those of the original, on inputs of the sizes of the user's example."""
        return self.watch.ratio(self._compiled(model), self._original, self.inputs)

    def _compiled(self, model: Model) -> Artifact:
        return self.watch.build(run(model, "exact", check=False)[0])
