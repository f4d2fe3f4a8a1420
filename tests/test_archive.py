"""Files: what is saved comes back the same; what is damaged, foreign or hostile is refused with one clear error."""

from __future__ import annotations

import io
import json
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import InputError, LoadError, UsageError
from tests.compare import relative_error
from tests.tiny import NAMES, build


def small() -> go.Model:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.BatchNorm1d(5), nn.Linear(4, 10)).eval()
    net[3].weight = net[0].weight
    model = go.capture(net, (torch.randint(10, (2, 5)),), dynamic={0: {0: "batch"}})
    model.params.masks["1.weight"] = torch.ones(4, 4, dtype=torch.bool)
    model.params.precision["1.weight"] = "float16"
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", [".gopt", ".pt2"])
def test_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    net = build(name)
    model = go.capture(net.module, net.args(2), dynamic=net.dynamic)
    model.save(tmp_path / f"net{suffix}")
    again = go.load(tmp_path / f"net{suffix}")
    assert relative_error(again(*net.args(2, seed=1)), model(*net.args(2, seed=1))) == 0
    assert set(again.state_dict()) == set(model.state_dict()) and again.mode == model.mode
    assert sorted(map(sorted, again.params.ties())) == sorted(map(sorted, model.params.ties()))
    assert again.signature == model.signature
    if suffix == ".gopt":
        assert str(again) == str(model) and again.kept == model.kept


def test_everything_is_kept_and_equal_bytes(tmp_path: Path) -> None:
    model, _ = go.run(small(), [])
    model.history = ("exact",)
    for name in ("a.gopt", "b.gopt"):
        model.save(tmp_path / name)
    assert (tmp_path / "a.gopt").read_bytes() == (tmp_path / "b.gopt").read_bytes()
    again = go.load(tmp_path / "a.gopt")
    assert again.history == ("exact",) and again.params.precision == {"1.weight": "float16"}
    assert torch.equal(again.params.masks["1.weight"], model.params.masks["1.weight"])
    assert torch.equal(again.example[0], model.example[0])
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    again.save(tmp_path / "c.gopt")
    assert (tmp_path / "a.gopt").read_bytes() == (tmp_path / "c.gopt").read_bytes()


def test_a_folder_works_too(tmp_path: Path) -> None:
    (tmp_path / "net.gopt").mkdir()
    model = small()
    model.save(tmp_path / "net.gopt")
    assert (tmp_path / "net.gopt" / "graph.json").exists()
    assert str(go.load(tmp_path / "net.gopt")) == str(model)


