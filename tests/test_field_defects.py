"""Cases in which other software folds wrongly, crashes, or unties: here each is right, or refused by name.

Each test is called after the software and the input it is about.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from tests import tiny, zoo
from tests.compare import relative_error
from tests.passes.apply import apply, errors_at, operators, reasons

BATCH = {0: {0: "batch"}}


def images(channels: int = 4, size: int = 2) -> tuple[Tensor]:
    return (torch.randn(size, channels, 9, 9, generator=torch.Generator().manual_seed(size)),)


def lively(net: nn.Module, make: Callable[..., tuple[Tensor]] = images) -> nn.Module:
    with torch.no_grad():
        zoo.enliven(net)
        zoo.calibrate(net, [make(size=16)])
    return net


def exact(net: nn.Module, make: Callable[..., tuple[Tensor]] = images, limit: float = 5e-6) -> go.Model:
    """The model after every exact pass: equal at two batch sizes, and still a model of the same inputs."""
    _, after, _ = apply(net, make(size=2), "exact", dynamic=BATCH)
    assert errors_at(net, after, make(size=2), make(size=3)) <= limit
    return after


class Net(nn.Module):
    """A net whose forward is the given function of itself and x."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# torch.fx `fuse`


def test_fx_fuse_conv_used_on_two_paths_with_a_norm_on_one() -> None:
    def paths(net: nn.Module, x: Tensor) -> Tensor:
        y = net.conv(x)
        return net.bn(y).relu() + y

    after = exact(lively(Net(paths, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4))))
    assert operators(after).count("batch_norm") == 1


def test_fx_fuse_conv_called_twice_with_a_norm_on_one_path() -> None:
    net = tiny.build("shared_conv")
    _, after, report = apply(net.module, net.args(2), "fold-batch-norm", dynamic=net.dynamic)
    assert "'conv.weight' is also used by" in reasons(report)[0]
    assert errors_at(net.module, after, net.args(2), net.args(3)) == 0


def test_fx_fuse_transposed_convolution_with_norm() -> None:
    after = exact(lively(nn.Sequential(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6))))
    assert operators(after) == ["conv_transpose2d.input"]


def test_fx_fuse_norm_before_a_convolution() -> None:
    after = exact(lively(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))))
    assert operators(after) == ["conv2d"]


# LayerMerge family


@pytest.mark.parametrize("eps", [1e-3, 1e-1, 1e-8])
def test_layer_merge_eps_is_that_of_the_norm(eps: float) -> None:
    after = exact(lively(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=eps))))
    assert operators(after) == ["conv2d"]


# ONNX tools: their table of batch norms, in ONNX itself

Rng = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return Rng.normal(size=shape).astype(np.float32)


def norm_initializers(channels: int) -> dict[str, np.ndarray]:
    return {
        "gamma": np.abs(values(channels)) + 0.5,
        "beta": values(channels),
        "mean": values(channels),
        "var": np.abs(values(channels)) + 0.5,
    }


def norm(source: str, target: str) -> tuple[str, list[str], list[str], dict]:
    return "BatchNormalization", [source, "gamma", "beta", "mean", "var"], [target], {"epsilon": 1e-3}


