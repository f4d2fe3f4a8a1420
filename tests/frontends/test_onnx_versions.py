"""Operators in the opsets that the node cases of onnx, all recent, do not reach; onnxruntime is the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from graphopt.errors import UnsupportedError
from graphopt.frontends.onnx.module import OnnxModule
from graphopt.frontends.onnx.reader import read_model
from graphopt.frontends.onnx.registry import NEWEST_OPSET, OLDEST_OPSET, registered
from tests.compare import relative_error

IMAGE = (2, 4, 9, 7)
EMPTY = np.array([], dtype=np.float32)
VECTOR = np.array([0.5, 2.0, 1.5, 1.0], dtype=np.float32)

CASES: dict[str, tuple[int, str, tuple[int, ...], list[Any], dict[str, Any]]] = {
    "argmax-11": (11, "ArgMax", IMAGE, [], {"axis": 1, "keepdims": 0}),
    "average-pool-7": (7, "AveragePool", IMAGE, [],
                        {"kernel_shape": [3, 3], "pads": [1, 0, 1, 0], "count_include_pad": 1}),
    "average-pool-asymmetric": (10, "AveragePool", IMAGE, [],
                        {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "strides": [2, 2]}),
    "average-pool-ceil": (11, "AveragePool", IMAGE, [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "average-pool-dilated": (19, "AveragePool", IMAGE, [],
                        {"kernel_shape": [2, 2], "dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    "batch-norm-7": (7, "BatchNormalization", IMAGE, [VECTOR, VECTOR, -VECTOR, VECTOR], {"epsilon": 1e-3}),
    "batch-norm-9": (9, "BatchNormalization", IMAGE, [VECTOR, VECTOR, -VECTOR, VECTOR], {"momentum": 0.5}),
    "clip-6": (8, "Clip", IMAGE, [], {"min": -0.5, "max": 0.25}),
    "clip-6-open": (8, "Clip", IMAGE, [], {"min": -0.5}),
    "clip-11": (11, "Clip", IMAGE, [None, np.float32(0.25)], {}),
    "conv-same-upper": (11, "Conv", IMAGE, [np.ones((2, 4, 2, 4), np.float32)],
                        {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv-same-lower": (11, "Conv", IMAGE, [np.ones((2, 4, 2, 4), np.float32)],
                        {"auto_pad": "SAME_LOWER", "strides": [2, 1]}),
    "conv-asymmetric": (11, "Conv", IMAGE, [np.ones((4, 2, 3, 3), np.float32), VECTOR],
                        {"pads": [0, 1, 2, 0], "group": 2}),
    "conv-transpose": (11, "ConvTranspose", IMAGE, [np.ones((4, 1, 3, 3), np.float32)],
                       {"group": 4, "strides": [2, 2], "pads": [1, 0, 0, 2], "output_padding": [1, 1]}),
    "cumsum": (11, "CumSum", IMAGE, [np.int64(2)], {"exclusive": 1, "reverse": 1}),
    "depth-to-space-1": (9, "DepthToSpace", IMAGE, [], {"blocksize": 2}),
    "dropout-7": (7, "Dropout", IMAGE, [], {"ratio": 0.3}),
    "dropout-10": (10, "Dropout", IMAGE, [], {"ratio": 0.3}),
    "dropout-12": (12, "Dropout", IMAGE, [np.float32(0.3)], {}),
    "flatten": (9, "Flatten", IMAGE, [], {"axis": 2}),
    "gather": (11, "Gather", IMAGE, [np.array([[0, -1], [2, 1]])], {"axis": 1}),
    "gather-scalar": (11, "Gather", IMAGE, [np.int64(-2)], {"axis": 2}),
    "gemm-7": (7, "Gemm", (3, 4), [np.ones((4, 5), np.float32), np.ones((3, 1), np.float32)],
                        {"alpha": 0.5, "beta": 2.0}),
    "gemm-transposed": (11, "Gemm", (3, 4), [np.ones((5, 3), np.float32)], {"transA": 1, "transB": 1}),
    "global-lp-pool": (7, "GlobalLpPool", IMAGE, [], {"p": 1}),
    "group-norm-18": (18, "GroupNormalization", IMAGE, [VECTOR[:2], VECTOR[2:]], {"num_groups": 2}),
    "hardmax-11": (11, "Hardmax", (2, 3, 4), [], {}),
    "instance-norm": (7, "InstanceNormalization", IMAGE, [VECTOR, VECTOR], {}),
    "leaky-relu": (7, "LeakyRelu", IMAGE, [], {}),
    "log-softmax-11": (11, "LogSoftmax", (2, 3, 4), [], {}),
    "lp-pool-11": (11, "LpPool", IMAGE, [], {"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 0, 0, 1]}),
    "max-pool-8": (8, "MaxPool", IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "max-pool-asymmetric": (10, "MaxPool", IMAGE, [],
                        {"kernel_shape": [2, 2], "pads": [0, 1, 1, 0], "ceil_mode": 1, "strides": [2, 2]}),
    "max-pool-same": (11, "MaxPool", IMAGE, [], {"kernel_shape": [3, 2], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "mean-variance": (9, "MeanVarianceNormalization", IMAGE, [], {}),
    "pad-2": (10, "Pad", IMAGE, [], {"pads": [0, 0, 1, 2, 0, 0, -1, 3], "value": 0.5}),
    "pad-2-reflect": (10, "Pad", IMAGE, [], {"pads": [0, 1, 1, 2, 0, 1, 3, 0], "mode": "reflect"}),
    "pad-2-edge": (10, "Pad", IMAGE, [], {"pads": [1, 0, 1, 2, 0, 0, 3, 0], "mode": "edge"}),
    "pow-7": (7, "Pow", IMAGE, [np.float32(2.0)], {}),
    "prelu-channels": (9, "PRelu", IMAGE, [VECTOR.reshape(4, 1, 1)], {}),
    "prelu-everywhere": (9, "PRelu", IMAGE, [np.linspace(0, 1, 63, dtype=np.float32).reshape(9, 7)], {}),
    "reduce-mean-11": (11, "ReduceMean", IMAGE, [], {"axes": [1, -1]}),
    "reduce-sum-11": (11, "ReduceSum", IMAGE, [], {"axes": [2], "keepdims": 0}),
    "reduce-max-all": (8, "ReduceMax", IMAGE, [], {"keepdims": 0}),
    "reduce-l2-13": (13, "ReduceL2", IMAGE, [], {"axes": [3]}),
    "resize-10-nearest": (10, "Resize", IMAGE, [np.array([1, 1, 1.5, 2], np.float32)], {}),
    "resize-10-linear": (10, "Resize", IMAGE, [np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
    "resize-11-half-pixel": (11, "Resize", IMAGE, [EMPTY, np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}),
    "resize-11-cubic": (11, "Resize", IMAGE, [EMPTY, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic"}),
    "resize-13-sizes": (13, "Resize", IMAGE, [None, None, np.array([2, 4, 18, 21])], {"mode": "nearest"}),
    "resize-13-align": (13, "Resize", IMAGE, [None, None, np.array([2, 4, 5, 13])],
                        {"mode": "linear", "coordinate_transformation_mode": "align_corners"}),
    "resize-13-floor": (13, "Resize", IMAGE, [None, np.array([1, 1, 2, 3], np.float32)],
                        {"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}),
    "slice-1": (9, "Slice", IMAGE, [], {"starts": [1, -3], "ends": [3, 100], "axes": [1, 2]}),
    "slice-10-back": (10, "Slice", IMAGE, [np.array([-1]), np.array([-100]), np.array([2]), np.array([-2])], {}),
    "softmax-7": (7, "Softmax", (2, 3, 4), [], {}),
    "softmax-11-middle": (11, "Softmax", (2, 3, 4), [], {"axis": 2}),
    "split-2": (9, "Split", IMAGE, [], {"axis": 1, "split": [1, 3]}),
    "split-2-equal": (9, "Split", IMAGE, [], {"axis": 1}),
    "squeeze-1": (9, "Squeeze", (2, 1, 3, 1), [], {"axes": [1]}),
    "squeeze-11-all": (11, "Squeeze", (2, 1, 3, 1), [], {}),
    "tile": (9, "Tile", (2, 3), [np.array([2, 3])], {}),
    "topk-1": (9, "TopK", IMAGE, [], {"k": 3, "axis": 2}),
    "topk-10": (10, "TopK", IMAGE, [np.array([3])], {"axis": 2}),
    "topk-11-smallest": (11, "TopK", IMAGE, [np.array([3])], {"axis": 2, "largest": 0}),
    "unsqueeze-1": (9, "Unsqueeze", (2, 3), [], {"axes": [0, 2]}),
    "upsample-7": (8, "Upsample", IMAGE, [], {"scales": [1.0, 1.0, 2.0, 3.0]}),
    "upsample-9": (9, "Upsample", IMAGE, [np.array([1, 1, 2, 3], np.float32)], {}),
    "upsample-9-linear": (9, "Upsample", IMAGE, [np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}),
    "lrn": (7, "LRN", IMAGE, [], {"size": 3, "alpha": 0.1}),
}  # fmt: skip

TWO_OUTPUTS = {"Split", "TopK"}


def one_node(opset: int, operator: str, shape: tuple[int, ...], operands: list[Any], attributes: dict[str, Any]) -> Any:
    """A model of one node: the data as its input, everything else stored."""
    names = ["x"] + ["" if operand is None else f"c{i}" for i, operand in enumerate(operands)]
    outputs = ["y", "z"] if operator in TWO_OUTPUTS else ["y"]
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, names, outputs, name="node", **attributes)],
            "g",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(np.asarray(o), f"c{i}") for i, o in enumerate(operands) if o is not None],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=7,
    )


@pytest.mark.parametrize("name", CASES)
def test_same_as_onnxruntime(name: str) -> None:
    opset, operator, shape, operands, attributes = CASES[name]
    model = one_node(opset, operator, shape, operands, attributes)
    data = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    expected = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": data})
    with torch.no_grad():
        actual = OnnxModule(read_model(model)).eval()(torch.from_numpy(data))
    actual = actual if isinstance(actual, tuple) else (actual,)
    assert relative_error(list(actual), [torch.from_numpy(np.asarray(e)) for e in expected]) < 1e-5


@pytest.mark.parametrize(
    ("opset", "operator", "operands", "attributes", "says"),
    [
        (12, "Dropout", [np.float32(0.5), np.bool_(True)], {}, "dropout in training mode is random"),
        (7, "BatchNormalization", [VECTOR] * 4, {"spatial": 0}, "'spatial'=0"),
        (13, "LRN", [], {"size": 4}, "an even window"),
        (11, "Conv", [np.ones((2, 4, 3, 3), np.float32)], {"kernel_shape": [2, 2]}, "'kernel_shape'=.2, 2. is not"),
        (11, "Conv", [np.ones((2, 4, 3, 3), np.float32)], {"surprise": 1}, "attribute 'surprise'=1 is not handled"),
        (11, "Conv", [], {}, "it has 1 inputs, 2 to 3 are expected"),
        (13, "Clip", [np.float32(0)] * 3, {}, "it has 4 inputs, 1 to 3 are expected"),
        (17, "LayerNormalization", [np.ones(7, np.float32)], {"stash_type": 11}, "stash_type"),
        (13, "Flatter", [], {}, "the operator is not handled"),
        (13, "Swish", [], {}, "this version of the operator is not handled"),
        (13, "NonZero", [], {}, "depends on data"),
        (13, "RandomNormalLike", [], {}, "random"),
        (17, "SequenceConstruct", [], {}, "sequence and optional values"),
        (13, "Cast", [], {"to": onnx.TensorProto.STRING}, "element type string"),
        (10, "Resize", [np.array([1, 1, 1.5, 0.6], np.float32)], {}, "not defined before opset 11"),
        (13, "LSTM", [np.ones((1, 8, 7), np.float32), np.ones((1, 8, 2), np.float32)], {"clip": 1.0}, "'clip'"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    opset: int, operator: str, operands: list[Any], attributes: dict[str, Any], says: str
) -> None:
    model = one_node(opset, operator, IMAGE, operands, attributes)
    with pytest.raises(UnsupportedError, match=says) as caught:
        OnnxModule(read_model(model))(torch.ones(IMAGE))
    assert f"ONNX operator {operator} (domain 'ai.onnx', opset {opset})" in caught.value.what
    assert caught.value.where is not None and "node 'node'" in caught.value.where
    assert caught.value.todo


def test_every_implementation_takes_what_its_schemas_declare() -> None:
    """Attributes and inputs of every opset an implementation is registered for, against onnx's own tables."""
    strings = {"value_string", "value_strings", "sparse_value", "consumed_inputs"}
    for entry in registered():
        for opset in range(max(entry.since, OLDEST_OPSET), min(entry.until, NEWEST_OPSET) + 1):
            try:
                schema = onnx.defs.get_schema(entry.name, opset)
            except onnx.defs.SchemaError:
                assert entry.since == OLDEST_OPSET, f"{entry.name} does not exist in opset {opset}"
                continue
            if schema.deprecated:
                continue
            missing = set(schema.attributes) - set(entry.attributes) - strings
            assert not missing, f"{entry.name}, opset {opset}: attributes {missing}"
            for name, attribute in schema.attributes.items():
                assert attribute.required or not entry.attributes.get(name), f"{entry.name}.{name} is not required"
            if entry.variadic is None:
                assert len(entry.inputs) >= len(schema.inputs), f"{entry.name}, opset {opset}: inputs"
