"""What is said after a spinner arrives."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stderr
from io import StringIO

import pytest

from graphopt.tools import console


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_a_spinner_that_begins_while_the_body_is_silenced_does_not_silence_what_comes_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "_PATIENCE", 0.05)
    with console.working("spinning"), redirect_stderr(StringIO()):
        time.sleep(0.3)
    console.say("said")
    assert "spinning" in terminal.getvalue() and terminal.getvalue().endswith("said\n")
