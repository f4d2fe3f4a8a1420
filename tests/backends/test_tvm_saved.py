"""Artifacts on disk: read without torch, refused when anything about them is not as it was saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backend import load_artifact
from graphopt.backends.tvm import load
from graphopt.backends.tvm.artifact import TvmArtifact
from graphopt.errors import GraphoptError, LoadError, UsageError
from graphopt.manifest import read_manifest, write_manifest
from graphopt.target import Target
from tests.compare import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> dict[str, object]:
        features = self.conv(image).relu()
        return {"features": [features], "logits": self.head(features.mean((2, 3)))}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def artifact(net: Net) -> TvmArtifact:
    model = go.capture(net, (torch.randn(2, 3, 8, 8),), dynamic={"image": {0: "batch"}})
    built = go.build(model, threads=2)
    assert isinstance(built, TvmArtifact)
    return built


@pytest.fixture
def saved(artifact: TvmArtifact, tmp_path: Path) -> Path:
    artifact.save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def beside(artifact: TvmArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose weights count as large."""
    monkeypatch.setattr("graphopt.backends.tvm.saved._MOST_WITHIN", 0)
    artifact.save(tmp_path / "beside")
    return tmp_path / "beside"


def test_small_weights_lie_in_the_code_and_large_ones_beside_it(
    artifact: TvmArtifact, saved: Path, beside: Path
) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert not (saved / "weights.bin").exists() and (beside / "weights.bin").stat().st_size > 0
    assert (saved / "model.so").stat().st_size > (beside / "model.so").stat().st_size
    assert relative_error(load(saved)(x), artifact(x)) == relative_error(load(beside)(x), artifact(x)) == 0


