"""Change a bundle at random, many times, and see what the program `graphopt_run` makes of each.

    python -m benchmarks.bundle_mutations --count 10000 --seed 0

Every changed bundle has to be refused with one line, or to give the outputs of the unchanged one. Counted are:

    refused     exit code 2 and one line
    unchanged   the outputs are those of the unchanged bundle, bit for bit
    wrong       other outputs, without a word
    crashed     a signal, another exit code, or not the one line

Most changes are of bytes, lengths and files, or of a field of the manifest as an editor would change it. The kind
`resealed` writes a fitting seal after changing a field: such a bundle is consistent, and the seal is no signature, so
that it may be accepted; it must not crash. Those that are accepted and give other outputs are counted as `accepted`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.manifest import MANIFEST, write_manifest

__all__ = ["KINDS", "Trial", "mutate", "small_bundle"]

SECONDS = 60


def _flip(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
    content[at] ^= bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {path.name}"


def _overwrite(rng: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    at, new = rng.randrange(len(content)), rng.randbytes(rng.randint(1, 64))
    new = new[: len(content) - at]
    if content[at : at + len(new)] == new:
        new = bytes([new[0] ^ 1]) + new[1:]
    content[at : at + len(new)] = new
    path.write_bytes(content)
    return f"{len(new)} bytes from {at} of {path.name}"


def _cut(rng: random.Random, path: Path) -> str:
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"{path.name} cut to {size} bytes"


def _extend(rng: random.Random, path: Path) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 4096)))
    return f"{path.name} made longer"


def _remove(_rng: random.Random, path: Path) -> str:
    path.unlink()
    return f"{path.name} removed"


def _field(rng: random.Random, path: Path) -> str:
    """Change a field of the manifest; the seal stays."""
    path = _root(path) / MANIFEST
    manifest = json.loads(path.read_text())
    what = _change_a_field(rng, manifest)
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return what


def _resealed(rng: random.Random, path: Path) -> str:
    """Change a field of the manifest and write a seal that fits."""
    root = _root(path)
    manifest = json.loads((root / MANIFEST).read_text())
    what = _change_a_field(rng, manifest)
    write_manifest(root, manifest)
    return f"{what}, sealed"


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "flip": _flip,
    "overwrite": _overwrite,
    "cut": _cut,
    "extend": _extend,
    "remove": _remove,
    "field": _field,
    "resealed": _resealed,
}
_SHARES = (40, 15, 10, 5, 5, 15, 10)


def _root(path: Path) -> Path:
    return next(folder for folder in path.parents if (folder / MANIFEST).exists())


def _change_a_field(rng: random.Random, manifest: dict[str, Any]) -> str:
    """Another value at a random place of a JSON document, or a field less or more."""
    at: Any = manifest
    path: list[str] = []
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        path.append(str(key))
        if not (isinstance(at[key], dict | list) and at[key] and rng.random() < 0.9):
            break
        at = at[key]
    values = [None, True, 0, 1, -1, 64, 2**31, 2**63 - 1, 10**30, 0.5, "", "x", "../x", [], {}, [0], "float64"]
    old = at[key]
    if rng.random() < 0.1 and isinstance(at, dict):
        del at[key]
        return f"no {'.'.join(path)}"
    if isinstance(old, int) and rng.random() < 0.3:
        values = [old + rng.choice((-64, -4, -1, 1, 4, 64))]
    at[key] = rng.choice([value for value in values if value != old])
    return f"{'.'.join(path)} = {at[key]!r}"


def mutate(rng: random.Random, folder: Path, kind: str) -> str:
    """Change a bundle in place; returns what was done. Its files may be links: they are replaced, not written to."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    for each in (path, folder / MANIFEST, folder / "manifest.sha256"):
        content, mode = each.read_bytes(), each.stat().st_mode
        each.unlink()
        each.write_bytes(content)
        each.chmod(mode)
    return KINDS[kind](rng, path)


class Trial:
    """A bundle, an input, and a program out of the mutations' reach to run changed copies of the bundle with."""

    def __init__(self, bundle: Path, inputs: dict[str, np.ndarray[Any, Any]], work: Path) -> None:
        self.bundle, self.work = bundle, work
        self.program = work / "graphopt_run"
        shutil.copy(bundle / "graphopt_run", self.program)
        self.options = []
        for name, array in inputs.items():
            np.save(work / f"{name}.npy", array)
            self.options += ["--input", f"{name}={work / name}.npy"]
        code, _, self.expected = self._run(bundle)
        assert code == 0 and self.expected

    def judge(self, rng: random.Random, kind: str) -> tuple[str, str]:
        """Change a copy and run it; returns what came of it, and what was changed."""
        copy = self.work / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.bundle, copy, copy_function=os.link)
        what = mutate(rng, copy, kind)
        code, lines, results = self._run(copy)
        if code == 2 and len(lines) == 1 and lines[0].startswith("graphopt_run: "):
            return "refused", f"{what}: {lines[0]}"
        if code == 0 and results == self.expected:
            return "unchanged", what
        if code == 0:
            return ("accepted" if kind == "resealed" else "wrong"), what
        return "crashed", f"{what}: exit code {code}, {lines}"

    def _run(self, folder: Path) -> tuple[int, list[str], dict[str, bytes]]:
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        command = [str(self.program), str(folder), *self.options, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        lines = [line for line in done.stderr.splitlines() if "Warning: Scope" not in line]  # TVM's, about nothing
        return done.returncode, lines, {path.name: path.read_bytes() for path in out.glob("*.npy")}


def small_bundle(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write a bundle of a small net for this machine; returns an input for it."""
    import torch

    import graphopt as go

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10))
    x = torch.randn(2, 3, 8, 8)
    model = go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})
    go.build(model, threads=1).save(folder)
    return {model.signature.tensor_inputs[0].name: x.numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, counts, examples = time.monotonic(), Counter[tuple[str, str]](), {}
    with tempfile.TemporaryDirectory(prefix="graphopt-mutations-") as name:
        work = Path(name)
        trial = Trial(work / "bundle", small_bundle(work / "bundle"), work)
        for number in range(options.count):
            rng = random.Random(f"{options.seed} {number}")
            (kind,) = rng.choices(list(KINDS), _SHARES)
            outcome, what = trial.judge(rng, kind)
            counts[kind, outcome] += 1
            examples[kind, outcome] = what
    print(json.dumps({"count": options.count, "seed": options.seed, "seconds": round(time.monotonic() - start)}))
    for (kind, outcome), count in sorted(counts.items()):
        print(f"{count:6d}  {kind:10s} {outcome:10s} such as: {examples[kind, outcome]}")


if __name__ == "__main__":
    main()
