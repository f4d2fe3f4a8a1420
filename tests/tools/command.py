"""Running a command in this process."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from graphopt.tools.main import app

__all__ = ["NETS", "graphopt", "output", "refused"]

NETS = "tests.tools.nets"


def graphopt(*arguments: object) -> Result:
    """The result of the command; an exception that is no exit is a failure of the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output(*arguments: object) -> Any:
    """What a command that has to succeed writes with `--json`."""
    result = graphopt(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(result: Result, code: int, *texts: str) -> str:
    """The one message of a command that has to fail."""
    assert result.exit_code == code, result.output
    assert not result.stdout
    message = result.stderr[result.stderr.index("error: ") :]
    assert message.count("error: ") == 1 and "Traceback" not in result.stderr
    for text in texts:
        assert text in message, message
    return str(message)
