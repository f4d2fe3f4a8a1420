"""The TVM backend's refusals, dtypes, dynamic sizes, threads and targets."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.backend import Unsupported, get_backend
from graphopt.backends.tvm.backend import tvm_target
from graphopt.errors import InputError, UnsupportedError, UsageError
from graphopt.target import Target
from tests.compare import relative_error


class Small(nn.Module):
    """Convolution, norms, attention, pooling, indexing: something of every family."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.layer = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.max_pool2d(F.gelu(self.norm(self.conv(x))), 2).flatten(2).transpose(1, 2)
        q, k, v = self.linear(self.layer(y)).chunk(3, -1)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return z.mean(1), z.softmax(-1).cumsum(1), z.amax((1, 2))


def _small(dtype: torch.dtype) -> tuple[Small, Tensor]:
    torch.manual_seed(0)
    return Small().eval().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 1e-6), (torch.float64, 1e-13), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
def test_every_float_dtype_stays_itself(dtype: torch.dtype, limit: float) -> None:
    net, x = _small(dtype)
    results = go.build(go.capture(net, (x,)), threads=1)(x)
    assert [result.dtype for result in results] == [dtype] * 3
    assert relative_error(results, net(x)) < limit


def test_a_perturbation_of_one_percent_is_seen() -> None:
    net, x = _small(torch.float32)
    artifact = go.build(go.capture(net, (x,)), threads=1)
    with torch.no_grad():
        net.conv.weight *= 1.01
    assert relative_error(artifact(x), net(x)) > 1e-4


def test_all_that_is_unsupported_is_named_at_once() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.linalg.inv(x), torch.fft.fft(x).real

    x = torch.eye(3) + 0.1
    model = go.capture(Odd(), (x,))
    found = get_backend("tvm")().supports(model)
    assert {problem.operator for problem in found} >= {"aten.linalg_inv_ex.default", "aten._fft_r2c.default"}
    assert all(isinstance(problem, Unsupported) and problem.why and problem.node for problem in found)
    with pytest.raises(UnsupportedError) as error:
        go.build(model)
    assert all(problem.operator in str(error.value) for problem in found)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: F.dropout(x, 0.5, training=True), "random"),
        (lambda x: torch.rand_like(x) + x, "no conversion"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], "is not computed"),
        (lambda x: torch.complex(x, x).abs(), "no conversion"),
    ],
)
def test_refused_with_a_reason(function: object, reason: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)  # type: ignore[operator]

    found = get_backend("tvm")().supports(go.capture(Odd(), (torch.randn(1, 2, 4, 4),)))
    assert any(reason in problem.why for problem in found), found


def test_a_model_in_training_mode_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    found = get_backend("tvm")().supports(go.capture(net, (torch.randn(2, 3, 4, 4),)))
    reasons = {problem.operator: problem.why for problem in found}
    assert reasons.keys() == {"aten.batch_norm.default", "aten.add_.Tensor"}
    assert "training mode" in reasons["aten.batch_norm.default"] and "writes" in reasons["aten.add_.Tensor"]


def test_two_dynamic_sizes_and_arithmetic_on_them() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            batch, length, width = x.shape
            y = torch.cat([x, x], 1).reshape(2 * batch * length, width)
            mask = torch.arange(length) < length - 1
            return y * batch, (x * mask[:, None]).mean((1, 2)) + torch.full((batch,), length)

    net = Sizes()
    model = go.capture(net, (torch.randn(2, 6, 4),), dynamic={"x": {0: "batch", 1: "length"}})
    artifact = go.build(model, threads=1)
    for batch, length in ((2, 6), (3, 9), (1, 5)):
        x = torch.randn(batch, length, 4)
        assert relative_error(artifact(x), net(x)) < 1e-6


def test_dynamic_image_sizes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1)).eval()
    model = go.capture(net, (torch.randn(2, 3, 16, 16),), dynamic={0: {0: "n", 2: "h", 3: "w"}})
    artifact = go.build(model, threads=1)
    for shape in ((1, 3, 17, 22), (2, 3, 16, 8)):
        x = torch.randn(shape)
        assert relative_error(artifact(x), net(x)) < 1e-6


