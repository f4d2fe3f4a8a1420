"""`graphopt diff`: what it shows, its exit codes, and models that mean harm."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphopt as go
from graphopt.tools._escape import markdown, printable
from tests.diff.nets import captured
from tests.tools.command import NETS, graphopt, refused


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same net as it is, in another format, folded, pruned, trained and nearly the same."""
    folder = tmp_path_factory.mktemp("diff")
    model = captured("resnet")
    trained, near = model.clone(), model.clone()
    with torch.no_grad():
        trained.params["blocks.2.conv1.weight"].mul_(-0.5).add_(1)
        near.params["head.weight"].mul_(1 + 1e-5)
    made = {
        "net.gopt": model,
        "same.pt2": model,
        "folded.gopt": go.run(model, "fold-batch-norm")[0],
        "pruned.gopt": go.run(model, "remove-channels{layer=blocks.1.conv1,indices=2;5}")[0],
        "trained.gopt": trained,
        "near.gopt": near,
        "other.gopt": captured("transformer"),
    }
    for name, one in made.items():
        one.save(folder / name)
    return {Path(name).stem: folder / name for name in made}


def compare(*arguments: object, code: int = 1) -> str:
    result = graphopt("diff", *arguments)
    assert result.exit_code == code, result.output
    return str(result.stdout)


def test_the_same_model(files: dict[str, Path]) -> None:
    text = compare(files["net"], files["same"], code=0)
    assert "no differences; 33 of 33 calls matched" in text, text
    assert compare(files["net"], files["net"], "--run", "--stat", code=0)
    assert json.loads(compare(files["net"], files["same"], "--json", code=0))["entries"] == []


def test_regions_are_folded_by_module(files: dict[str, Path]) -> None:
    text = compare(files["net"], files["folded"])
    assert "9 rewritten" in text and "batch_norm" in text
    assert "8 x rewritten conv2d + batch_norm -> conv2d  [fold-batch-norm]" in text
    assert "\nblocks  8 differences" in text and "\nstem  1 difference" in text
    assert text.count("- batch_norm") == 2, "one for each fold"
    assert "\x1b" not in text
    wide = compare(files["net"], files["folded"], "--context", "2", "--only", "ops")
    assert len(wide.splitlines()) > len(compare(files["net"], files["folded"], "--only", "ops").splitlines())
    assert "multiply-accumulates" not in wide


def test_parts(files: dict[str, Path]) -> None:
    weights = compare(files["net"], files["pruned"], "--only", "weights")
    assert "blocks.1.conv2.weight" in weights and "axis 1 8 -> 6, without 2, 5" in weights
    shapes = compare(files["net"], files["pruned"], "--only", "shapes")
    assert "float32[batch, 8, 8, 8]" in shapes and "float32[batch, 6, 8, 8]" in shapes and "follows" in shapes
    cost = compare(files["net"], files["pruned"], "--only", "cost")
    assert "blocks.1.conv1" in cost and "bytes of weights" in cost and "lose 2" not in cost
    stat = compare(files["net"], files["pruned"], "--stat")
    assert "pruned" in stat and "1 pruned; 33 of 33" in stat
    refused(graphopt("diff", files["net"], files["pruned"], "--stat", "--markdown"), 2, "choose one")