def test_training_mode_is_kept(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    net[1].eval()
    model = go.capture(net, (torch.randn(2, 3, 4, 4),))
    model.save(tmp_path / "net.gopt")
    again = go.load(tmp_path / "net.gopt").eval().train()
    assert again.mode == "train" and str(again) == str(model)


def damaged(path: Path, member: str, change: Callable[[dict], None]) -> None:
    """Rewrite one JSON member of the zip at `path`."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(parts[member])
    change(data)
    parts[member] = json.dumps(data).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_every_operator_that_is_known_comes_back() -> None:
    from graphopt.graph_json import _target_from_json, _target_to_json
    from graphopt.ops.table import SIZE_ARITHMETIC, TABLE

    graph = torch.fx.Graph()
    known: list[object] = [*SIZE_ARITHMETIC]
    for name in TABLE:
        packet, _, overload = name.partition(".")
        known.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    assert len(known) > 400
    for target in known:
        assert _target_from_json(_target_to_json(graph.call_function(target))) is target


def test_masks_may_be_combined(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            return torch.where((x > 0) & seen, x, 0.0)

    inputs = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    model = go.capture(Masked(), inputs)
    model.save(tmp_path / "net.gopt")
    assert torch.equal(go.load(tmp_path / "net.gopt")(*inputs), model(*inputs))


def call_of(data: dict, target: str) -> dict:
    return next(row for row in data["nodes"] if row.get("target") == target)


DAMAGES: dict[str, tuple[str, Callable[[dict], None], str]] = {
    "schema": ("model.json", lambda d: d.update(schema=99), "schema 99"),
    "no signature": ("model.json", lambda d: d.pop("signature"), "damaged"),
    "operator": (
        "graph.json",
        lambda d: call_of(d, "aten.linear.default").update(target="aten.from_file.default"),
        "may not be in a file",
    ),
    "python": (
        "graph.json",
        lambda d: call_of(d, "aten.linear.default").update(target="os.system"),
        "may not be in a file",
    ),
    "shape": ("graph.json", lambda d: call_of(d, "aten.linear.default").update(shape="float32[1]"), "recorded as"),
    "dtype": ("model.json", lambda d: d["signature"]["inputs"][0].update(dtype="float32"), "damaged|no valid model"),
    "size": ("model.json", lambda d: d["signature"]["inputs"][0].update(dims=["__import__('os')", 5]), "not a size"),
    "kept": ("model.json", lambda d: d["kept"].append("ghost"), "I2"),
    "value": (
        "graph.json",
        lambda d: call_of(d, "aten.linear.default").update(args=[{"code": "1+1"}]),
        "unknown kind 'code'",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_refused(case: str, tmp_path: Path) -> None:
    member, change, words = DAMAGES[case]
    path = tmp_path / "net.gopt"
    small().save(path)
    damaged(path, member, change)
    with pytest.raises(LoadError, match=words):
        go.load(path)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "net.gopt"
    small().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"no \.gopt model"):
        go.load(path)
    for name, words in (("text.gopt", "no .gopt"), ("text.pt2", "no .pt2"), ("text.h5", "none of .gopt")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(LoadError, match=words):
            go.load(tmp_path / name)
    with pytest.raises(LoadError, match="no file"):
        go.load(tmp_path / "missing.onnx")


class Named(nn.Module):
    def forward(self, a: torch.Tensor, pair: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        b = pair["b"]
        return a.repeat_interleave(2, 0) @ b if a.shape[0] * b.shape[1] % 3 == 0 else a @ b, a.shape[0]


def named() -> go.Model:
    return go.capture(
        Named(),
        (torch.randn(6, 8), {"b": torch.randn(8, 10)}),
        dynamic={"a": {0: "batch"}, "pair": {"b": {1: "2*half"}}},
        input_names=["left", "right"],
        output_names=["product", "rows"],
    )


def parts_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_parts(path: Path, parts: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_pt2_keeps_names_ranges_and_conditions(tmp_path: Path) -> None:
    model = named()
    assert model.signature.tensor_inputs[1].dims == (8, "2*half") and len(model.signature.conditions) == 1
    model.save(tmp_path / "net.pt2")
    again = go.load(tmp_path / "net.pt2")
    assert again.signature == model.signature
    with pytest.raises(InputError, match="captured for sizes with"):
        again(torch.randn(2, 8), {"b": torch.randn(8, 4)})
    again.save(tmp_path / "again.pt2")
    assert go.load(tmp_path / "again.pt2").signature == model.signature


def test_pt2_of_others_is_named_after_its_inputs(tmp_path: Path) -> None:
    named().save(tmp_path / "net.pt2")
    parts = parts_of(tmp_path / "net.pt2")
    (record,) = [name for name in parts if name.endswith("graphopt.json")]
    del parts[record]
    write_parts(tmp_path / "theirs.pt2", parts)
    again = go.load(tmp_path / "theirs.pt2")
    assert [spec.name for spec in again.signature.inputs] == ["a", "pair_b"]
    assert set(again.signature.ranges) == {"a_0", "pair_b_1"}


@pytest.mark.parametrize("damage", ["text", "fields", "inputs", "outputs"])
def test_pt2_with_a_damaged_record_is_refused(damage: str, tmp_path: Path) -> None:
    named().save(tmp_path / "net.pt2")
    parts = parts_of(tmp_path / "net.pt2")
    (record,) = [name for name in parts if name.endswith("graphopt.json")]
    data = json.loads(parts[record])
    if damage == "fields":
        del data["ranges"]
    elif damage != "text":
        data[damage] = data[damage][:1]
    parts[record] = b"{" if damage == "text" else json.dumps(data).encode()
    write_parts(tmp_path / "bad.pt2", parts)
    with pytest.raises(LoadError, match=r"cannot be read|does not fit"):
        go.load(tmp_path / "bad.pt2")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("exploded"),))


def test_pickles_in_pt2_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small().save(tmp_path / "net.pt2")
    parts = parts_of(tmp_path / "net.pt2")
    (sample,) = [name for name in parts if "sample_inputs" in name]
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    parts[sample] = buffer.getvalue()
    root = sample.split("/")[0]
    for extra in ({}, {f"{root}/data/constants/opaque_obj_0": pickle.dumps(Bomb())}):
        write_parts(tmp_path / "bad.pt2", parts | extra)
        with pytest.raises(LoadError):
            go.load("bad.pt2")
    assert not Path("exploded").exists()


def test_unknown_suffix_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="suffixes"):
        small().save(tmp_path / "net.txt")
    with pytest.raises(UsageError, match="cannot be written"):
        small().save(tmp_path / "no" / "net.gopt")


@pytest.mark.parametrize("full_at", ["model.json", "weights.safetensors", "the zip file"])
def test_failed_write_leaves_the_old_file(tmp_path: Path, full_at: str) -> None:
    path = tmp_path / "net.gopt"
    model = go.capture(torch.nn.Linear(200, 200), (torch.randn(2, 200),))
    model.save(path)
    before = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        weights = archive.getinfo("weights.safetensors").file_size
    most = {"model.json": 100, "weights.safetensors": weights // 2, "the zip file": weights}[full_at]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with pytest.raises(UsageError, match="File too large"):
            model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_what_is_made_of_a_mapped_model_is_on_disk(tmp_path: Path) -> None:
    """Its new tensors are the right ones, may be written to, and are saved; the file stays as it was."""
    path, out = tmp_path / "net.gopt", tmp_path / "small.gopt"
    model = go.capture(torch.nn.Linear(900, 800).eval(), (torch.randn(2, 900),))
    model.save(path)
    before = path.read_bytes()
    mapped = go.load(path, mapped=True)
    assert mapped.params.mapped and not model.params.mapped and not go.load(path).params.mapped
    small, plain = (go.run(one, "low-rank{params=0.9,forms=linear}")[0] for one in (mapped, model))
    for (name, tensor), (other, expected) in zip(small.params.items(), plain.params.items(), strict=True):
        assert name == other and type(tensor) is type(expected) and tensor.requires_grad == expected.requires_grad
        assert torch.equal(tensor, expected)
        large = tensor.numel() * 4 >= 2**20
        assert tensor.untyped_storage().resizable() == (not large)  # memory that is mapped cannot grow
    assert sum(tensor.numel() * 4 >= 2**20 for tensor in small.params.values()) == 2
    small.save(out)
    with torch.no_grad():
        for tensor in small.params.values():
            tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(go.load(out).params.values(), plain.params.values(), strict=True))
    assert path.read_bytes() == before


def test_callable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mynet.py").write_text(
        "import torch\n"
        "def net(): return torch.nn.Linear(3, 2), (torch.randn(4, 3),), {0: {0: 'batch'}}\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert go.load("mynet:net")(torch.randn(7, 3)).shape == (7, 2)
    for name, words in (("mynet:wrong", "returned a int"), ("mynet:none", "no function"), ("nomod:net", "imported")):
        with pytest.raises(LoadError, match=words):
            go.load(name)
