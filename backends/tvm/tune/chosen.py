"""Which measured choices a build takes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graphopt.backends.tvm.kernels.choices import RULES_CHOOSE, Tuned
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.tune.database import Database, Environment, database_file
from graphopt.backends.tvm.tune.shipped import SHIPPED, shipped_rows
from graphopt.backends.tvm.tune.tasks import function_calls, model_key
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.model import Model
    from graphopt.target import Target

__all__ = ["chosen"]


def chosen(
    model: Model, target: Target, machine: Machine, tuned: Tuned | str | os.PathLike[str]
) -> tuple[Machine, dict[str, Any]]:
    """The machine with the choices that are known for a model, and what the artifact's record says of them.

    A model that was tuned gets what was kept when it was measured as a whole. Another one gets what is best for each of
    its functions by itself, but nothing that made some model slower.

    Raises:
        UsageError: when there is no such database, or the file is something else.
    """
    if isinstance(tuned, Tuned):
        return _with(machine, tuned), _facts(tuned, whole=False)
    calls = function_calls(model, target, machine)
    with _opened(tuned, Environment.of(target, machine.threads, exact=machine.exact)) as database:
        outcome = database.outcome(model_key(calls))
        if outcome is not None:
            found = Tuned(outcome.algorithms, outcome.kernels)
        else:
            dropped = database.dropped()
            best = {key: database.standing(key).best()[1] for key in calls.keys() - dropped}
            found = Tuned({}, {key: choices for key, choices in best.items() if choices != RULES_CHOOSE})
        facts = _facts(found, whole=outcome is not None)
        note = database.ignored()
    return _with(machine, found), facts | ({"ignored": note} if note else {})


@contextmanager
def _opened(tuned: str | os.PathLike[str], environment: Environment) -> Iterator[Database]:
    """The database of this name; the package's own for `shipped`, where no folder is called so."""
    with ExitStack() as stack:
        path = database_file(tuned)
        own = str(tuned) == SHIPPED and not path.exists()
        if own:
            path = database_file(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphopt-shipped-")))
        elif not path.is_file():
            raise UsageError(
                f"there is no database of measurements '{path}'",
                todo="name the one that `graphopt tune --db` wrote, or `shipped` for the one of the package",
            )
        database = stack.enter_context(closing(Database(path, environment)))
        if own:
            database.add_rows(shipped_rows())  # those of other environments too, so that it is told what they are of
        yield database


def _with(machine: Machine, tuned: Tuned) -> Machine:
    return replace(machine, tuned=tuned)


def _facts(tuned: Tuned, *, whole: bool) -> dict[str, Any]:
    """`whole_model` tells whether the choices were also measured together."""
    return {"kernels": len(tuned.kernels), "algorithms": len(tuned.algorithms), "whole_model": whole}
