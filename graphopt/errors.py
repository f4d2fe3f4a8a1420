"""Every error graphopt raises on purpose.

An error says what is wrong, where, why, and what to do. The command line prints it as it is and exits with
`exit_code`: 1 a pass or a check failed, 2 wrong usage or a bad file, 3 the model has something unsupported.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CheckFailed",
    "GraphoptError",
    "InputError",
    "LoadError",
    "PassFailed",
    "UnsupportedError",
    "UsageError",
    "VerifyError",
]


class GraphoptError(Exception):
    """Base of all graphopt errors.

    Args:
        what: one sentence, what is wrong.
        where: the place: file, pass, node with its module path and the user's source line.
        why: the reason, when `what` does not already give it.
        todo: what the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, todo: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.todo = what, where, why, todo

    def __str__(self) -> str:
        rows = [self.what]
        rows += [f"  {label} {_indented(text)}" for label, text in self._details() if text]
        return "\n".join(rows)

    def _details(self) -> tuple[tuple[str, str | None], ...]:
        return (("where:", self.where), ("why:  ", self.why), ("do:   ", self.todo))

    def to_json(self) -> dict[str, str | int | None]:
        """The error as plain data, for `--json`."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "do": self.todo,
        }


def _indented(text: str) -> str:
    return text.rstrip().replace("\n", "\n         ")


class UsageError(GraphoptError):
    """A wrong call: an unknown option, a missing file, an unknown pass."""

    exit_code = 2


class InputError(UsageError):
    """Inputs whose number, shape or dtype differ from the model's signature."""


class LoadError(UsageError):
    """A file that cannot be read as what it claims to be."""


class UnsupportedError(GraphoptError):
    """The model has something that graphopt does not handle; the message names it."""

    exit_code = 3


class VerifyError(GraphoptError):
    """A graph breaks an invariant; the message starts with the invariant's number (I1 to I10)."""


class PassFailed(GraphoptError):
    """A pass raised or left an invalid graph; the input model is untouched."""


class CheckFailed(GraphoptError):
    """Numbers differ by more than the contract of a pass allows."""
