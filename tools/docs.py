"""`python -m graphopt.tools.docs`: write the generated pages of docs/, in a checkout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from graphopt.errors import GraphoptError, UsageError
from graphopt.files import write_whole
from graphopt.tools.console import complain, data

__all__ = ["write_pages"]


def write_pages(root: Path) -> list[Path]:
    """Write docs/passes.md and docs/operators.md of the checkout at `root`; returns those that changed.

    Raises:
        UsageError: when `root` is no checkout.
    """
    from graphopt.ops.__main__ import document
    from graphopt.tools._pass_docs import render

    if not (root / "docs").is_dir() or not (root / "passes" / "__init__.py").is_file():
        raise UsageError(f"'{root}' is no checkout of graphopt", todo="run this where docs/ and passes/ are")
    pages = {root / "docs" / "passes.md": render(), root / "docs" / "operators.md": "\n".join(document()) + "\n"}
    changed = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in changed:
        with write_whole(path) as scratch:
            scratch.write_text(pages[path], encoding="utf-8")
    return changed


def main() -> NoReturn:
    """Entry point of `python -m graphopt.tools.docs`."""
    try:
        for path in write_pages(Path.cwd()):
            data(str(path))
    except GraphoptError as error:
        complain(error, as_json=False)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
