"""Code for NVIDIA GPUs. Everything up to the code is tested without a GPU, and compiling where there is nvcc."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from benchmarks.gpu_checks import CHECKS, args_of
from graphopt.backend import load_artifact
from graphopt.backends.tvm.cuda.artifact import GpuArtifact
from graphopt.backends.tvm.cuda.compile import generate
from graphopt.backends.tvm.cuda.lower import BuiltForGpu
from graphopt.backends.tvm.cuda.nvcc import compiler, machine_code
from graphopt.backends.tvm.cuda.runtime import why_no_gpu
from graphopt.backends.tvm.cuda.tiles import TILES, best_tile
from graphopt.errors import GraphoptError, LoadError, UnsupportedError
from graphopt.target import Target
from tests.compare import relative_error

TARGET = Target.parse("cuda-sm_90")
needs_nvcc = pytest.mark.skipif(compiler() is None, reason="nvcc is not installed")
needs_gpu = pytest.mark.skipif(why_no_gpu("sm_90") is not None, reason=str(why_no_gpu("sm_90")))
MMA = {"float16": "f32.f16.f16.f32", "bfloat16": "f32.bf16.bf16.f32", "float32": "f32.tf32.tf32.f32"}


def generated(net: nn.Module, *args: Tensor, **options: Any) -> BuiltForGpu:
    built, unsupported = generate(go.capture(net.eval(), args, **options), TARGET)
    assert built is not None, unsupported
    return built


class Net(nn.Module):
    """A stem of three channels, a residual block with a depthwise convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        x = x + self.pointwise(self.depthwise(x).relu())
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def net(dtype: torch.dtype = torch.float16) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().eval().to(dtype), torch.randn(2, 3, 16, 16).to(dtype)


def _capture_args() -> tuple[Net, tuple[Tensor]]:
    module, x = net()
    return module, (x,)


@pytest.fixture(scope="module")
def artifact() -> GpuArtifact:
    if compiler() is None:
        pytest.skip("nvcc is not installed")
    module, x = net()
    built = go.build(go.capture(module, (x,)), target=TARGET)
    assert isinstance(built, GpuArtifact)
    return built


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_use_tensor_cores_and_the_rest_is_fused(dtype: torch.dtype) -> None:
    built = generated(*net(dtype))
    assert len(built.coverage.rules["product"]) == 3
    calls = re.findall(r"^ .*graphopt::product<(\w+), graphopt::(\w+)", built.source, re.MULTILINE)
    kinds = {torch.float16: "half", torch.bfloat16: "nv_bfloat16", torch.float32: "float"}
    assert {kind for kind, _ in calls} == {kinds[dtype]}
    assert sorted(operand for _, operand in calls) == ["Matrix", "Matrix", "Window"]
    # Stem, depthwise, pointwise with the sum, mean, classifier, and a cast where the dtype is short.
    assert built.source.count('extern "C" __global__') == 2 * (5 if dtype == torch.float32 else 6)