CONV = ("Conv", ["x", "w"], ["y"], {"pads": [1, 1, 1, 1]})
FLAT = (2, 4)
ONNX_CASES: dict[str, tuple[tuple[int, ...], dict[str, np.ndarray], list[tuple], list[str], bool]] = {
    # name: input shape, weights, nodes, outputs, whether the norm has to be gone
    "Conv-BN": (
        (2, 4, 7, 7), {"w": values(6, 4, 3, 3), **norm_initializers(6)}, [CONV, norm("y", "z")], ["z"], True,
    ),
    "ConvT-BN": (
        (2, 4, 7, 7), {"w": values(4, 6, 3, 3), **norm_initializers(6)},
        [("ConvTranspose", ["x", "w"], ["y"], {"strides": [2, 2]}), norm("y", "z")], ["z"], True,
    ),
    "ConvT groups=2": (
        (2, 4, 7, 7), {"w": values(4, 3, 3, 3), **norm_initializers(6)},
        [("ConvTranspose", ["x", "w"], ["y"], {"group": 2}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN": (
        FLAT, {"w": values(4, 6), "c": values(6), **norm_initializers(6)},
        [("Gemm", ["x", "w", "c"], ["y"], {}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN transB": (
        FLAT, {"w": values(6, 4), "c": values(6), **norm_initializers(6)},
        [("Gemm", ["x", "w", "c"], ["y"], {"transB": 1}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN beta=2": (
        FLAT, {"w": values(4, 6), "c": values(6), **norm_initializers(6)},
        [("Gemm", ["x", "w", "c"], ["y"], {"alpha": 0.5, "beta": 2.0}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN no C": (
        FLAT, {"w": values(4, 6), **norm_initializers(6)},
        [("Gemm", ["x", "w"], ["y"], {}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN 2-D C of one row": (
        FLAT, {"w": values(4, 6), "c": values(1, 6), **norm_initializers(6)},
        [("Gemm", ["x", "w", "c"], ["y"], {}), norm("y", "z")], ["z"], True,
    ),
    "Gemm-BN 2-D C of all rows": (
        FLAT, {"w": values(4, 6), "c": values(2, 6), **norm_initializers(6)},
        [("Gemm", ["x", "w", "c"], ["y"], {}), norm("y", "z")], ["z"], False,
    ),
    "BN-Conv unpadded": (
        (2, 4, 7, 7), {"w": values(6, 4, 3, 3), **norm_initializers(4)},
        [norm("x", "y"), ("Conv", ["y", "w"], ["z"], {})], ["z"], True,
    ),
    "BN-Conv padded": (
        (2, 4, 7, 7), {"w": values(6, 4, 3, 3), **norm_initializers(4)},
        [norm("x", "y"), ("Conv", ["y", "w"], ["z"], {"pads": [1, 1, 1, 1]})], ["z"], False,
    ),
    "conv output has a second user": (
        (2, 4, 7, 7), {"w": values(6, 4, 3, 3), **norm_initializers(6)}, [CONV, norm("y", "z")], ["z", "y"], False,
    ),
    "conv weight shared with another conv": (
        (2, 4, 7, 7), {"w": values(6, 4, 3, 3), **norm_initializers(6)},
        [CONV, norm("y", "z"), ("Conv", ["x", "w"], ["v"], {})], ["z", "v"], False,
    ),
    "deduplicated zero biases": (
        (2, 4, 7, 7),
        {"w": values(4, 4, 3, 3), "v": values(4, 4, 1, 1), "zero": np.zeros(4, np.float32), **norm_initializers(4)},
        [("Conv", ["x", "w", "zero"], ["y"], {}), ("Relu", ["y"], ["r"], {}), ("Conv", ["r", "v", "zero"], ["q"], {}),
         norm("q", "z")], ["z"], False,
    ),
}  # fmt: skip


def write_onnx(case: str, path: Path) -> tuple[Path, np.ndarray]:
    """The model of a case, whose outputs have a type and no shape, and an input for it."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape, weights, nodes, outputs, _ = ONNX_CASES[case]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, made, **attributes) for kind, inputs, made, attributes in nodes],
        "case",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path / "case.onnx")
    return path / "case.onnx", values(*shape)


def unoptimised(path: Path, x: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": x}))


@pytest.mark.parametrize("case", ONNX_CASES)
def test_onnx_tools(case: str, tmp_path: Path) -> None:
    path, x = write_onnx(case, tmp_path)
    after, reports = go.run(go.load(path), "exact")
    expected = [torch.from_numpy(array) for array in unoptimised(path, x)]
    with torch.no_grad():
        found = after.call_flat([torch.from_numpy(x)])
    assert relative_error(found, expected) <= 5e-6
    folds = ONNX_CASES[case][-1]
    assert ("batch_norm" not in operators(after)) is folds
    last = [report for report in reports if report.name == "fold-batch-norm"][-1]
    assert folds or last.misses, "what is left alone has a reason"


def test_onnxsim_two_convolutions_with_one_zero_bias() -> None:
    first, second = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
    net = lively(nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4), nn.ReLU()))
    second.bias = first.bias = nn.Parameter(torch.zeros(4))
    _, after, report = apply(net, images(), "fold-batch-norm", dynamic=BATCH)
    assert errors_at(net, after, images(size=2), images(size=3)) <= 5e-6
    assert len(report.misses) == 2 and all(".bias' is also used by 'conv2d" in reason for reason in reasons(report))


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0"])
def test_onnxsim_fresh_nets(name: str) -> None:
    """As built: an untrained mobilenet_v2 outputs about 1e-9, which an absolute tolerance would not notice."""
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    x = (torch.randn(1, 3, 64, 64),)
    _, after, _ = apply(net, x, "exact")
    assert "batch_norm" not in operators(after)
    assert errors_at(net, after, x) <= 1e-4


# Torch-Pruning: what exact passes must not do either

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda y: torch.flip(y, [1]),
    "channel shuffle": lambda y: y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).reshape(y.shape),
    "roll": lambda y: torch.roll(y, 3, 1),
    "stack and flatten": lambda y: torch.stack((y, y + 1), 2).flatten(1, 2)[:, ::2],
    "repeat": lambda y: y.repeat(1, 2, 1, 1)[:, 4:12],
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1)[:, 1:9],
    "permutation": lambda y: y[:, torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])],
    "pixel shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
}


@pytest.mark.parametrize("case", MOVES)
def test_torch_pruning_moves_between_layers(case: str) -> None:
    def moved(net: nn.Module, x: Tensor) -> Tensor:
        return net.second(net.bn(MOVES[case](net.first(x))) * net.scale)

    net = Net(moved, first=nn.Conv2d(4, 8, 3), bn=nn.BatchNorm2d(8), second=nn.Conv2d(8, 4, 3, padding=1))
    net.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
    exact(lively(net))


def test_torch_pruning_bare_parameter_as_a_weight() -> None:
    def bare(net: nn.Module, x: Tensor) -> Tensor:
        return net.bn(F.conv2d(x, net.weight))

    net = Net(bare, bn=nn.BatchNorm2d(6))
    net.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    after = exact(lively(net))
    assert set(after.state_dict()) == {"weight", "bias"}


def test_torch_pruning_tied_embedding_and_head_stay_tied(tmp_path: Path) -> None:
    net = tiny.build("tied_head")
    _, after, _ = apply(net.module, net.args(2), "exact", dynamic=net.dynamic)
    assert errors_at(net.module, after, net.args(2), net.args(3)) <= 1e-6
    after.save(tmp_path / "tied.gopt")
    for model in (after, after.clone(), go.load(tmp_path / "tied.gopt")):
        names = {name for name, tensor in model.params.items() if tensor.shape == (40, 12)}
        assert names == {"embedding.weight", "head.weight"}
        assert len({id(model.params[name]) for name in names}) == 1


def test_torch_pruning_tied_head_behind_a_scale_is_not_scaled() -> None:
    """Folding the scale into the head would scale the embedding with it."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).relu() * 0.125) * 3.0

    def tokens(size: int) -> tuple[Tensor]:
        return (torch.randint(0, 20, (size, 5), generator=torch.Generator().manual_seed(size)),)

    net = Scaled().eval()
    _, after, report = apply(net, tokens(2), "fuse-affine", dynamic=BATCH)
    assert not report.edits and all("is also used by 'embedding'" in reason for reason in reasons(report))
    assert errors_at(net, after, tokens(2), tokens(3)) == 0


def test_torch_pruning_training_mode_is_kept() -> None:
    net = lively(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, 2, 1))).train()
    before, after, _ = apply(net, images(size=4), "exact")
    assert all(module.training for module in net.modules())
    assert before.mode == after.mode == "train" and "batch_norm" in operators(after)
    x = images(size=4)
    first, second = after(*x), after(*x)
    assert not torch.equal(first, second), "dropout is off"


def test_torch_pruning_two_pipelines_share_no_state() -> None:
    def run(net: nn.Module) -> tuple[str, list[str]]:
        _, after, report = apply(net, images(size=2), "exact", dynamic=BATCH)
        return str(after), reasons(report)

    torch.manual_seed(0)
    nets = [
        lively(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))),
        lively(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))),
    ]
    alone = [run(net) for net in nets]
    assert [run(net) for net in reversed(nets)] == alone[::-1] and [run(net) for net in nets] == alone
