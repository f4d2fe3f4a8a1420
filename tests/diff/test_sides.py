"""Costs, numbers, latency, files left on disk, and the JSON form."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import InputError, LoadError, UsageError
from graphopt.mapped import map_tensors
from tests.diff.nets import captured


def test_costs_by_total_operator_and_module() -> None:
    model = captured("resnet")
    folded, _ = go.run(model, "fold-batch-norm")
    cost = go.diff(model, folded).cost
    assert cost.operators["aten.batch_norm.default"] == (9, 0) and cost.operators["aten.conv2d.default"] == (9, 9)
    assert cost.totals["nodes"][0] - cost.totals["nodes"][1] == 9
    assert cost.totals["macs"][0] == cost.totals["macs"][1]
    assert "blocks.0.bn1" in cost.changed_modules() and "head" not in cost.changed_modules()
    assert cost.modules["blocks.0.bn1"]["parameters"] == (16, None)
    assert go.diff(model, folded, cost=False).cost is None


def test_numbers_part_at_the_first_node_that_differs() -> None:
    model = captured("resnet")
    other = model.clone()
    with torch.no_grad():
        other.params["blocks.2.conv1.weight"].mul_(1.1)
    found = go.diff(model, other, run=True)
    first = found.a.view.items[found.numbers.first.a]
    assert (first.operator, first.path) == ("conv2d", "blocks.2.conv1")
    before = [row.error for row in found.numbers.profile if row.a < first.index]
    assert before and set(before) == {0.0}
    assert found.numbers.first.error > 0.01 and found.numbers.outputs[0] > 1e-4
    assert go.diff(model, other, run=True, tolerance=0.9).numbers.first is None


def test_numbers_of_a_rewritten_region_are_compared_where_it_ends() -> None:
    model = captured("resnet")
    folded, _ = go.run(model, "fold-batch-norm")
    numbers = go.diff(model, folded, run=True).numbers
    assert numbers.first is None and max(row.error for row in numbers.profile) < 1e-5
    with torch.no_grad():
        folded.params["blocks.1.conv2.weight"].mul_(1.2)
    wrong = go.diff(model, folded, run=True)
    assert wrong.a.view.items[wrong.numbers.first.a].path == "blocks.1.bn2"


def test_inputs_may_be_given_and_have_to_fit_both() -> None:
    model = captured("branches")
    x = torch.randn(7, 6)
    given = go.diff(model, model.clone(), inputs=[x]).numbers
    assert not given.seeded and given.outputs == (0.0,)
    with pytest.raises(InputError, match="do not take the same inputs") as raised:
        go.diff(model, captured("transformer"), run=True)
    assert "float32[batch, 6]" in str(raised.value) and "float32[batch, 5, 6]" in str(raised.value)
    with pytest.raises(InputError):
        go.diff(model, model, inputs=[torch.randn(7, 5)])


def test_a_run_leaves_a_training_model_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model = go.capture(net, (torch.randn(3, 4),))
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    go.diff(model, model, run=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.params.items())


def test_latency_of_both() -> None:
    model = captured("branches")
    latency = go.diff(model, model.clone(), latency="reference").latency
    assert latency.backend == "reference" and latency.a.median > 0 and latency.b.rounds == latency.a.rounds
    assert latency.ratio == pytest.approx(latency.b.median / latency.a.median)
    with pytest.raises(UsageError, match="no backend 'fast'"):
        go.diff(model, model, latency="fast")


def test_inputs_that_come_and_go() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.relu() + y

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + 1

    two = go.capture(Sum(), (torch.randn(2), torch.randn(2)))
    found = go.diff(two, go.capture(One(), (torch.randn(2),)))
    assert not found.same and found.matched() == 2


def test_weights_stay_on_disk(tmp_path: Path) -> None:
    model = captured("resnet")
    (tmp_path / "folder.gopt").mkdir()
    for name in ("folder.gopt", "zip.gopt"):
        model.save(tmp_path / name)
        mapped = go.load(tmp_path / name, mapped=True)
        assert go.diff(model, mapped, run=True).same
        with torch.no_grad():
            mapped.params["head.bias"].add_(1)
        assert go.diff(model, tmp_path / name).same, "writing to it does not write to the file"


def test_a_mapped_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    captured("branches").save(tmp_path / "net.gopt")
    with zipfile.ZipFile(tmp_path / "net.gopt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights = parts["weights.safetensors"]
    length = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")

    def refused(text: str, **changes: object) -> None:
        changed = json.dumps({**header, name: {**header[name], **changes}}).encode()
        folder = tmp_path / text.replace(" ", "_")
        folder.mkdir()
        data = len(changed).to_bytes(8, "little") + changed + weights[8 + length :]
        (folder / "weights.safetensors").write_bytes(data)
        with pytest.raises(LoadError, match=text):
            map_tensors(folder, "weights.safetensors")

    refused("dtype 'X9'", dtype="X9")
    refused("outside its file", data_offsets=[0, 10**9])
    refused("not as large as its shape says", shape=[1, 1])
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "weights.safetensors").write_bytes(weights[:20])
    with pytest.raises(LoadError, match="cut short"):
        map_tensors(cut, "weights.safetensors")
    with zipfile.ZipFile(tmp_path / "small.gopt", "w", zipfile.ZIP_DEFLATED) as archive:
        for part, data in parts.items():
            archive.writestr(part, data)
    assert map_tensors(tmp_path / "small.gopt", "weights.safetensors") is None
    assert go.diff(tmp_path / "net.gopt", tmp_path / "small.gopt").same, "a compressed file is read"


def test_json_is_plain_and_complete() -> None:
    model = captured("mobile")
    pruned, _ = go.run(model, "remove-channels{layer=blocks.1.expand.0,indices=4}")
    found = go.diff(model, pruned, run=True)
    data = json.loads(json.dumps(found.to_json(graph=True), allow_nan=False))
    assert (data["schema"], data["same"], data["counts"]) == (1, False, {"pruned": 1})
    assert len(data["a"]["nodes"]) == len(found.a.view.items)
    assert data["entries"][0]["channels"] == [4] and data["entries"][0]["passes"] == ["remove-channels"]
    assert {row["relation"] for row in data["weights"]["tensors"]} == {"sliced"}
    assert sum(data["weights"]["relations"].values()) == len(found.tensors)
    assert data["cost"]["totals"]["parameters"][0] > data["cost"]["totals"]["parameters"][1]
    pairs = {row["a"]: row["b"] for row in data["pairs"]}
    node = next(row for row in data["a"]["nodes"] if row["operator"] == "conv2d")
    assert node["attributes"]["groups"] == 1 and [slot for slot, _ in node["operands"]][:2] == ["input", "weight"]
    assert data["b"]["names"][str(pairs[data["a"]["nodes"].index(node)])] == node["name"]
    assert "nodes" not in found.to_json()["a"]


def test_the_package_is_called_as_the_function() -> None:
    import graphopt.diff

    assert go.diff is graphopt.diff and callable(go.diff)
    assert go.diff(captured("branches"), captured("branches")).summary() == (
        "no differences; 34 of 34 calls matched; 18 of 18 tensors equal"
    )


@pytest.mark.parametrize("place", ["tensor", "input", "argument"])
def test_names_that_would_run_as_code_are_refused(place: str, tmp_path: Path) -> None:
    """torch writes these names into the code of the model, so a file could run anything."""
    captured("branches").save(tmp_path / "net.gopt")
    with zipfile.ZipFile(tmp_path / "net.gopt") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    evil = 'x") or print("harm") or ("'
    model, graph = json.loads(parts["model.json"]), json.loads(parts["graph.json"])
    if place == "tensor":
        model["tensors"][evil] = model["tensors"].pop("head.bias")
        model["aliases"][evil] = "head.bias"
        model["kept"].append(evil)
    elif place == "input":
        next(row for row in graph["nodes"] if row["op"] == "placeholder")["name"] = evil
    else:
        model["arguments"] = [evil]
    with zipfile.ZipFile(tmp_path / "evil.gopt", "w") as archive:
        for name, data in parts.items():
            changed = {"model.json": model, "graph.json": graph}.get(name)
            archive.writestr(name, data if changed is None else json.dumps(changed))
    with pytest.raises(LoadError, match="cannot be the name of"):
        go.load(tmp_path / "evil.gopt")
