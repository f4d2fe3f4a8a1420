"""Models written as ONNX compute the same in ONNX Runtime and come back with their names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.errors import UnsupportedError
from tests.compare import relative_error
from tests.tiny import build


def run_onnx(path: Path, model: go.Model, args: tuple) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = [leaf for leaf in model.flatten_inputs(args, {}) if isinstance(leaf, torch.Tensor)]
    names = [spec.name for spec in model.signature.tensor_inputs]
    assert [value.name for value in session.get_inputs()] == names
    assert [value.name for value in session.get_outputs()] == [spec.name for spec in model.signature.tensor_outputs]
    return [
        torch.from_numpy(array) for array in session.run(None, dict(zip(names, map(np.asarray, tensors), strict=True)))
    ]


@pytest.mark.parametrize("name", ["attention", "dict_in_out", "split_outputs"])
def test_runs_elsewhere(name: str, tmp_path: Path) -> None:
    net = build(name)
    model = go.capture(net.module, net.args(2), dynamic=net.dynamic)
    model.save(tmp_path / "net.onnx")
    args = net.args(3 if net.dynamic else 2, seed=1)
    ours = [leaf for leaf in torch.utils._pytree.tree_leaves(model(*args)) if isinstance(leaf, torch.Tensor)]
    assert relative_error(run_onnx(tmp_path / "net.onnx", model, args), ours) < 1e-5


class Flagged(nn.Module):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, twice: bool = False) -> torch.Tensor:
        y = x if mask is None else x * mask
        return y.flatten(1).repeat(1, 2) if twice else y


def test_constants_are_no_inputs_and_free_sizes_keep_their_names(tmp_path: Path) -> None:
    args = (torch.randn(2, 3, 4), None, True)
    model = go.capture(Flagged(), args, dynamic={"x": {0: "batch", 2: "width"}})
    model.save(tmp_path / "net.onnx")
    (output,) = run_onnx(tmp_path / "net.onnx", model, args)
    assert torch.equal(output, model(*args))
    again = go.load(tmp_path / "net.onnx")
    assert [spec.dims for spec in again.signature.tensor_inputs] == [("batch", 3, "width")]


def test_what_onnx_lacks_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(UnsupportedError, match=r"torch\.onnx cannot export"):
        go.capture(Net(), (torch.randn(3),)).save(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
