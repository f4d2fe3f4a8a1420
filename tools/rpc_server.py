"""`graphopt rpc-server`: let this machine measure for others."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.errors import UsageError
from graphopt.tools.console import say, working

__all__ = ["rpc_server"]


def rpc_server(
    tracker: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where machines are registered.")],
    key: Annotated[str, typer.Option(metavar="NAME", help="What kind of machine this is.")],
    port: Annotated[int, typer.Option(help="The first port to try.")] = 9090,
) -> None:
    """Register with a tracker and measure candidates for `graphopt tune --tracker`, until Ctrl-C.

    Whoever reaches the port can run code here: use it in a network that you trust. The tracker is TVM's:
    `python -m tvm.exec.rpc_tracker --port 9190`.
    """
    with working("starting"):
        from graphopt.backends.tvm.tune.caller import address
        from graphopt.backends.tvm.tune.server import Server

        try:
            address(tracker)
            server = Server(tracker, key, port=port)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"no server for the tracker at '{tracker}'", why=str(error)) from error
    say(f"measuring as '{key}' on port {server.port} for the tracker at {tracker}")
    try:
        server.wait()
    except KeyboardInterrupt:
        server.stop()
