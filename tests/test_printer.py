"""What is printed of a graph names the user's own lines, wherever the user's project lies."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import graphopt as go
from graphopt.errors import UnsupportedError
from graphopt.printer import is_users, source_line

aten = torch.ops.aten

NET = """\
import torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        y = torch.relu(x)  # the user's line
        return nn.functional.gelu(y)

class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x  # a decision
"""


def written(folder: Path) -> tuple[Path, dict[str, type[nn.Module]]]:
    """The file and the classes of a module that a user keeps in `folder`."""
    folder.mkdir(parents=True)
    file = folder / "net.py"
    file.write_text(NET)
    spec = importlib.util.spec_from_file_location("net_in_a_folder", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return file, vars(module)


@pytest.mark.parametrize("place", ["torch", "torch/graphopt", "graphopt/importlib", "mine"])
def test_lines_of_a_project_in_any_folder(place: str, tmp_path: Path) -> None:
    file, classes = written(tmp_path / place)
    model = go.capture(classes["Net"](), (torch.randn(2, 3),))
    lines = {node.target: source_line(node) for node in model.graph.nodes if node.op == "call_function"}
    assert lines[aten.relu.default] == f"{file}:6: y = torch.relu(x)  # the user's line"
    assert lines[aten.gelu.default] == f"{file}:7: return nn.functional.gelu(y)"
    with pytest.raises(UnsupportedError) as caught:
        go.capture(classes["Branch"](), (torch.randn(2, 3),))
    assert caught.value.where == f"{file}:11: return x if x.sum() > 0 else -x  # a decision"


def test_files_of_torch_and_graphopt_are_not_the_users() -> None:
    assert not is_users(nn.functional.__file__) and not is_users(str(go.__file__)) and not is_users("<eval_with_key>.1")
    assert is_users(__file__)


def test_an_onnx_file_has_no_lines_of_the_importer(tmp_path: Path) -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "net", ports[:1], ports[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "net.onnx"
    )
    model = go.load(tmp_path / "net.onnx")
    (relu,) = [node for node in model.graph.nodes if node.op == "call_function"]
    assert source_line(relu) == ""
