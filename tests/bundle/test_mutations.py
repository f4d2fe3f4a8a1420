"""Bundles that were changed at random: refused with one line, or as good as before; never a crash, never other numbers.

benchmarks/bundle_mutations.py does the same ten thousand times.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.bundle_mutations import KINDS, Trial, mutate, small_bundle
from graphopt.backend import load_artifact
from graphopt.errors import GraphoptError

COUNT = 190
IN_PYTHON = 60


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    work = tmp_path_factory.mktemp("mutations")
    yield Trial(work / "bundle", small_bundle(work / "bundle"), work)


def test_the_program(trial: Trial) -> None:
    kinds = list(KINDS)
    counts: Counter[tuple[str, str]] = Counter()
    for number in range(COUNT):
        kind = kinds[number % len(kinds)]
        outcome, what = trial.judge(random.Random(number), kind)
        assert outcome not in ("crashed", "wrong"), f"{number}: {outcome}: {what}"
        counts["sealed again" if kind == "resealed" else "changed", outcome] += 1
    # Without a fitting seal nothing at all gets through.
    assert {outcome for which, outcome in counts if which == "changed"} == {"refused"}
    assert counts["sealed again", "refused"] > 10 and counts["sealed again", "unchanged"] > 5


def test_the_python_loader(trial: Trial) -> None:
    """Consistent changes of the manifest are left out: they may well be run, in this process."""
    kinds = [kind for kind in KINDS if kind != "resealed"]
    for number in range(IN_PYTHON):
        copy = trial.work / "for-python"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(trial.bundle, copy)
        what = mutate(random.Random(number), copy, kinds[number % len(kinds)])
        with pytest.raises(GraphoptError) as caught:
            load_artifact(copy)
        assert "\n" not in caught.value.what, what
    loaded = load_artifact(trial.bundle)
    x = np.load(next(trial.work.glob("*.npy")))
    (expected,) = trial.expected.values()
    assert loaded.run([x])[0].tobytes() == expected[-x.shape[0] * 10 * 4 :]
