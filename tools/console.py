"""Speaking to whoever is at the other end: data to stdout, talk and progress to stderr.

Imports neither torch nor tvm, so that `graphopt --help` is quick.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from graphopt.errors import GraphoptError

__all__ = ["complain", "counted", "data", "emit_json", "say", "show_table", "size_text", "working"]

_PATIENCE = 2.0
"""Seconds of silence before progress is shown."""

_UNLIMITED = 100_000
"""Width of output that goes to a file or a pipe: nothing is wrapped there."""


def data(text: str = "") -> None:
    """Write a line of data to stdout."""
    sys.stdout.write(f"{text}\n")


def say(text: str) -> None:
    """Write a line of talk to stderr."""
    sys.stderr.write(f"{text}\n")


def emit_json(value: Any) -> None:
    """Write one JSON document to stdout. JSON has no infinity and no NaN; they become null."""
    data(json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def complain(error: GraphoptError, *, as_json: bool) -> None:
    """Write an error to stderr, as it is to be read or as a JSON document."""
    if as_json:
        say(json.dumps(error.to_json(), indent=1, ensure_ascii=False))
        return
    from rich.text import Text

    console = _console(sys.stderr)
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None, right: Sequence[str] = ()
) -> None:
    """Write a table to stdout, fitted to the terminal, or as wide as its contents where stdout is not one.

    Args:
        right: the columns that hold numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    _console(sys.stdout).print(table)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """Show `what` with a spinner once the body has taken two seconds; nothing where stderr is not a terminal.

    Yields a function that changes the text. What the body prints (a user's function that builds a model may) goes to
    stderr, so that stdout holds data only.
    """
    with redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield lambda text: None
            return
        stderr, status = sys.stderr, _console(sys.stderr).status(what)
        timer = threading.Timer(_PATIENCE, status.start)
        timer.daemon = True
        timer.start()
        try:
            yield status.update
        finally:
            timer.cancel()
            timer.join()
            status.stop()
            # The spinner puts back what it has found, which may be where the body sent its own talk for a while.
            sys.stderr = stderr


def counted(number: int, noun: str) -> str:
    """`1 edit`, `2 edits`, `3 passes`."""
    plural = f"{noun}es" if noun.endswith(("s", "ss", "h")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def size_text(size: object) -> str:
    """A count with thousands separated; an expression, and None as a question mark, as they are."""
    if size is None:
        return "?"
    return f"{size:,}" if isinstance(size, int) else str(size)


def _console(stream: Any) -> Console:
    from rich.console import Console

    return Console(file=stream, width=None if stream.isatty() else _UNLIMITED, highlight=False, emoji=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
