"""A worker that does as it is told: answers, prints, crashes, hangs."""

from __future__ import annotations

import os
import time
from typing import Any

from graphopt.backends.tvm.tune.worker import serve


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do it."""
    if request["do"] == "crash":
        os.abort()
    if request["do"] == "hang":
        time.sleep(1000)
    print("libraries talk")
    return {"got": request["do"], "cores": sorted(os.sched_getaffinity(0))}


if __name__ == "__main__":
    serve(answer)
