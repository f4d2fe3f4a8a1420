"""The search: which task gets the next batch of candidates, and which candidates.

Both follow from what the database holds, batches on their way too, so that a search that was ended goes on as it
would have.
A task gets time by its share of the model's time, by how far it is from the roofline, and less with every batch that
found nothing better.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices, Tuned
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune.batches import Batch, Bench
from graphopt.backends.tvm.tune.database import Database, Row
from graphopt.backends.tvm.tune.space import Space
from graphopt.backends.tvm.tune.tasks import Task, Tasks

if TYPE_CHECKING:
    from graphopt.backends.tvm.ceilings import Ceilings

__all__ = ["Progress", "Search"]

NEW = 12
"""New candidates of a batch."""

_FIRST_OF_OTHERS = 3
"""New candidates of the first batch for another algorithm: most are far slower, and a look shows it."""

_CHALLENGERS, _LENT, _PARENTS = 3, 3, 6
_FINALS = 0.15
"""The part of the time at the end in which only what seems better is measured again."""

_LEAST_HEADROOM = 0.02
_HOPELESS, _OTHER_GAIN = 1.1, 0.96
"""Another algorithm is given up above the first, taken below the second, of the time of the one that rules choose."""


@dataclass(frozen=True)
class Progress:
    """How far a search is.

    Attributes:
        left: seconds.
        candidates, failed: measured so far in this search, and those of them that do not count.
        before, now: seconds of the model's tasks in all, as the rules choose and at the best that is known; None until
            every task was measured.
        task: what was measured last.
    """

    left: float
    candidates: int
    failed: int
    before: float | None
    now: float | None
    task: str


class Search:
    """Looks for better choices for the tasks of a model.

    Args:
        ceilings: what the machine can do; None where that is not known.
    """

    def __init__(
        self, tasks: Tasks, database: Database, machine: Machine, bench: Bench, ceilings: Ceilings | None
    ) -> None:
        self.tasks, self.database, self.machine, self.bench, self.ceilings = tasks, database, machine, bench, ceilings
        self.standings = {key: database.standing(key) for key in tasks.known}
        self.candidates = self.failed = 0
        self._spaces: dict[str, Space] = {}
        self._exhausted: set[str] = set()
        self._planned = deque(
            Batch(tasks.known[key], candidates, name)
            for name, key, candidates in database.unfinished()
            if key in tasks.known
        )

    def run(self, seconds: float, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Search for some time. An interrupt ends it at once; what was measured is kept."""
        end = time.monotonic() + seconds
        flying: dict[Future[list[Row]], Batch] = {}
        with ThreadPoolExecutor(self.bench.flights) as pool:
            try:
                while (left := end - time.monotonic()) > 0:
                    self._launch(pool, flying, finals=left < _FINALS * seconds)
                    if not flying:
                        break
                    done, _ = wait(flying, timeout=left, return_when=FIRST_COMPLETED)
                    for future in done:
                        batch = flying.pop(future)
                        self._note(batch, future.result())
                        report(self.progress(end - time.monotonic(), str(batch.task)))
            finally:
                self.bench.stop()

    def _launch(self, pool: ThreadPoolExecutor, flying: dict[Future[list[Row]], Batch], *, finals: bool) -> None:
        """Have as many batches on their way as there can be, each of another task."""
        while len(flying) < self.bench.flights:
            batch = self._planned.popleft() if self._planned else None
            batch = batch or self.next_batch({batch.task.key for batch in flying.values()}, finals=finals)
            if batch is None:
                return
            if not batch.name:
                batch = replace(batch, name=self.database.plan(batch.task.key, batch.candidates))
            flying[pool.submit(self.bench.rows, batch)] = batch

    def _note(self, batch: Batch, rows: list[Row]) -> None:
        task = batch.task
        self.database.add(rows, batch.name)
        self.standings[task.key] = self.database.standing(task.key)
        self.candidates += sum(row.choices != RULES_CHOOSE for row in rows)
        self.failed += sum(row.status != "ok" for row in rows)
        if not any(row.status == "ok" for row in rows):
            self._exhausted.add(task.key)

    def next_batch(self, busy: Collection[str] = (), *, finals: bool = False) -> Batch | None:
        """The batch that promises most among the tasks that are not busy; None when there is nothing left to try."""
        free = [task for key, task in self.tasks.known.items() if key not in busy and key not in self._exhausted]
        for task in sorted(free, key=lambda task: (-self.promise(task), task.key)):
            if self.promise(task) <= 0:
                return None
            batch = self._batch(task, finals=finals)
            if batch is not None:
                return batch
        return None

    def promise(self, task: Task) -> float:
        """Seconds of the model that a batch for this task may save, roughly."""
        standing, allowed = self.standings[task.key], self._allowed(task)
        calls = self._calls(task)
        if standing.seconds is None:
            return calls * max(allowed, 1e-7) * 2 if task.key in self.tasks.calls else calls * allowed / 4
        seconds = standing.seconds * standing.best()[0]
        if task.key not in self.tasks.calls and self._of_other(task) > _HOPELESS * self._of_rules(task.problem):
            return 0.0
        headroom = max(_LEAST_HEADROOM, 1 - allowed / seconds) if self.ceilings is not None else _LEAST_HEADROOM
        return float(calls * seconds * headroom * 0.5 ** (standing.barren / NEW))

    def _batch(self, task: Task, *, finals: bool) -> Batch | None:
        standing = self.standings[task.key]
        best = standing.best()[1]
        known = [RULES_CHOOSE, best, *standing.challengers(_CHALLENGERS)]
        known = list(dict.fromkeys(known))
        if finals:
            return Batch(task, tuple(known)) if standing.challengers(1) else None
        chance = random.Random(f"{task.key} {len(standing.rows)}")
        space = self._space(task)
        lent = [choices for choices in self._lent(task) if space.holds(choices) and choices not in standing.seen]
        parents = [choices for _, choices in standing.ranked()[:_PARENTS] if choices != RULES_CHOOSE]
        count = NEW if standing.rows or task.key in self.tasks.calls else _FIRST_OF_OTHERS
        lent = lent[: min(_LENT, count)]
        new = [*lent, *space.unseen(standing.seen | {*known, *lent}, parents, count - len(lent), chance)]
        return Batch(task, (*known, *new)) if new or len(known) > 2 else None

    def _lent(self, task: Task) -> list[Choices]:
        """What is best for other tasks of the kind, in the order of its gain."""
        others = [key for key, other in self.tasks.known.items() if other.kind == task.kind and key != task.key]
        found = sorted((self.standings[key].best() for key in others), key=lambda pair: (pair[0], str(pair[1])))
        return list(dict.fromkeys(choices for _, choices in found if choices != RULES_CHOOSE))

    def _space(self, task: Task) -> Space:
        if task.key not in self._spaces:
            self._spaces[task.key] = Space.of(task, self.machine)
        return self._spaces[task.key]

    def _allowed(self, task: Task) -> float:
        """Seconds of a call that the roofline allows; without ceilings some number that grows with the work."""
        if self.ceilings is None:
            return (task.flops + task.bytes) * 1e-11
        return max(task.flops / self.ceilings.flops, task.bytes / self.ceilings.bytes)

    def _calls(self, task: Task) -> int:
        own = self.tasks.calls.get(task.key)
        return self.tasks.others[task.problem][task.algorithm][task.key] if own is None else own

    def _total(self, calls: dict[str, int]) -> float | None:
        """Seconds of some calls at their best; None until all were measured."""
        known = [(n, self.standings[key]) for key, n in calls.items()]
        if any(standing.seconds is None for _, standing in known):
            return None
        return sum(n * (standing.seconds or 0.0) * standing.best()[0] for n, standing in known)

    def _of_rules(self, problem: str) -> float:
        return self._total(self.tasks.of_problem(problem)) or float("inf")

    def _of_other(self, task: Task) -> float:
        return self._total(dict(self.tasks.others[task.problem][task.algorithm])) or 0.0

    def algorithms(self) -> dict[str, str]:
        """Problems for which another algorithm is faster than the one that rules choose, and which."""
        found = {}
        for problem, others in self.tasks.others.items():
            totals = [(total, name) for name, calls in others.items() if (total := self._total(dict(calls)))]
            if totals and min(totals)[0] < _OTHER_GAIN * self._of_rules(problem):
                found[problem] = min(totals)[1]
        return found

    def tuned(self) -> Tuned:
        """The best choices that are known."""
        kernels = {key: standing.best()[1] for key, standing in self.standings.items()}
        return Tuned(self.algorithms(), {key: choices for key, choices in kernels.items() if choices != RULES_CHOOSE})

    def progress(self, left: float, task: str) -> Progress:
        """Where the search is."""
        chosen = self.algorithms()
        before = now = 0.0
        for key, calls in self.tasks.calls.items():
            standing = self.standings[key]
            if standing.seconds is None:
                return Progress(max(0.0, left), self.candidates, self.failed, None, None, task)
            before += calls * standing.seconds
            if self.tasks.known[key].problem not in chosen:
                now += calls * standing.seconds * standing.best()[0]
        now += sum(self._total(dict(self.tasks.others[p][name])) or 0.0 for p, name in chosen.items())
        return Progress(max(0.0, left), self.candidates, self.failed, before, now, task)