def test_numbers_and_latency(files: dict[str, Path], tmp_path: Path) -> None:
    seeded = compare(files["net"], files["trained"], "--run")
    assert "the numbers part at 'conv2d_5' (conv2d) blocks.2.conv1" in seeded and "along the graph" in seeded
    np.savez(tmp_path / "x.npz", x=np.ones((1, 3, 10, 10), np.float32))
    assert "run on given inputs" in compare(files["net"], files["trained"], "--run", tmp_path / "x.npz")
    assert "run on given inputs" in compare(files["net"], files["trained"], "--inputs", tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", y=np.ones(3))
    refused(graphopt("diff", files["net"], files["trained"], "--run", tmp_path / "y.npz"), 2, "no input 'y'")
    refused(graphopt("diff", files["net"], files["other"], "--run"), 2, "do not take the same inputs")
    small = hostile(tmp_path / "a.onnx", 1.0), hostile(tmp_path / "b.onnx", 2.0)
    assert "latency with reference" in compare(*small, "--latency", "--backend", "reference")
    refused(graphopt("diff", files["net"], files["net"], "--latency", "--backend", "fast"), 2, "no backend 'fast'")


def test_tolerance_and_ignore(files: dict[str, Path]) -> None:
    compare(files["net"], files["near"])
    compare(files["net"], files["near"], "--tolerance", "1e-4", code=0)
    compare(files["net"], files["near"], "--tolerance", "1e-6")
    compare(files["net"], files["trained"], "--ignore", "weights", code=0)
    compare(files["net"], files["trained"], "--ignore", "module=blocks.2", code=0)
    compare(files["net"], files["trained"], "--ignore", "module=blocks.1")
    assert "1 ignored" in compare(files["net"], files["trained"], "--ignore", "tensor=*.conv1.*", code=0)
    refused(graphopt("diff", files["net"], files["net"], "--ignore", "wieghts"), 2, "did you mean weights?")
    refused(graphopt("diff", files["net"], files["net"], "--tolerance", "-1"), 2, "tolerance is -1")


def test_markdown(files: dict[str, Path]) -> None:
    text = compare(files["net"], files["pruned"], "--markdown")
    assert text.startswith("### Models ") and "| times | kind | what | module | passes |" in text
    assert (
        "| 1 | pruned | conv2d + batch&#95;norm + conv2d: lose 2 of 8 channels | blocks.1 | remove-channels |" in text
    )
    assert text.count("<details>") == text.count("</details>") == 2 and text.count("```") == 2


# Names that mean harm

HOSTILE = "w\x1b[2J<script>alert(1)</script>|`*_[x](http://y)\u202e\x07\r\n\x9b31m"


def hostile(path: Path, scale: float) -> Path:
    """y = relu(x * w) with names that a terminal, a browser or Markdown would act on."""
    weight = helper.make_tensor(HOSTILE, TensorProto.FLOAT, [3], scale * np.arange(1, 4, dtype=np.float32))
    nodes = [
        helper.make_node("Mul", ["x", HOSTILE], [f"m{HOSTILE}"], HOSTILE),
        helper.make_node("Relu", [f"m{HOSTILE}"], ["y"]),
    ]
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])] for name in ("x", "y")]
    graph = helper.make_graph(nodes, "net", *ends, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_hostile_names_are_harmless_everywhere(tmp_path: Path) -> None:
    a, b = hostile(tmp_path / "a.onnx", 1.0), hostile(tmp_path / "b.onnx", 2.0)
    for options in (
        (),
        ("--only", "weights"),
        ("--only", "shapes"),
        ("--only", "cost"),
        ("--stat",),
        ("--context", "3"),
        ("--run",),
    ):
        text = compare(a, b, *options)
        assert all(character.isprintable() or character == "\n" for character in text), options
    review = compare(a, b, "--markdown")
    assert all(character.isprintable() or character == "\n" for character in review)
    table = review.partition("```")[0]
    assert "<script" not in table and "](http" not in table and "`*" not in table
    data = compare(a, b, "--json", "--graph")
    assert json.loads(data)["same"] is False and "\x1b" not in data


def test_escapes() -> None:
    assert printable("a\x1b[0m\u202e\x85\ud800b\u00e9\u4e2d") == "a\\x1b[0m\\u202e\\x85\\ud800b\u00e9\u4e2d"
    assert printable("plain (text) [1, 2]") == "plain (text) [1, 2]"
    assert markdown("a_b|<c>") == "a&#95;b&#124;&#60;c&#62;" and markdown("conv2d 1") == "conv2d 1"


# Files that are none


def damaged(files: dict[str, Path], folder: Path) -> dict[str, tuple[Path, str]]:
    whole = files["net"].read_bytes()
    made = {"cut.gopt": whole[: len(whole) // 2], "cut.pt2": files["same"].read_bytes()[:999], "empty.gopt": b""}
    made |= {"noise.onnx": bytes(range(256)) * 20, "noise.gopt": b"no zip at all", "noise.pt2": b"\x00" * 100}
    for name, data in made.items():
        (folder / name).write_bytes(data)
    rows = {name: (folder / name, name) for name in made}
    changes: dict[str, Callable[[dict[str, object]], object]] = {
        "cycle": lambda graph: graph["nodes"].sort(key=lambda row: row["name"] != "relu_1"),
        "twice": lambda graph: graph["nodes"].append(graph["nodes"][-2]),
    }
    for name, change in changes.items():
        with zipfile.ZipFile(files["net"]) as old, zipfile.ZipFile(folder / f"{name}.gopt", "w") as new:
            for part in old.namelist():
                data = old.read(part)
                if part == "graph.json":
                    graph = json.loads(data)
                    change(graph)
                    data = json.dumps(graph).encode()
                new.writestr(part, data)
        rows[name] = (folder / f"{name}.gopt", f"{name}.gopt")
    rows["missing"] = (folder / "missing.gopt", "there is no file")
    rows["suffix"] = (folder / "model.bin", "no model file")
    return rows


def test_trouble_is_2(files: dict[str, Path], tmp_path: Path) -> None:
    for name, (path, text) in damaged(files, tmp_path).items():
        refused(graphopt("diff", files["net"], path), 2, text)
        refused(graphopt("diff", path, files["net"]), 2, text)
        as_json = graphopt("diff", files["net"], path, "--json")
        assert (as_json.exit_code, json.loads(as_json.stderr)["exit_code"]) == (2, 2), name
    refused(graphopt("diff", files["net"], f"{NETS}:branch"), 2, "decides by the values")
    refused(graphopt("diff", files["net"]), 2, "Missing argument")


def test_an_onnx_file_with_a_cycle_or_a_name_given_twice(files: dict[str, Path], tmp_path: Path) -> None:
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])] for name in ("x", "y")]
    cases = {
        "cycle": [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("Neg", ["b"], ["y"]),
        ],
        "twice": [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])],
    }
    for name, nodes in cases.items():
        path = tmp_path / f"{name}.onnx"
        onnx.save(
            helper.make_model(helper.make_graph(nodes, "net", *ends), opset_imports=[helper.make_opsetid("", 20)]), path
        )
        result = graphopt("diff", files["net"], path)
        assert result.exit_code == 2 and "error: " in result.stderr and "Traceback" not in result.stderr, name


def test_colours_are_for_terminals(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[" in compare(files["net"], files["folded"])
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in compare(files["net"], files["folded"])
