"""What a file may be, and what is taken from it: weights and their names, external data, functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt as go
from graphopt.errors import LoadError, UnsupportedError, UsageError
from graphopt.frontends.onnx import load_onnx
from tests.compare import relative_error

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4) / 7
BIAS = np.array([1.0, -2.0, 0.5, 3.0], dtype=np.float32)


def linear(weight: str = "fc.weight", bias: str = "fc.bias", **changes: object) -> onnx.ModelProto:
    """y = x @ weight + bias; `changes` are arguments of make_model."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", weight, bias], ["y"], name="gemm")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(WEIGHT, weight), numpy_helper.from_array(BIAS, bias)],
    )
    arguments = {"opset_imports": [helper.make_opsetid("", 17)], "ir_version": 8} | changes
    return helper.make_model(graph, **arguments)


def expected(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.from_numpy(WEIGHT) + torch.from_numpy(BIAS)


def test_a_model_is_loaded_by_its_suffix_and_trains(tmp_path: Path) -> None:
    onnx.save(linear(), tmp_path / "m.onnx")
    model = go.load(tmp_path / "m.onnx")
    assert str(model.signature) == "(x: float32[batch, 3]) -> (y: float32[batch, 4]) where batch in 0.."
    assert {name for name, _ in model.named_parameters()} == {"fc.weight", "fc.bias"}
    x = torch.randn(5, 3)
    assert relative_error(model(x), expected(x)) < 1e-6
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("weight", "bias", "names"),
    [
        ("a", "b", ["a", "b"]),
        ("/fc/MatMul:0", "onnx::Add_3", ["/fc/MatMul:0", "onnx::Add_3"]),
        ("0.weight", "0.bias", ["0.weight", "0.bias"]),
        ("fc", "fc.bias", ["fc_bias", "fc_"]),
        (".a", "b..c", ["_a", "b__c"]),
        ("forward", "training", ["forward_", "training_"]),
    ],
)
def test_names_of_weights(tmp_path: Path, weight: str, bias: str, names: list[str]) -> None:
    onnx.save(linear(weight, bias), tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    x = torch.randn(2, 3)
    assert relative_error(model(x), expected(x)) < 1e-6
    assert set(model.state_dict()) == set(names)


def test_initialisers_that_are_inputs_are_weights(tmp_path: Path) -> None:
    proto = linear(ir_version=3, opset_imports=[helper.make_opsetid("", 9)])
    proto.graph.input.append(helper.make_tensor_value_info("fc.weight", TensorProto.FLOAT, [3, 4]))
    onnx.save(proto, tmp_path / "m.onnx")
    assert [spec.name for spec in load_onnx(tmp_path / "m.onnx").signature.inputs] == ["x"]


def test_constants_are_weights_factors_or_shapes_by_their_use(tmp_path: Path) -> None:
    """A Constant's tensor is a parameter where weights are used; a lone number is not, and shapes vanish."""

    def stored(name: str, value: np.ndarray) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))

    graph = helper.make_graph(
        [
            stored("kernel", WEIGHT),
            stored("factor", np.array([0.5], dtype=np.float32)),
            stored("scalar", np.float32(2)),
            stored("shape", np.array([0, 2, 2])),
            helper.make_node("MatMul", ["x", "kernel"], ["product"]),
            helper.make_node("Mul", ["product", "factor"], ["halved"]),
            helper.make_node("Mul", ["halved", "scalar"], ["whole"]),
            helper.make_node("Reshape", ["whole", "shape"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [onnx.ValueInfoProto(name="y")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    assert [name for name, _ in model.named_parameters()] == ["kernel"]
    assert set(model.state_dict()) == {"kernel", "factor"}
    x = torch.randn(2, 3)
    assert relative_error(model(x), (x @ torch.from_numpy(WEIGHT)).reshape(2, 2, 2)) < 1e-6


def test_statistics_are_buffers(tmp_path: Path) -> None:
    names = ["scale", "bias", "mean", "var"]
    graph = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *names], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 5])],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(abs(BIAS), name) for name in names],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    model = load_onnx(tmp_path / "m.onnx")
    assert {name for name, _ in model.named_parameters()} == {"scale", "bias"}
    assert set(model.state_dict()) == set(names)


