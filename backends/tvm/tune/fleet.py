"""Measuring on other machines, which a tracker of TVM's RPC knows.

A job goes to whichever is free. One whose machine dies, hangs or computes other numbers than the others is done again
elsewhere; a machine that was outvoted gets no say any more.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.backends.tvm.tune.caller import address
from graphopt.backends.tvm.tune.measuring import Job, Measured, MeasuringFailed
from graphopt.backends.tvm.tune.worker import Worker, WorkerFailed
from graphopt.errors import UsageError

__all__ = ["CALLER", "FleetMeasurer", "servers"]

CALLER = "graphopt.backends.tvm.tune.caller"
_SECONDS, _TRIES, _TRACKER_SECONDS = 60.0, 4, 5.0
_AGREE = 1e-4
"""How far the numbers of two machines may be apart, relative to the largest."""


def servers(tracker: str, key: str) -> int:
    """How many servers of a kind a tracker knows.

    Raises:
        UsageError: when there is no tracker, or it knows none.
    """
    from tvm import rpc

    try:
        socket.create_connection(address(tracker), timeout=_TRACKER_SECONDS).close()  # TVM would try for a minute
        known = rpc.connect_tracker(*address(tracker)).summary()["server_info"]
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"there is no tracker at '{tracker}'",
            why=str(error),
            todo="start one with `python -m tvm.exec.rpc_tracker`, and name it as HOST:PORT",
        ) from error
    found = sum(str(info["key"]).removeprefix("server:") == key for info in known)
    if not found:
        keys = sorted({str(info["key"]).removeprefix("server:") for info in known})
        raise UsageError(
            f"the tracker at '{tracker}' knows no server of the kind '{key}'",
            why=f"it knows {', '.join(keys) or 'none at all'}",
            todo=f"start one there: graphopt rpc-server --tracker {tracker} --key {key}",
        )
    return found


class FleetMeasurer:
    """As many jobs at once as there are servers.

    Raises:
        UsageError: when there is no tracker, or it knows no server of the kind.
    """

    def __init__(self, tracker: str, key: str, seconds: float = _SECONDS) -> None:
        self.places = servers(tracker, key)
        self.tracker, self.key, self.seconds = tracker, key, seconds
        self.callers = [Worker(CALLER) for _ in range(self.places)]
        self.lost, self.banned = 0, set[str]()
        self._votes: dict[str, dict[str, Any]] = defaultdict(dict)
        self._free: queue.LifoQueue[Worker] = queue.LifoQueue()  # those that run already are the first
        self._lock = threading.Lock()
        for caller in self.callers:
            self._free.put(caller)

    def measure(self, job: Job) -> Measured:
        why = ""
        caller = self._free.get()
        try:
            for _ in range(_TRIES):
                answer = self._asked(caller, job)
                if "lost" in answer:
                    self.lost, why = self.lost + 1, str(answer["lost"])
                elif "failed" in answer:
                    raise MeasuringFailed("refused", str(answer["failed"]))
                elif self._believed(job, str(answer["server"]), answer["sample"]):
                    return Measured(answer["seconds"], answer["errors"])
        finally:
            self._free.put(caller)
        raise MeasuringFailed("crash", why or "no two machines agree on its numbers")

    def close(self) -> None:
        for caller in self.callers:
            caller.stop()

    def _asked(self, caller: Worker, job: Job) -> dict[str, Any]:
        request = {"tracker": self.tracker, "key": self.key, "seconds": self.seconds, "job": job.to_json()}
        try:
            return caller.ask(request, self.seconds + 10)
        except WorkerFailed as failure:
            return {"lost": str(failure)}

    def _believed(self, job: Job, server: str, sample: Sequence[float]) -> bool:
        """Whether a server's numbers are those of the others; the first one's are taken until another objects."""
        if server in self.banned:
            return False
        with self._lock:
            votes = self._votes[job.task]
            votes[server] = np.array(sample)
            agreeing = {one: sum(_close(a, b) for b in votes.values()) for one, a in votes.items()}
            most = max(agreeing.values())
            if most > 1:
                self.banned |= {one for one, count in agreeing.items() if count < most}
            return agreeing[server] == most and (most > 1 or len(votes) == 1)


def _close(one: Any, other: Any) -> bool:
    largest = np.max(np.abs(other), initial=0.0) or 1.0
    return bool(np.allclose(one, other, rtol=0, atol=_AGREE * largest, equal_nan=True))
