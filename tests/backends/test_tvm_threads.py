"""The threads of compiled libraries: how many there are, when they end, and that every task is done once."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backend import load_artifact
from graphopt.backends.tvm.threads import _source
from graphopt.errors import GraphoptError
from graphopt.manifest import read_manifest, write_manifest
from tests.compare import relative_error

LIMIT = 2e-6


def _net() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.GELU(), nn.Conv2d(24, 5, 1), nn.Softmax(1)).eval()
    x = torch.randn(2, 3, 33, 35)
    with torch.no_grad():
        return net, x, net(x)


def _threads() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def test_threads_are_as_asked_and_end_with_the_artifact() -> None:
    net, x, expected = _net()
    model = go.capture(net, (x,))
    go.build(model, threads=2)(x)  # the compiler's own threads are there from now on
    before = _threads()
    for threads in (1, 2, 7):
        artifact = go.build(model, threads=threads)
        assert relative_error(artifact(x), expected) < LIMIT
        assert artifact.threads == threads
        assert _threads() == before + threads - 1
        del artifact
        assert _threads() == before


@pytest.mark.parametrize("threads", [2, 3])
def test_calls_of_several_threads(threads: int) -> None:
    """One artifact called by several threads, and another one at the same time."""
    net, x, expected = _net()
    model = go.capture(net, (x,))
    artifacts = [go.build(model, threads=threads) for _ in range(2)]
    errors: list[float] = []

    def call(artifact: go.Artifact) -> None:
        errors.extend(relative_error(artifact(x), expected) for _ in range(50))

    callers = [threading.Thread(target=call, args=(artifacts[i % 2],)) for i in range(5)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(errors) == 250 and max(errors) < LIMIT


def test_threads_that_went_to_sleep_wake_up() -> None:
    net, x, expected = _net()
    artifact = go.build(go.capture(net, (x,)), threads=3)
    for _ in range(20):
        threading.Event().wait(0.003)  # longer than they spin
        assert relative_error(artifact(x), expected) < LIMIT


_PLACES = """
import ctypes, json, os, sys, time, torch
from graphopt.backend import load_artifact
torch.set_num_threads(1)
before = set(os.listdir("/proc/self/task"))
artifact, x = load_artifact(sys.argv[1]), torch.linspace(-1, 1, 2 * 3 * 33 * 35).view(2, 3, 33, 35)
expected = artifact(x)
workers = [int(name) for name in set(os.listdir("/proc/self/task")) - before]
allowed = set(json.loads(sys.argv[2]) or os.sched_getaffinity(0))
for worker in workers:
    os.sched_setaffinity(worker, allowed)

def processor(worker):
    with open(f"/proc/self/task/{worker}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[36])

apart, equal = 0, True
for _ in range(40):
    time.sleep(0.01)  # longer than they spin
    equal &= torch.equal(artifact(x), expected)
    here = ctypes.CDLL(None).sched_getcpu()
    apart += all(processor(worker) != here for worker in workers)
kept = all(os.sched_getaffinity(worker) == allowed for worker in workers)
print(json.dumps({"workers": len(workers), "apart": apart, "equal": equal, "kept": kept}))
"""


def _places(folder: Path, allowed: list[int], starter: tuple[str, ...] = ()) -> dict[str, object]:
    """Where the thread beside the caller's ran; it may use the given processors (none given: all of its process)."""
    command = [*starter, sys.executable, "-c", _PLACES, str(folder), json.dumps(allowed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_threads_are_woken_on_another_processor_than_the_callers(tmp_path: Path) -> None:
    """Linux put them on the caller's in 37 of 40 calls after a pause, in a virtual machine with idle processors."""
    net, x, _ = _net()
    go.build(go.capture(net, (x,)), threads=2).save(tmp_path / "bundle")
    found = _places(tmp_path / "bundle", [])
    assert found["workers"] == 1 and found["equal"] and found["kept"]
    assert isinstance(found["apart"], int) and found["apart"] >= 30  # the system may move them once they run


def test_processors_that_a_thread_may_use_stay_as_they_were_set(tmp_path: Path) -> None:
    """Pinned by the user, and in a process that has one processor only."""
    net, x, _ = _net()
    go.build(go.capture(net, (x,)), threads=2).save(tmp_path / "bundle")
    for processor in sorted(os.sched_getaffinity(0))[:2]:
        found = _places(tmp_path / "bundle", [processor])
        assert found["workers"] == 1 and found["equal"] and found["kept"]
        found = _places(tmp_path / "bundle", [], ("taskset", "-c", str(processor)))
        assert found["workers"] == 1 and found["equal"] and found["kept"] and found["apart"] == 0


def test_a_folder_that_is_loaded_twice_is_one_library(tmp_path: Path) -> None:
    net, x, expected = _net()
    built = go.build(go.capture(net, (x,)), threads=3)
    built.save(tmp_path / "bundle")
    del built
    before = _threads()
    first, second = load_artifact(tmp_path / "bundle"), load_artifact(tmp_path / "bundle")
    assert _threads() == before + 2
    del first
    assert _threads() == before + 2
    assert relative_error(second(x), expected) < LIMIT
    del second
    assert _threads() == before
    assert relative_error(load_artifact(tmp_path / "bundle")(x), expected) < LIMIT


_FORKED = """
import os, sys, torch
from graphopt.backend import load_artifact
torch.set_num_threads(1)
artifact, x = load_artifact(sys.argv[1]), torch.linspace(-1, 1, 2 * 3 * 33 * 35).view(2, 3, 33, 35)
expected = artifact(x)
child = os.fork()
if not child:
    same = len(os.listdir("/proc/self/task")) == 1 and torch.equal(artifact(x), expected)
    del artifact
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(artifact(x), expected))
"""


def test_a_forked_process_does_everything_itself(tmp_path: Path) -> None:
    """There are no other threads in it; nothing may wait for them."""
    net, x, _ = _net()
    go.build(go.capture(net, (x,)), threads=3).save(tmp_path / "bundle")
    done = subprocess.run(
        [sys.executable, "-c", _FORKED, str(tmp_path / "bundle")], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_both_processors_have_their_words() -> None:
    for arch, words in {"x86_64": ("i64 202,", '"pause"'), "aarch64": ("i64 98,", '"yield"')}.items():
        assert all(word in _source(arch) for word in words) and "$" not in _source(arch)


def test_a_folder_without_threads_is_refused(tmp_path: Path) -> None:
    """Older folders were written in another format, and say so."""
    net, x, _ = _net()
    go.build(go.capture(net, (x,)), threads=1).save(tmp_path / "bundle")
    write_manifest(tmp_path / "bundle", read_manifest(tmp_path / "bundle") | {"schema": 1})
    with pytest.raises(GraphoptError, match="has format 1"):
        load_artifact(tmp_path / "bundle")
