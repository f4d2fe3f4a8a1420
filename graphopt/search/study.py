"""Optuna's study that trials are kept in: opened, known again, and cleaned of what died."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from graphopt.search.proposals import Baseline

__all__ = [
    "IDENTITY",
    "enqueue",
    "open_study",
    "recover",
    "require_optuna",
    "shown_address",
    "storage_errors",
    "worker",
]

IDENTITY = "graphopt"
"""The attribute of a study that says what it searches."""
_BEAT, _SILENCE = 15, 120
"""Seconds between signs of life of a running trial, and after which it counts as dead."""
_TRIES, _WAIT = 50, 0.2
_IN_THE_WAY = re.compile("already exists|UNIQUE constraint|duplicate key|no such table", re.IGNORECASE)
_MARK = uuid.uuid4().hex[:8]


def require_optuna() -> None:
    """Ask for Optuna before anything else is done.

    Raises:
        UsageError: when it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "a search needs Optuna, which is not installed", todo="pip install 'graphopt[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it tells every trial otherwise, and we tell them ourselves


def worker() -> str:
    """This process, as trials name the one that runs them."""
    return f"{socket.gethostname()} {os.getpid()} {_MARK}"


def open_study(
    address: str | None,
    name: str,
    objectives: int,
    identity: dict[str, Any],
    first: Sequence[Baseline],
    sampler: BaseSampler,
) -> Study:
    """The study of that name, made with its first trials if there is none.

    Raises:
        UsageError: for a storage that cannot be opened, is none of Optuna's, or holds a study of that name that
            searches something else, with what differs.
    """
    import optuna

    storage = optuna.storages.InMemoryStorage() if address is None else _storage(address)
    where = f"study '{name}' in {shown_address(address)}" if address else f"study '{name}'"
    with storage_errors(address):
        try:
            study = optuna.create_study(
                storage=storage, study_name=name, directions=["minimize"] * objectives, sampler=sampler
            )
        except optuna.exceptions.DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
        else:
            for baseline in first:
                enqueue(study, baseline.params, {"alone": baseline.alone} if baseline.alone else {})
            study.set_user_attr(IDENTITY, identity)  # last: what has no identity is not finished
        _compare(_identity(study, where), identity, where)
    return study


def enqueue(study: Study, params: Any, attrs: dict[str, Any]) -> None:
    """Have a trial tried before others."""
    study.enqueue_trial(dict(params), user_attrs={"queued": True, **attrs})


def recover(study: Study) -> None:
    """Trials whose process died on this machine are marked so, and are tried once more, as is what was interrupted."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial.user_attrs.get("worker")):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, RuntimeError):
                continue  # another process was faster
    retried = {trial.user_attrs.get("retry_of") for trial in study.get_trials(deepcopy=False)}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if trial.number not in retried:
            _retry(study, trial)


def _retry(study: Study, trial: FrozenTrial) -> None:
    """Once: what kills its process twice is left alone."""
    if "retry_of" in trial.user_attrs:
        return
    kept = {name: trial.user_attrs[name] for name in ("alone",) if name in trial.user_attrs}
    enqueue(study, {**trial.system_attrs.get("fixed_params", {}), **trial.params}, {**kept, "retry_of": trial.number})


def _is_dead(name: str | None) -> bool:
    host, number, mark = (name or "? 0 ?").split()
    if host != socket.gethostname():
        return False
    if int(number) == os.getpid():
        return mark != _MARK  # containers give the same number to who comes after
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _storage(address: str) -> BaseStorage:
    import optuna

    _check_address(address)
    arguments = {"connect_args": {"timeout": 60}} if address.startswith("sqlite") else {}
    with storage_errors(address), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for attempt in range(_TRIES):
            try:
                return optuna.storages.RDBStorage(
                    address,
                    engine_kwargs=arguments,
                    heartbeat_interval=_BEAT,
                    grace_period=_SILENCE,
                    heartbeat_stale_trial_callback=_retry,
                )
            except Exception as error:
                # Processes that make the tables of a new storage at once get into each other's way.
                if attempt == _TRIES - 1 or not _IN_THE_WAY.search(str(error)):
                    raise
                time.sleep(_WAIT)
    raise AssertionError("the last attempt returns or raises")


def _check_address(address: str) -> None:
    if "://" not in address:
        raise UsageError(
            f"the storage '{address}' is no address",
            todo=f"write sqlite:///{address} for a file, or the address of a database, such as postgresql://HOST/NAME",
        )
    if not address.startswith("sqlite:///"):
        return
    path = Path(address.removeprefix("sqlite:///").partition("?")[0])
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as file:
            tables = {row[0] for row in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except sqlite3.Error as error:
        raise UsageError(
            f"the storage '{address}' cannot be used", why=str(error), todo="name a new file, which is made then"
        ) from error
    if tables and not {"studies", "trials"} <= tables:
        raise UsageError(
            f"the storage '{address}' holds something else than Optuna's studies",
            why=f"its tables are {', '.join(sorted(tables)[:5])}",
            todo="name a new file, which is made then",
        )


@contextmanager
def storage_errors(address: str | None) -> Iterator[None]:
    """Failures of the database as errors of ours, without passwords."""
    import sqlalchemy.exc
    from optuna.exceptions import OptunaError

    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, OptunaError, ImportError, RuntimeError, ValueError) as error:
        cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
        raise UsageError(
            f"the storage '{shown_address(address)}' cannot be used",
            why=str(cause).partition("\n")[0],
            todo="look whether the folder, or the server, is there, and the driver of the database is installed",
        ) from error


def shown_address(address: str | None) -> str:
    """An address without its password."""
    import sqlalchemy

    try:
        return sqlalchemy.make_url(address or "").render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return str(address)


def _identity(study: Study, where: str) -> dict[str, Any]:
    for _ in range(_TRIES):
        found = study.user_attrs.get(IDENTITY)
        if isinstance(found, dict):
            return found
        if not all(trial.user_attrs.get("queued") for trial in study.get_trials(deepcopy=False)):
            break
        time.sleep(_WAIT)  # another process is about to finish making it
    raise UsageError(
        "this study is none of graphopt's",
        where=where,
        todo="name another study (--study, study=)",
    )


def _compare(found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    wrong = [
        f"{key} is {found.get(key)!r} there, and {value!r} here"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if wrong:
        raise UsageError(
            "this study searches something else",
            where=where,
            why="\n".join(wrong),
            todo="give the same model, data, target and goal, or name another study with --study NAME (study=)",
        )