@needs_nvcc
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_machine_code_holds_tensor_core_instructions(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = generated(*net(getattr(torch, dtype)))
    assert len(machine_code(built.source, "sm_90")) > 10_000
    monkeypatch.setattr("graphopt.backends.tvm.cuda.nvcc._FLAGS", ("-ptx", "-std=c++17", "-w"))
    ptx = machine_code(built.source, "sm_90").decode()
    assert MMA[dtype] in ptx
    assert "cp.async.cg.shared.global" in ptx
    assert "ldmatrix.sync.aligned" in ptx


@pytest.mark.parametrize("name", CHECKS)
def test_code_is_generated_for(name: str) -> None:
    make, shapes = CHECKS[name]
    built = generated(make().half(), *args_of(shapes, torch.float16))
    assert "__global__" in built.source


@pytest.mark.parametrize(
    ("name", "rule"),
    [("self-attention", "attention"), ("attention-masked", "attention"), ("conv-grouped-odd", "product")],
)
def test_rule_that_takes(name: str, rule: str) -> None:
    make, shapes = CHECKS[name]
    assert rule in generated(make().half(), *args_of(shapes, torch.float16)).coverage.rules


def test_attention_reads_its_operands_where_one_product_wrote_them() -> None:
    make, shapes = CHECKS["self-attention"]
    built = generated(make().half(), *args_of(shapes, torch.float16))
    assert not built.coverage.general, "nothing is copied in front of the attention"
    (call,) = re.findall(r"graphopt::plain_attention<([^>]*)>\(", built.source.rpartition("template")[2])
    assert call.split(", ")[4:7] == ["192", "192", "192"], "rows of queries, keys and values are rows of the product"


@pytest.mark.parametrize("near", ["attention-narrow"])
def test_heads_without_whole_chunks_have_no_attention_kernel(near: str) -> None:
    make, shapes = CHECKS[near]
    assert "attention" not in generated(make().half(), *args_of(shapes, torch.float16)).coverage.rules


def test_the_batch_may_be_free() -> None:
    module, x = net()
    built = generated(module, x, dynamic={"image": {0: "batch"}})
    assert len(built.coverage.rules["product"]) == 3
    assert "int64_t" in built.source


def test_stretches_between_inputs_and_outputs_are_captured_as_a_graph() -> None:
    built = generated(*net())
    assert "cuda_graph" in built.executable.stats() + built.executable.as_text()


@pytest.mark.parametrize(
    ("rows", "columns", "depth"), [(49, 512, 9216), (12544, 64, 294), (1, 1000, 1024), (8192, 4096, 8192)]
)
@pytest.mark.parametrize("clusters", [True, False])
def test_tiles_fit_the_machine(rows: int, columns: int, depth: int, clusters: bool) -> None:
    tile = best_tile(rows, columns, 1, depth, clusters)
    assert tile.shared_bytes <= 227 << 10
    assert 32 <= tile.threads <= 1024
    assert tile.parts == 1 or (clusters and tile.rows % (tile.parts * 4) == 0)
    assert tile.rows // tile.parts * tile.columns % tile.threads == 0


def test_every_tile_is_whole() -> None:
    for tile in TILES:
        assert tile.rows % tile.warp_rows == tile.columns % tile.warp_columns == 0
        assert tile.warp_rows % 16 == tile.warp_columns % 16 == 0


def test_unsupported_operators_are_refused_by_name() -> None:
    class Random(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bernoulli(x)

    model = go.capture(Random(), (torch.rand(4),))
    with pytest.raises(UnsupportedError, match=r"aten\.rand"):
        go.build(model, target=TARGET)


@pytest.mark.parametrize("arch", ["sm_75", "sm_60", "gfx90a"])
def test_old_and_foreign_architectures_are_refused(arch: str) -> None:
    target = Target.from_json(TARGET.to_json() | {"arch": arch})
    module, x = net()
    with pytest.raises(UnsupportedError, match=arch) as caught:
        go.build(go.capture(module, (x,)), target=target)
    assert "sm_80" in str(caught.value)


def test_without_nvcc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.backends.tvm.cuda.nvcc.compiler", lambda: None)
    with pytest.raises(UnsupportedError, match="install the CUDA toolkit"):
        machine_code("", "sm_90")


def test_exact_floating_point_is_refused() -> None:
    module, x = net(torch.float32)
    with pytest.raises(UnsupportedError, match="exact floating point"):
        go.build(go.capture(module, (x,)), target=TARGET, exact_float=True)


@needs_nvcc
def test_code_for_ampere_has_no_clusters() -> None:
    target = Target.parse("cuda")
    deep = nn.Conv2d(512, 512, 3, padding=1).half()
    for chosen, clusters in ((target, False), (TARGET, True)):
        built, _ = generate(go.capture(deep, (torch.randn(1, 512, 7, 7).half(),)), chosen)
        assert built is not None
        (call,) = re.findall(r"^ .*graphopt::product<.*, (\d+)>\(", built.source, re.MULTILINE)
        assert (int(call) > 1) is clusters
    assert machine_code(generate(go.capture(*_capture_args()), target)[0].source, "sm_80")  # type: ignore[union-attr]


@needs_nvcc
def test_what_nvcc_refuses_is_shown() -> None:
    with pytest.raises(GraphoptError, match="identifier") as caught:
        machine_code("__global__ void k() { nonsense(); }", "sm_90")
    assert "sm_90" in str(caught.value)


def test_saved_artifact(artifact: GpuArtifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert manifest["backend"] == "tvm"
    assert manifest["target"]["arch"] == "sm_90"
    assert set(manifest["sha256"]) == {"model.so", "weights.bin", "kernels.cu", "kernels.cubin"}
    assert {weight["dtype"] for weight in manifest["weights"]} <= {"float16", "float32"}
    loaded = load_artifact(tmp_path / "bundle")
    assert isinstance(loaded, GpuArtifact)
    assert loaded.signature == artifact.signature
    assert loaded.code == artifact.code
    with pytest.raises(GraphoptError, match="copy that folder"):
        loaded.save(tmp_path / "again")


@pytest.mark.parametrize("name", ["model.so", "weights.bin", "kernels.cu", "kernels.cubin"])
def test_altered_file_is_refused(artifact: GpuArtifact, tmp_path: Path, name: str) -> None:
    artifact.save(tmp_path / "bundle")
    with (tmp_path / "bundle" / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(LoadError, match=re.escape(name)):
        load_artifact(tmp_path / "bundle")


@pytest.mark.skipif(why_no_gpu("sm_90") is None, reason="there is a GPU")
def test_calling_without_a_gpu_says_what_is_missing(artifact: GpuArtifact) -> None:
    with pytest.raises(UnsupportedError, match="code for an NVIDIA GPU, sm_90") as caught:
        artifact(net()[1])
    assert "driver" in str(caught.value) or "GPU" in str(caught.value)
    assert "artifact.save(DIR)" in str(caught.value)


@needs_gpu
@needs_nvcc
@pytest.mark.parametrize("name", CHECKS)
def test_answers_on_the_gpu(name: str) -> None:
    make, shapes = CHECKS[name]
    module, args = make().half(), args_of(shapes, torch.float16)
    built = go.build(go.capture(module, args), target=TARGET)
    expected = module.double()(*(arg.double() for arg in args))
    assert relative_error(built(*(arg.cuda() for arg in args)).cpu().double(), expected) < 4e-3
