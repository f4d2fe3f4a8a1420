"""Waiting for a fleet."""

from __future__ import annotations

import contextlib
import time

from graphopt.backends.tvm.tune.fleet import servers
from graphopt.errors import UsageError

__all__ = ["until"]


def until(tracker: str, count: int, key: str = "board", seconds: float = 60) -> int:
    """How many servers the tracker knows, once it knows `count` or time is up: it hears of them in its own time."""
    end, known = time.monotonic() + seconds, -1
    while known != count and time.monotonic() < end:
        with contextlib.suppress(UsageError):  # none yet
            known = servers(tracker, key)
        time.sleep(0.1)
    return known
