"""A process that has a job done by a server of TVM's RPC, and can be killed when that server hangs.

Request: `tracker` (HOST:PORT), `key`, `seconds`, `job`. Answer: the server's and its name, or `lost` (why).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["MEASURE", "address", "respond"]

MEASURE = "graphopt.measure"
"""The function of a server that takes a job as JSON, with the name of a file that was sent, and measures it."""


def address(tracker: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: where there are none.
    """
    host, _, port = tracker.rpartition(":")
    if not host:
        raise ValueError(f"'{tracker}' is not HOST:PORT")
    return host, int(port)


def respond(request: dict[str, Any]) -> dict[str, Any]:
    """Send the library to the next server that is free, and the job after it."""
    from tvm import rpc

    job = request["job"]
    try:
        tracker = rpc.connect_tracker(*address(request["tracker"]))
        session = tracker.request(request["key"], session_timeout=float(request["seconds"]), max_retry=1)
        session.upload(job["library"])
        answer = session.get_function(MEASURE)(json.dumps({**job, "library": Path(job["library"]).name}))
        found: dict[str, Any] = json.loads(str(answer))
        return found
    except Exception as error:  # a server that is gone shows in many ways
        return {"lost": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


if __name__ == "__main__":
    import tvm  # noqa: F401 - seconds that are no part of the first job

    from graphopt.backends.tvm.tune.worker import serve

    serve(respond)
    sys.exit(0)
