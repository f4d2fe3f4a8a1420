"""The search, with times that follow from the choices: where it looks, what it keeps, how it goes on."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices
from graphopt.backends.tvm.tune.batches import Batch
from graphopt.backends.tvm.tune.database import Database, Row
from graphopt.backends.tvm.tune.search import NEW, Progress, Search
from graphopt.backends.tvm.tune.tasks import Tasks, extract
from graphopt.target import this_machine
from tests.tune import nets


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return extract(nets.model(), this_machine(), nets.machine())


def ratio(task: str, choices: Choices) -> float:
    """From 0.7 to 1.3, the same every time."""
    if choices == RULES_CHOOSE:
        return 1.0
    digest = hashlib.sha256(f"{task} {choices}".encode()).digest()
    return 0.7 + 0.6 * digest[0] / 255


class Simulated:
    """A bench that measures nothing."""

    def __init__(self, seconds: Callable[[str], float] = lambda task: 1e-3, tries: int | None = None) -> None:
        self.flights = 1
        self.seconds, self.tries = seconds, tries
        self.batches: list[Batch] = []
        self.wrong: set[Choices] = set()

    def rows(self, batch: Batch) -> list[Row]:
        if self.tries is not None and len(self.batches) >= self.tries:
            raise KeyboardInterrupt
        self.batches.append(batch)
        key, rows = batch.task.key, []
        for choices in batch.candidates:
            found = ratio(key, choices)
            status = "wrong" if choices in self.wrong else "ok"
            rows.append(Row(key, choices, status, found, found * self.seconds(key)))
        return rows

    def stop(self) -> None:
        pass


def search(tasks: Tasks, folder: Path, bench: Simulated) -> Search:
    return Search(tasks, Database(folder, nets.ENVIRONMENT), nets.machine(), bench, None)  # type: ignore[arg-type]


def interrupted_after(tasks: Tasks, folder: Path, batches: int, **options: Any) -> tuple[Search, Simulated]:
    bench = Simulated(tries=batches, **options)
    made = search(tasks, folder, bench)
    with pytest.raises(KeyboardInterrupt):
        made.run(60)
    return made, bench


def test_the_best_that_was_measured_twice_is_kept(tasks: Tasks, tmp_path: Path) -> None:
    made, bench = interrupted_after(tasks, tmp_path, 60)
    met: dict[str, Counter[Choices]] = {key: Counter() for key in tasks.known}
    for batch in bench.batches:
        assert batch.candidates[0] == RULES_CHOOSE and len(set(batch.candidates)) == len(batch.candidates)
        met[batch.task.key].update(batch.candidates)
    assert all(counts for key, counts in met.items() if key in tasks.calls)
    gains = 0
    for key, counts in met.items():
        sure = [(ratio(key, c), c) for c, n in counts.items() if n > 1 and c != RULES_CHOOSE]
        best = min(sure, key=lambda pair: pair[0], default=(1.0, RULES_CHOOSE))
        expected = best if best[0] < 0.99 else (1.0, RULES_CHOOSE)
        assert made.standings[key].best()[0] == pytest.approx(expected[0])
        gains += expected[0] < 0.8
    assert gains > len(tasks.calls) / 2
    assert made.tuned().kernels.items() <= {k: s.best()[1] for k, s in made.standings.items()}.items()


def test_a_search_that_was_ended_goes_on_as_it_would_have(tasks: Tasks, tmp_path: Path) -> None:
    whole, straight = interrupted_after(tasks, tmp_path / "whole", 30)
    pieces: list[Batch] = []
    for _ in range(10):
        last, bench = interrupted_after(tasks, tmp_path / "pieces", 3)
        pieces += bench.batches
    assert pieces == straight.batches
    assert last.tuned() == whole.tuned() and len(last.tuned().kernels) > 0
    rows = [[last.standings[key].rows, whole.standings[key].rows] for key in tasks.known]
    assert all(one == other for one, other in rows)


def test_wrong_candidates_are_never_chosen(tasks: Tasks, tmp_path: Path) -> None:
    first, bench = interrupted_after(tasks, tmp_path / "first", 25)
    chosen = set(first.tuned().kernels.values())
    bench = Simulated(tries=25)
    bench.wrong = chosen
    made = search(tasks, tmp_path / "second", bench)
    with pytest.raises(KeyboardInterrupt):
        made.run(60)
    assert chosen and not chosen & set(made.tuned().kernels.values())
    assert made.failed == sum(row.status == "wrong" for s in made.standings.values() for row in s.rows) > 0


def test_time_goes_where_the_time_of_the_model_goes(tasks: Tasks, tmp_path: Path) -> None:
    heavy = next(iter(tasks.calls))
    _, bench = interrupted_after(tasks, tmp_path, 40, seconds=lambda task: 1.0 if task == heavy else 1e-5)
    spent = Counter(batch.task.key for batch in bench.batches)
    assert spent.most_common(1)[0][0] == heavy and spent[heavy] >= 5


def test_another_algorithm_is_given_up_or_taken(tasks: Tasks, tmp_path: Path) -> None:
    problem = next(problem for problem in tasks.others if problem.startswith("convolution"))
    slow, fast = sorted(tasks.others[problem])
    times = {**dict.fromkeys(tasks.others[problem][slow], 1.0), **dict.fromkeys(tasks.others[problem][fast], 1e-4)}
    made, bench = interrupted_after(tasks, tmp_path, 50, seconds=lambda task: times.get(task, 1e-3))
    assert made.algorithms()[problem] == fast and made.tuned().algorithms[problem] == fast
    spent = Counter(batch.task.algorithm for batch in bench.batches if batch.task.problem == problem)
    assert spent[slow] == 1 < spent[fast]
    (first,) = (batch for batch in bench.batches if batch.task.algorithm == slow and batch.task.problem == problem)
    assert len(first.candidates) < NEW / 2


def test_at_the_end_only_what_seems_better_is_measured(tasks: Tasks, tmp_path: Path) -> None:
    made, _ = interrupted_after(tasks, tmp_path, 20)
    waiting = {key for key, standing in made.standings.items() if standing.challengers(1)}
    batch = made.next_batch(finals=True)
    assert waiting and batch is not None and batch.task.key in waiting
    known = {RULES_CHOOSE, made.standings[batch.task.key].best()[1], *made.standings[batch.task.key].challengers(3)}
    assert set(batch.candidates) == known
    assert made.next_batch(waiting, finals=True) is None


def test_busy_tasks_are_left_alone_and_good_choices_are_lent(tasks: Tasks, tmp_path: Path) -> None:
    made, _ = interrupted_after(tasks, tmp_path, 40)
    batch = made.next_batch()
    assert batch is not None
    other = made.next_batch({batch.task.key})
    assert other is not None and other.task.key != batch.task.key
    assert made.next_batch(tasks.known.keys()) is None
    known = [s.best()[1] for k, s in made.standings.items() if tasks.known[k].kind == "product"]
    product = next(task for task in tasks.known.values() if task.kind == "product")
    assert set(made._lent(product)) <= set(known) - {RULES_CHOOSE}


def test_progress_falls_and_says_nothing_before_every_task_was_met(tasks: Tasks, tmp_path: Path) -> None:
    said: list[Progress] = []
    bench = Simulated(tries=60)
    with pytest.raises(KeyboardInterrupt):
        search(tasks, tmp_path, bench).run(60, said.append)
    first = next(n for n, progress in enumerate(said) if progress.before is not None)
    assert first + 1 >= len(tasks.calls) and all(progress.now is None for progress in said[:first])
    falling = [progress.now for progress in said[first:]]
    assert falling[-1] < falling[0] and falling[-1] < said[-1].before
    assert said[-1].candidates == sum(len(batch.candidates) - 1 for batch in bench.batches)


def test_a_search_ends_when_there_is_nothing_left_to_try(tasks: Tasks, tmp_path: Path) -> None:
    key = next(key for key in tasks.calls if tasks.known[key].kind == "attention")
    one = replace(tasks, known={key: tasks.known[key]}, calls={key: 1}, others={})
    made = search(one, tmp_path, Simulated())
    made._spaces[key] = replace(made._space(tasks.known[key]), tile=(None, (4, 2)))
    made.run(60)
    assert len(made.standings[key].seen) == made._space(tasks.known[key]).size == 10
    assert made.next_batch() is None