def test_functions_of_the_model_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["square"]), helper.make_node("Add", ["square", "a"], ["out"])]
    function = helper.make_function("mine", "Poly", ["a"], ["out"], body, [helper.make_opsetid("", 17)])
    graph = helper.make_graph(
        [helper.make_node("Poly", ["x"], ["y"], domain="mine")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    x = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(load_onnx(tmp_path / "m.onnx")(x), x * x + x)


def test_an_operand_that_must_be_known_can_be_fixed(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["to", "to"], ["doubled"]), helper.make_node("Reshape", ["x", "doubled"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
            helper.make_tensor_value_info("to", TensorProto.INT64, [2]),
        ],
        [onnx.ValueInfoProto(name="y")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(UnsupportedError, match=r"constants=\{'to'"):
        load_onnx(path)
    assert load_onnx(path, constants={"to": np.array([2, 1])})(torch.ones(2, 4)).shape == (4, 2)
    with pytest.raises(UsageError, match="no input 'shape' to fix"):
        load_onnx(path, constants={"shape": np.array([2, 1])})


def external(path: Path, location: str) -> Path:
    """A model whose weight lies in the file `location`."""
    proto = linear()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(WEIGHT.nbytes)}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_read_from_the_folder_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    x = torch.randn(2, 3)
    assert relative_error(load_onnx(external(tmp_path / "m.onnx", "w.bin"))(x), expected(x)) < 1e-6


@pytest.mark.parametrize("kind", ["absolute", "parent", "link", "linked folder", "missing", "short"])
def test_other_external_data_is_refused(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "model"
    home.mkdir()
    outside = tmp_path / "w.bin"
    outside.write_bytes(WEIGHT.tobytes())
    (home / "link.bin").symlink_to(outside)
    (home / "folder").symlink_to(tmp_path)
    (home / "short.bin").write_bytes(WEIGHT.tobytes()[:7])
    location = {
        "absolute": str(outside),
        "parent": "../w.bin",
        "link": "link.bin",
        "linked folder": "folder/w.bin",
        "missing": "none.bin",
        "short": "short.bin",
    }[kind]
    with pytest.raises(LoadError):
        load_onnx(external(home / "m.onnx", location))


@pytest.mark.parametrize("text", [b"", b"this is no model\n", b"\x08\x08"])
def test_a_file_that_is_no_model(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(text)
    with pytest.raises(LoadError, match="is not an ONNX model, or it is truncated"):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file(tmp_path: Path, part: float) -> None:
    data = linear().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(data[: int(len(data) * part)])
    with pytest.raises((LoadError, UnsupportedError)):
        load_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [6, 29])
def test_opsets_out_of_range(tmp_path: Path, opset: int) -> None:
    (tmp_path / "m.onnx").write_bytes(linear(opset_imports=[helper.make_opsetid("", opset)]).SerializeToString())
    with pytest.raises(UnsupportedError, match=f"uses ONNX opset {opset}; graphopt reads opsets 7 to 28"):
        load_onnx(tmp_path / "m.onnx")


def test_all_unknown_operators_are_named_at_once(tmp_path: Path) -> None:
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])])
    graph = helper.make_graph(
        [
            helper.make_node("Fused", ["x"], ["a"], domain="com.example", name="first"),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="second"),
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError) as caught:
        load_onnx(tmp_path / "m.onnx")
    text = str(caught.value)
    assert "Fused (domain 'com.example', opset 17)" in text and "node 'first'" in text
    assert "If (domain 'ai.onnx', opset 17): control flow" in text and "node 'second'" in text


def test_sequence_inputs_are_refused(tmp_path: Path) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [3]))
    proto = linear()
    proto.graph.input.append(helper.make_value_info("many", kind))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="sequence type"):
        load_onnx(tmp_path / "m.onnx")
