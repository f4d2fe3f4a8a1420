"""A process that answers requests, one line of JSON for another, and can be killed and started anew."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from graphopt.backends.tvm.tune.measuring import Failure

__all__ = ["Worker", "WorkerFailed", "serve"]

_DIE_WITH_PARENT = 1
_START_SECONDS = 120.0


class WorkerFailed(Exception):
    """A worker died (`crash`) or gave no answer in time (`timeout`), and is to be started anew."""

    def __init__(self, status: Failure, why: str) -> None:
        super().__init__(why)
        self.status = status


class Worker:
    """A process that runs `python -m MODULE`, started when it is first asked.

    Args:
        cores: those it may run on; all where none are named.
    """

    def __init__(self, module: str, cores: Sequence[int] = ()) -> None:
        self.module, self.cores = module, tuple(cores)
        self.starts = 0
        self._process: subprocess.Popen[str] | None = None
        self._there = False  # it has said so
        self._answers: queue.Queue[str] = queue.Queue()

    def start(self) -> None:
        """Start the process now, without waiting for it."""
        if self._process is None or self._process.poll() is not None:
            self._start()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerFailed: when there is none in time, or the process has died of it.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:
            raise self._dead() from None
        return self._answer(seconds)

    def pause(self, wanted: bool) -> None:
        """Stop the process, or let it go on."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP if wanted else signal.SIGCONT)

    def stop(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                with suppress(OSError):  # what was not sent
                    self._process.stdin.close()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        self.start()
        process = self._process
        assert process is not None
        if not self._there:
            self._answer(_START_SECONDS)
            self._there = True
        return process

    def _start(self) -> None:
        self.stop()
        self.starts += 1
        self._there = False
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, *map(str, self.cores)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is for the search, which ends its workers
        )
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process, self._answers), daemon=True).start()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise WorkerFailed("timeout", f"no answer in {seconds:.0f} s") from None
        if not line:
            raise self._dead()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _dead(self) -> WorkerFailed:
        code = self._process.wait() if self._process is not None else None
        self.stop()
        return WorkerFailed("crash", f"its process ended with {code}")


def _read(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer requests until there are no more; for the main function of a worker's module."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if len(sys.argv) > 1:
        os.sched_setaffinity(0, [int(core) for core in sys.argv[1:]])
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
