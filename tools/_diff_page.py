"""The file that `--html` of `diff` and `opt` writes: refused early, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from graphopt.errors import UsageError
from graphopt.files import write_whole
from graphopt.tools.console import say, working
from graphopt.tools.sources import check_output

__all__ = ["check_page_output", "write_page"]


def check_page_output(path: Path) -> None:
    """Refuse a page that could not be written, before any work is done for it.

    Raises:
        UsageError: for a name that is none of a page, and so might be a model's, for a place that is a folder or does
            not exist, or where the layout library was not fetched.
    """
    from graphopt.diff.html import check_page

    if path.suffix not in (".html", ".htm"):
        raise UsageError(f"'{path}' is no name of a page", todo="give one that ends in .html")
    check_output(path, ours=None)
    check_page()


def write_page(path: Path, make: Callable[[], str]) -> None:
    """Make the page and write it."""
    with working(f"writing {path}"), write_whole(path) as scratch:
        scratch.write_text(make(), encoding="utf-8")
    say(f"wrote {path}")
