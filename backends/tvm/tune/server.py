"""A machine of a fleet: it registers with a tracker of TVM's RPC and measures what is sent to it.

Each job runs in a process of its own, as TVM's server makes one for every connection: code that crashes or hangs ends
with it. Whoever reaches the port can run code here: as TVM's own server, it belongs into a network that is trusted.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from graphopt.backends.tvm.tune.caller import MEASURE, address

__all__ = ["Server"]


class Server:
    """A server that runs until it is stopped.

    Args:
        tracker: HOST:PORT.
        key: the kind of machine, as those who tune name it.
        port: the first one to try.
    """

    def __init__(self, tracker: str, key: str, *, host: str = "0.0.0.0", port: int = 9090) -> None:
        from tvm import rpc

        self._server: Any = rpc.Server(
            host, port, port + 100, tracker_addr=address(tracker), key=key, silent=True, server_init_callback=_register
        )
        self.port: int = self._server.port
        self.process: int = self._server.proc._proc.pid

    def wait(self) -> None:
        """Serve until the process that does so ends."""
        self._server.proc._proc.wait()

    def stop(self) -> None:
        self._server.terminate()


def _register() -> None:
    """In the process that listens; those that measure are forks of it."""
    import tvm_ffi

    name = f"{socket.gethostname()} {os.getpid()}"
    tvm_ffi.register_global_func(MEASURE, lambda text: _measured(str(text), name), override=True)


def _measured(text: str, name: str) -> str:
    import tvm_ffi

    from graphopt.backends.tvm.tune import runner

    request = json.loads(text)
    work_place = tvm_ffi.get_global_func("tvm.rpc.server.workpath")
    answer = runner.respond({**request, "library": str(work_place(os.path.basename(request["library"])))})  # noqa: PTH119
    return json.dumps({**answer, "server": name})
