"""The program `graphopt`: its commands, and how it ends.

Exit codes: 0 done, 1 a pass or a check failed, 2 wrong usage or a bad file, 3 the model has something unsupported,
130 interrupted. An expected error is one message on stderr; GRAPHOPT_DEBUG=1 adds its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from graphopt.errors import GraphoptError, UsageError
from graphopt.tools.bench import bench
from graphopt.tools.build import build
from graphopt.tools.console import complain, data
from graphopt.tools.diff import DiffCommand, diff
from graphopt.tools.explain import explain
from graphopt.tools.groups import groups
from graphopt.tools.info import info
from graphopt.tools.opt import opt
from graphopt.tools.passes import passes
from graphopt.tools.rank import rank
from graphopt.tools.repro import repro
from graphopt.tools.rpc_server import rpc_server
from graphopt.tools.run import run
from graphopt.tools.search import search
from graphopt.tools.sensitivity import sensitivity
from graphopt.tools.targets import targets
from graphopt.tools.tune import tune

__all__ = ["app", "main"]


class _Program(TyperGroup):
    """The group of commands; turns every expected error into one message and an exit code."""

    def main(self, *positional: Any, **options: Any) -> NoReturn:
        args = options.pop("args", None) or (positional[0] if positional else None)
        words = list(sys.argv[1:] if args is None else args)
        options |= {"prog_name": "graphopt", "standalone_mode": False}
        try:
            code = super().main(words, **options)
            sys.stdout.flush()
        except (GraphoptError, typer.TyperException, OSError) as error:
            code = _report(error, as_json="--json" in words)
        sys.exit(code if isinstance(code, int) else 0)


def _report(error: GraphoptError | typer.TyperException | OSError, *, as_json: bool) -> int:
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        # Whoever read our output has gone away; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    known = error if isinstance(error, GraphoptError) else _as_usage_error(error)
    complain(known, as_json=as_json)
    if os.environ.get("GRAPHOPT_DEBUG") == "1":
        traceback.print_exception(error)
    return known.exit_code


def _as_usage_error(error: typer.TyperException | OSError) -> UsageError:
    if isinstance(error, OSError):
        return UsageError(f"the system refused: {error}")
    context = getattr(error, "ctx", None)
    message = error.format_message().replace("Value error, ", "")
    return UsageError(message, todo=f"see {context.command_path} --help" if context else None)


app = typer.Typer(
    cls=_Program,
    help="Shrink and deploy neural networks: verified graph passes, native code through TVM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    opt,
    build,
    run,
    bench,
    info,
    groups,
    sensitivity,
    rank,
    search,
    passes,
    explain,
    repro,
    targets,
    tune,
    rpc_server,
):
    app.command()(_command)
app.command(cls=DiffCommand)(diff)


def _version(wanted: bool) -> None:
    if wanted:
        from graphopt import __version__

        data(f"graphopt {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options of the program itself."""


def main() -> NoReturn:
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    app()
    sys.exit(0)


def graph_diff() -> NoReturn:
    """Entry point of the console script `graph-diff`, which is `graphopt diff`."""
    sys.argv[1:1] = ["diff"]
    main()


if __name__ == "__main__":
    main()
