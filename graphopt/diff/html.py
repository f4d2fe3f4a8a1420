"""The page of a comparison: one file that holds its data, its program and the library that lays graphs out.

Nothing is loaded from anywhere. The content security policy of the page allows the scripts and the style sheet that
are written into it, by their hashes, one worker made from a string of the page, and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from graphopt.errors import UsageError

__all__ = ["check_page", "html_page"]

_FOLDER = Path(__file__).parent / "page"
_LIBRARY = ("elk-api.js", "elk-worker.min.js")
_START = "main"
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?(?:function|class|const|let) (\w+))", re.MULTILINE)


def check_page() -> None:
    """Raise the error of `html_page` now, before any work is done for a page.

    Raises:
        UsageError: when the layout library of the page was not fetched.
    """
    missing = [name for name in _LIBRARY if not (_FOLDER / "vendor" / name).is_file()]
    if missing:
        raise UsageError(
            f"the page cannot be written: {' and '.join(missing)} of its layout library are missing",
            why="the library is no part of the source; it is fetched once, with npm",
            todo="run `make page` in the checkout of graphopt, or install a wheel of it",
        )


def html_page(data: dict[str, Any]) -> str:
    """The page that shows `data` (see `page_data`).

    Raises:
        UsageError: when the layout library of the page was not fetched.
    """
    check_page()
    worker = {"worker": (_FOLDER / "vendor" / "elk-worker.min.js").read_text("utf-8")}
    library = (_FOLDER / "vendor" / "elk-api.js").read_text("utf-8")
    style = (_FOLDER / "style.css").read_text("utf-8")
    program = _program()
    parts = {
        "policy": _policy([library, program], style),
        "style": style,
        "data": _embedded(data),
        "worker": _embedded(worker),
        "library": library,
        "program": program,
    }
    template = (_FOLDER / "index.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _policy(scripts: list[str], style: str) -> str:
    allowed = " ".join(map(_hash, scripts))
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; worker-src blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(data: dict[str, Any]) -> str:
    """JSON in ASCII without `<`, `>` and `&`: nothing in it ends the element that it stands in, or is a character that
    hides.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _program() -> str:
    """The modules of the page as one, each after those that it imports and in a scope of its own."""
    scopes: dict[str, str] = {}

    def add(name: str) -> str:
        text = (_FOLDER / f"{name}.js").read_text("utf-8")
        for _, used in _IMPORT.findall(text):
            if used not in scopes:
                scopes[used] = add(used)
        exported = ", ".join(name for _, name in _EXPORT.findall(text))
        body = _EXPORT.sub(r"\1", _IMPORT.sub(r"const \1 = from_\2;", text))
        # The one that starts the others may wait, which a function around it would have to wait for in turn.
        return body if name == _START else f"const from_{name} = (() => {{\n{body}return {{ {exported} }};\n}})();\n"

    start = add(_START)
    return "\n".join([*scopes.values(), start])