def test_inputs_that_are_views_unaligned_or_read_only() -> None:
    net = nn.Linear(5, 3).eval()
    artifact = go.build(go.capture(net, (torch.randn(4, 5),)), threads=1)
    storage = torch.randn(1 + 4 * 5)
    view = storage[1:].view(4, 5)
    transposed = torch.randn(5, 4).t()
    read_only = torch.randn(4, 5).numpy()
    read_only.flags.writeable = False
    assert relative_error(artifact(view), net(view)) < 1e-6
    assert relative_error(artifact(transposed), net(transposed)) < 1e-6
    assert relative_error(torch.from_numpy(artifact(read_only)), net(torch.from_numpy(read_only.copy()))) < 1e-6
    x = torch.randn(4, 5)
    for special in (x.clone().requires_grad_(), nn.Parameter(x), torch._neg_view(-x)):
        result = artifact(special)
        assert relative_error(result, net(x)) < 1e-6 and not result.requires_grad
    with pytest.raises(InputError, match="is on meta, the artifact runs on the CPU"):
        artifact(x.to("meta"))


def test_results_outlive_the_artifact_and_the_next_call() -> None:
    net, inputs = nn.Linear(5, 3).eval(), torch.randn(3, 4, 5)
    artifact = go.build(go.capture(net, (inputs[0],)), threads=1)
    results = [artifact(x.clone()) for x in inputs]
    del artifact
    gc.collect()
    for x, result in zip(inputs, results, strict=True):
        assert relative_error(result, net(x)) < 1e-6


def test_an_output_that_is_an_input_or_a_weight() -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(100))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, self.weight, x + self.weight

    net, x = Passes(), torch.randn(100)
    artifact = go.build(go.capture(net, (x,)), threads=1)
    assert relative_error(artifact(x), net(x)) == 0


def test_an_index_out_of_range_reads_nothing_outside() -> None:
    net = nn.Embedding(5, 4)
    artifact = go.build(go.capture(net, (torch.tensor([0, 1]),)), threads=1)
    assert torch.equal(artifact(torch.tensor([10**9, -(10**9)])), net.weight[[4, 0]])


def test_code_for_another_machine_is_built_but_not_run() -> None:
    net = nn.Linear(3, 2).eval()
    artifact = go.build(go.capture(net, (torch.randn(1, 3),)), target="cortex-a72")
    assert artifact.threads == Target.parse("cortex-a72").cores
    with pytest.raises(UsageError, match="this machine cannot run") as error:
        artifact(torch.randn(1, 3))
    assert f"this machine is {Target.parse('cpu').arch}" in str(error.value)


def test_code_for_features_that_this_machine_lacks_is_built_but_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = go.capture(nn.Linear(3, 2).eval(), (torch.randn(1, 3),))
    monkeypatch.setattr("graphopt.target.this_machine", lambda: Target.parse("x86-64-v3"))
    rich = Target.from_json(Target.parse("x86-64-v4").to_json() | {"features": ["avx512_vnni"]})
    artifact = go.build(model, target=rich, threads=1)
    with pytest.raises(UsageError, match="code for x86_64 x86-64-v4, which this machine cannot run") as error:
        artifact(torch.randn(1, 3))
    assert "avx512_vnni, avx512bw" in str(error.value) and "this machine is x86_64 x86-64-v3 (" in str(error.value)


def test_features_beyond_the_cpus_reach_the_compiler() -> None:
    rich = Target.from_json(Target.parse("x86-64-v4").to_json() | {"features": ["avx512f", "avx512_vnni"]})
    assert list(tvm_target(rich).attrs["mattr"]) == ["+avx512vnni"]


def test_a_target_without_schedules_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="compiles for CPUs"):
        tvm_target(Target.parse("cuda"))
