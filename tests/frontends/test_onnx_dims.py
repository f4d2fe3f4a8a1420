"""Free sizes: what an ONNX file leaves open, and what a graph makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphopt as go
from graphopt.errors import UnsupportedError, UsageError
from graphopt.export import to_exported_program
from graphopt.frontends.onnx import load_onnx
from graphopt.signature import Range
from tests.compare import relative_error


def write(path: Path, nodes: list, inputs: dict, outputs: list[str], constants: dict) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def double_rows(path: Path, dims: list) -> Path:
    """y = x reshaped to [2 * rows, columns / 2], the sizes computed by ONNX operators, in floats on the way."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Gather", ["shape", "one"], ["columns"]),
        helper.make_node("Cast", ["rows"], ["rows_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows_float", "two"], ["doubled"]),
        helper.make_node("Floor", ["doubled"], ["whole"]),
        helper.make_node("Cast", ["whole"], ["rows_int"], to=TensorProto.INT64),
        helper.make_node("Div", ["columns", "two_int"], ["half"]),
        helper.make_node("Unsqueeze", ["rows_int", "axes"], ["rows_1d"]),
        helper.make_node("Unsqueeze", ["half", "axes"], ["half_1d"]),
        helper.make_node("Concat", ["rows_1d", "half_1d"], ["to"], axis=0),
        helper.make_node("Reshape", ["x", "to"], ["y"]),
    ]
    constants = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "two": np.float32(2),
        "two_int": np.int64(2),
        "axes": np.array([0]),
    }
    return write(path, nodes, {"x": dims}, ["y"], constants)


def test_shape_arithmetic_stays_symbolic(tmp_path: Path) -> None:
    model = load_onnx(double_rows(tmp_path / "m.onnx", ["rows", 6]))
    assert model.signature.inputs[0].dims == ("rows", 6)
    assert model.signature.outputs[0].dims == ("2*rows", 3)
    for rows in (1, 5):
        x = torch.randn(rows, 6)
        assert torch.equal(model(x), x.reshape(2 * rows, 3))
    assert [str(node.target) for node in model.graph.nodes if "reshape" in str(node.target)] == ["aten.reshape.default"]


def test_dims_without_a_name_are_named_after_their_input(tmp_path: Path) -> None:
    model = load_onnx(double_rows(tmp_path / "m.onnx", [None, 6]))
    assert model.signature.inputs[0].dims == ("x_0", 6)


def test_names_that_are_no_identifiers_are_made_into_some(tmp_path: Path) -> None:
    model = load_onnx(double_rows(tmp_path / "m.onnx", ["my.rows:0", 6]))
    assert model.signature.inputs[0].dims == ("my_rows_0", 6)


def test_sizes_fix_dims(tmp_path: Path) -> None:
    path = double_rows(tmp_path / "m.onnx", ["rows", 6])
    assert load_onnx(path, sizes={"rows": 4}).signature.inputs[0].dims == (4, 6)
    with pytest.raises(UsageError, match="no dynamic dim 'row'"):
        load_onnx(path, sizes={"row": 4})


def test_a_dim_that_the_graph_fixes_is_fixed_with_a_warning(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "bias"], ["y"])]
    bias = np.arange(10, dtype=np.float32)
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", "columns"]}, ["y"], {"bias": bias})
    with pytest.warns(UserWarning, match="fixes the dynamic dims columns"):
        model = load_onnx(path)
    assert model.signature.inputs[0].dims == ("n", 10)
    assert torch.equal(model(torch.zeros(3, 10)), torch.from_numpy(bias).expand(3, 10))


def pyramid(path: Path) -> Path:
    """Halve an image twice, double it again and add: its sizes must be multiples of two."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], mode="nearest"),
        helper.make_node("Add", ["x", "large"], ["y"]),
    ]
    scales = np.array([1, 1, 2, 2], dtype=np.float32)
    return write(path, nodes, {"x": ["n", 3, "h", "w"]}, ["y"], {"scales": scales})


def test_dims_that_must_be_multiples_become_multiples(tmp_path: Path) -> None:
    path = pyramid(tmp_path / "m.onnx")
    model = load_onnx(path)
    assert model.signature.inputs[0].dims == ("n", 3, "2*h_by_2", "2*w_by_2")
    assert model.signature.outputs[0].dims == model.signature.inputs[0].dims
    x = torch.randn(1, 3, 20, 34)
    pooled = nn.functional.max_pool2d(x, 3, 2, 1)
    assert relative_error(model(x), x + nn.functional.interpolate(pooled, scale_factor=2)) == 0


class Recogniser(nn.Module):
    """An image as a sequence of columns; torch cannot prove what the strides on the way ask of its width."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.avg_pool2d(x, (1, 2)).reshape(x.shape[0], 8, -1).transpose(1, 2)
        return self.head(y - y.mean(2, keepdim=True))


def test_conditions_that_torch_cannot_prove_do_not_fix_a_size() -> None:
    net = Recogniser().eval()
    x = torch.randn(2, 8, 1, 40)
    model = go.capture(net, (x,), dynamic={"x": {0: "n", 3: torch.export.Dim("w", min=4)}})
    assert model.signature.ranges == {"n": Range(0, None), "w": Range(4, None)}
    assert model.signature.outputs[0].dims[0] == "n"
    other = torch.randn(1, 8, 1, 10)
    assert relative_error(model(other), net(other)) < 1e-6
    assert to_exported_program(model).module()(x).shape == (2, 20, 4)


def test_attention_over_free_batch_and_sequence_is_one_operator(tmp_path: Path) -> None:
    """The number of heads is computed by a Reshape to -1, as exporters write it."""
    nodes = [
        helper.make_node("Reshape", ["x", "to"], ["split"]),
        helper.make_node("Transpose", ["split"], ["heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["heads", "heads", "heads"], ["y"], is_causal=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", 32])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.array([0, 0, -1, 8]), "to")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    assert model.signature.outputs[0].dims == ("batch", 4, "seq", 8)
    assert sum("scaled_dot_product_attention" in str(node.target) for node in model.graph.nodes) == 1
    x = torch.randn(3, 5, 32)
    heads = x.reshape(3, 5, 4, 8).transpose(1, 2)
    reference = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    assert relative_error(model(x), reference) < 1e-6


def squeeze(path: Path, axes: list[int] | None, dims: list) -> Path:
    inputs = ["x"] if axes is None else ["x", "axes"]
    constants = {} if axes is None else {"axes": np.array(axes)}
    return write(path, [helper.make_node("Squeeze", inputs, ["y"])], {"x": dims}, ["y"], constants)


def test_a_dim_that_is_squeezed_by_name_is_one(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the graph fixes the dynamic dims n"):
        model = load_onnx(squeeze(tmp_path / "m.onnx", [0], ["n", 3]))
    assert model.signature.inputs[0].dims == (1, 3) and model.signature.outputs[0].dims == (3,)
    path = squeeze(tmp_path / "m.onnx", [-2], ["n", "m", 3])
    with pytest.raises(UnsupportedError, match="axis -2 has size 10, only one of size one can go") as caught:
        load_onnx(path)
    assert "node that computes 'y'" in str(caught.value.where)
    assert load_onnx(path, sizes={"m": 1}).signature.outputs[0].dims == ("n", 3)


def test_a_free_dim_stays_where_the_axes_to_squeeze_are_not_named(tmp_path: Path) -> None:
    model = load_onnx(squeeze(tmp_path / "m.onnx", None, ["n", 1, 3]))
    assert model.signature.outputs[0].dims == ("n", 3) and not model.signature.conditions