def test_a_saved_artifact_gives_the_same_outputs(net: Net, artifact: TvmArtifact, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.threads == 2
    assert loaded.signature == artifact.signature
    assert loaded.target == artifact.target
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        assert relative_error(loaded(x), artifact(x)) == 0
        assert relative_error(loaded(x), net(x)) < 1e-6


def test_it_runs_in_a_process_that_never_imports_torch(net: Net, saved: Path) -> None:
    x = torch.randn(3, 3, 8, 8)
    np.save(saved.parent / "x.npy", x.numpy())
    program = """
import sys
import numpy as np
from graphopt.backend import load_artifact
artifact = load_artifact(sys.argv[1])
x = np.load(sys.argv[2])
by_name, by_position = artifact(image=x), artifact(x)
assert np.array_equal(by_name["logits"], by_position["logits"])
assert isinstance(by_name["features"], list)
assert artifact.bench(x, rounds=2, warmup=1).median > 0
assert not {"torch", "tvm", "onnx"} & set(sys.modules), sorted(sys.modules)
np.save(sys.argv[3], by_name["logits"])
"""
    out = saved.parent / "y.npy"
    command = [sys.executable, "-c", program, str(saved), str(saved.parent / "x.npy"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert relative_error(torch.from_numpy(np.load(out)), net(x)["logits"]) < 1e-6


def _edited(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the manifest and seal it again, as another version of the program would have written it."""
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _two_weights_at_one_place(manifest: dict[str, Any]) -> None:
    first, *_, last = manifest["weights"]
    last["offset"] = first["offset"]


def _turned_weight(manifest: dict[str, Any]) -> None:
    """One that has as many bytes, and an axis in another place."""
    row = next(row for row in manifest["weights"] if len(set(row["shape"])) > 1)
    row["shape"] = [*row["shape"][1:], row["shape"][0]] if row["shape"][0] != row["shape"][1] else row["shape"][::-1]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "is not a saved artifact"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"backend": "tv'), "is not a saved artifact"),
    "manifest of nothing": (lambda f: (f / "manifest.json").write_text("[]"), "is not a saved artifact"),
    "no code": (lambda f: (f / "model.so").unlink(), "is missing"),
    "no library": (lambda f: (f / "lib" / "libtvm_ffi.so").unlink(), "is missing"),
    "no program": (lambda f: (f / "graphopt_run").unlink(), "is missing"),
    "no seal": (lambda f: (f / "manifest.sha256").unlink(), "manifest.sha256' is missing"),
    "changed code": (lambda f: _flip_a_byte(f / "model.so"), "is not the file that was saved"),
    "changed library": (lambda f: _flip_a_byte(f / "lib" / "libtvm_ffi.so"), "is not the file that was saved"),
    "changed source": (lambda f: _flip_a_byte(f / "src" / "graphopt.h"), "is not the file that was saved"),
    "changed manifest": (lambda f: _flip_a_byte(f / "manifest.sha256"), "is not the file that was saved"),
    "short code": (lambda f: (f / "model.so").write_bytes(b""), "is not the file that was saved"),
    "other version": (
        lambda f: _edited(f, lambda m: m["versions"].update({"apache-tvm": "0.26"})),
        "tvm 0.26, here is",
    ),
    "a file elsewhere": (lambda f: _edited(f, lambda m: m["sha256"].update({"../x": ""})), "lists the file '../x'"),
    "code not listed": (lambda f: _edited(f, lambda m: m["sha256"].pop("model.so")), "is damaged"),
    "newer format": (lambda f: _edited(f, lambda m: m.update(schema=99)), "has format 99"),
    "no signature": (lambda f: _edited(f, lambda m: m.pop("signature")), "is damaged"),
    "absurd threads": (lambda f: _edited(f, lambda m: m.update(threads=10**6)), "is damaged"),
    "weights elsewhere": (lambda f: _edited(f, _two_weights_at_one_place), "is damaged"),
    "weights of other sizes": (lambda f: _edited(f, _turned_weight), "not those that the code is for"),
    "weights of whole numbers": (
        lambda f: _edited(f, lambda m: m["weights"][0].update(dtype="int32")),
        "not those that the code is for",
    ),
    "weights that are cut": (lambda f: _edited(f, lambda m: m["weights"].pop()), "is damaged"),
    "weights beyond the file": (lambda f: _edited(f, lambda m: m["weights"][-1].update(offset=10**9)), "is too short"),
}


def test_torch_may_come_later(saved: Path, net: Net, tmp_path: Path) -> None:
    """A process that loaded the artifact without torch and imports it then gets torch's tensors for torch's."""
    image = torch.randn(3, 3, 8, 8)
    np.save(tmp_path / "image.npy", image.numpy())
    np.save(tmp_path / "logits.npy", net(image)["logits"].detach().numpy())
    script = (
        "import sys, numpy as np\n"
        "from graphopt.backend import load_artifact\n"
        "artifact, image = load_artifact(sys.argv[1]), np.load(sys.argv[2] + '/image.npy')\n"
        "first = artifact(image)['logits']\n"
        "assert type(first) is np.ndarray and 'torch' not in sys.modules\n"
        "import torch\n"
        "second = artifact(torch.from_numpy(image).clone())['logits']\n"
        "assert type(second) is torch.Tensor\n"
        "wanted = np.load(sys.argv[2] + '/logits.npy')\n"
        "print(abs(first - wanted).max() / abs(wanted).max(), abs(second.numpy() - first).max())\n"
    )
    command = [sys.executable, "-c", script, str(saved), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    error, difference = map(float, done.stdout.split())
    assert error < 1e-6 and difference == 0


def test_weights_beside_the_code_are_checked_too(beside: Path) -> None:
    load(beside)
    _flip_a_byte(beside / "weights.bin")
    with pytest.raises(LoadError, match=r"weights\.bin' is not the file that was saved"):
        load(beside)
    (beside / "weights.bin").unlink()
    with pytest.raises(LoadError, match=r"weights\.bin' is missing"):
        load(beside)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused(saved: Path, damage: str) -> None:
    spoil, message = DAMAGES[damage]
    spoil(saved)
    with pytest.raises(LoadError, match=message):
        load_artifact(saved)


def test_an_unknown_backend_in_the_manifest_is_named(saved: Path) -> None:
    _edited(saved, lambda m: m.update(backend="tvn"))
    with pytest.raises(UsageError, match="no backend 'tvn'"):
        load_artifact(saved)


def test_a_bundle_for_features_that_this_machine_lacks_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poor = Target.parse("x86-64")
    monkeypatch.setattr("graphopt.target.this_machine", lambda: poor)
    _edited(saved, lambda m: m.update(target=Target.parse("x86-64-v3").to_json()))
    with pytest.raises(LoadError, match="is code for x86_64 x86-64-v3, which this machine cannot run") as error:
        load_artifact(saved)
    assert "it may use abm, avx, avx2" in str(error.value) and "this machine is x86_64 x86-64 (" in str(error.value)


def test_a_bundle_for_another_kind_of_machine_is_refused(saved: Path) -> None:
    other = "cortex-a72" if Target.parse("cpu").arch == "x86_64" else "x86-64"
    _edited(saved, lambda m: m.update(target=Target.parse(other).to_json()))
    with pytest.raises(LoadError, match=f"{other}, which this machine cannot run"):
        load_artifact(saved)


def test_a_manifest_of_a_target_that_does_not_exist_is_refused(saved: Path) -> None:
    _edited(saved, lambda m: m["target"].update(cpu="x86-64-v9"))
    with pytest.raises(LoadError, match="is damaged") as error:
        load_artifact(saved)
    assert "unknown CPU 'x86-64-v9'" in str(error.value)


def test_nothing_is_left_behind_when_it_cannot_be_written(artifact: TvmArtifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        artifact.save(tmp_path / "no" / "such" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_keeps_the_older_folder(
    artifact: TvmArtifact, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graphopt.backends.tvm.saved.write_weights", full_disk)
    with pytest.raises(UsageError, match="No space left"):
        artifact.save(saved)
    load_artifact(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_saving_again_replaces_the_folder(artifact: TvmArtifact, saved: Path) -> None:
    (saved / "stale").write_text("from before")
    artifact.save(saved)
    assert not (saved / "stale").exists()
    load_artifact(saved)


def test_a_loaded_artifact_says_how_to_save_it(saved: Path) -> None:
    with pytest.raises(GraphoptError, match="was loaded from a folder"):
        load(saved).save(saved.parent / "again")
