"""Choices of every kind of kernel: what a builder makes of them is other code that computes the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Choices, Tuned
from graphopt.backends.tvm.runtime import ffi
from graphopt.backends.tvm.tune import builder, runner
from graphopt.backends.tvm.tune.batches import TOLERANCE
from graphopt.backends.tvm.tune.measuring import Job
from graphopt.backends.tvm.tune.space import Space
from graphopt.backends.tvm.tune.tasks import Tasks, extract, function_calls, model_key
from graphopt.target import this_machine
from tests.tune import nets

KINDS = ("convolution", "winograd", "expanded", "depthwise", "product", "strassen", "attention", "matmul")


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return extract(nets.model(), this_machine(), nets.machine())


def of_kind(tasks: Tasks, kind: str) -> Any:
    return next(task for task in tasks.known.values() if task.kind == kind)


def test_every_kind_of_task_is_found(tasks: Tasks) -> None:
    assert {task.kind for task in tasks.known.values()} == set(KINDS)
    assert tasks.left == ()
    convolution = next(problem for problem in tasks.others if problem.startswith("convolution"))
    assert convolution == "convolution 3x3 of 12x12x32 to 12x12x32 step 1x1 from 1x1 spread 1x1"
    own = {tasks.known[key].algorithm for key in tasks.of_problem(convolution)}
    assert own | set(tasks.others[convolution]) == {"direct", "squares of 2", "squares of 4"}


def test_equal_models_have_equal_keys_and_others_have_not(tasks: Tasks) -> None:
    again = extract(nets.model(), this_machine(), nets.machine())
    assert again.known.keys() == tasks.known.keys() and again.model == tasks.model
    calls = function_calls(nets.model(), this_machine(), nets.machine())
    assert model_key(calls) == tasks.model and calls.items() >= tasks.calls.items()
    assert model_key({**calls, next(iter(calls)): 7}) != tasks.model


def test_exact_builds_have_one_algorithm(tasks: Tasks) -> None:
    exact = extract(nets.model(), this_machine(), replace(nets.machine(), exact=True))
    assert exact.others == {} and not {"winograd", "strassen"} & {task.kind for task in exact.known.values()}


def test_an_algorithm_that_was_measured_is_taken(tasks: Tasks) -> None:
    for problem, others in tasks.others.items():
        for name, calls in others.items():
            machine = replace(nets.machine(), tuned=Tuned({problem: name}))
            assert function_calls(nets.model(), this_machine(), machine).items() >= calls.items(), (problem, name)


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_compute_what_the_rules_kernel_does(tasks: Tasks, kind: str, tmp_path: Path) -> None:
    task, chance = of_kind(tasks, kind), random.Random(kind)
    space = Space.of(task, nets.machine())
    found = space.unseen(set(), [], 3, chance)
    assert len(set(found)) == len(found) >= min(3, space.size - 1) and all(map(space.holds, found))
    where = json.dumps(this_machine().to_json()), 1, False
    answer = builder.compiled(task.function, [RULES_CHOOSE, *found], where, tmp_path / "candidates.so")
    assert answer["errors"] == [None] * (1 + len(found)) and answer["kind"] == kind
    names = tuple(dict.fromkeys(answer["names"]))
    assert len(names) > 1  # some of them are other code
    job = Job(tmp_path / "candidates.so", task.key, names, task.arguments, 1, 0.02)
    measured = runner.timed(ffi().load_module(str(job.library)), job.to_json())
    assert set(measured["seconds"]) == set(names) and all(len(s) >= 4 for s in measured["seconds"].values())
    assert max(measured["errors"].values()) < TOLERANCE, measured["errors"]


def test_what_a_kernel_cannot_do_is_refused_alone(tasks: Tasks, tmp_path: Path) -> None:
    wrong = Choices(division=(1, 2, 3, 4))
    request = {
        "function": of_kind(tasks, "convolution").function,
        "candidates": [choices.to_json() for choices in (RULES_CHOOSE, wrong)],
        "target": json.dumps(this_machine().to_json()),
        "threads": 1,
        "exact": False,
        "library": str(tmp_path / "library.so"),
    }
    answer = builder.respond(request)
    assert answer["names"] == ["candidate_0", None] and "ValueError" in answer["errors"][1]
    assert "failed" in builder.respond({**request, "target": "{}"})


def test_the_runner_tells_wrong_results_from_right_ones() -> None:
    import numpy as np

    def writes(value: float) -> Any:
        return lambda x, y: np.from_dlpack(y).fill(value)

    operands = [ffi().from_dlpack(np.ones(4, np.float32)) for _ in range(2)]
    functions = {"a": writes(2), "b": writes(2), "c": writes(2.02), "d": writes(float("nan"))}
    found, sample = runner._errors(functions, operands)
    assert found["a"] == found["b"] == 0 and found["c"] == pytest.approx(0.01, rel=1e-3) and found["d"] == float("inf")
    assert sample == [2, 2, 2, 2]
