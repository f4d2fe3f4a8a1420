"""Names of a stranger's model, made harmless: in a terminal, in Markdown. For HTML, `html.escape` after `printable`."""

from __future__ import annotations

import unicodedata

from graphopt.errors import GraphoptError, UsageError

__all__ = ["harmless", "markdown", "printable"]

_MARKDOWN = frozenset("\\`*_{}[]()<>#|!&~@$")


def printable(text: str) -> str:
    """The text on one line, with every character that a terminal acts on, or that hides, written as its number.

    Those are control characters (and with them all escape sequences), marks of direction, line separators, and
    what is no character at all.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    kind = unicodedata.category(character)
    if kind[0] != "C" and kind not in ("Zl", "Zp"):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def markdown(text: str) -> str:
    """The text as it stands, in Markdown: nothing in it is markup, a link, a mention or the end of a table's cell."""
    return "".join(f"&#{ord(c)};" if c in _MARKDOWN else c for c in printable(text))


def harmless(error: GraphoptError) -> UsageError:
    """The error as one that ends a comparison (exit code 2), its texts printable line by line."""
    what, where, why, todo = (
        None if text is None else "\n".join(printable(line) for line in text.split("\n"))
        for text in (error.what, error.where, error.why, error.todo)
    )
    return UsageError(what or "", where=where, why=why, todo=todo)
