"""Models whose weights are on a GPU: captured, rewritten, pruned and trained there. Skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt as go
from benchmarks.small_nets import NETS, small_net
from graphopt.check import relative_error
from graphopt.passes._importance import MEASURES
from graphopt.train import finetune
from graphopt.train.dhspg import DHSPG
from graphopt.train.hesso import HESSO, HESSOCric

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

LIMIT = 1e-4
"""Of the largest output, between a processor and a GPU; TF32 is off."""


@pytest.fixture(autouse=True)
def _whole_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def net_and_images(name: str, device: str) -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    torch.manual_seed(0)
    net = small_net(name, 3, 32).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.bias) * 0.1
            module.running_var = torch.rand_like(module.bias) + 0.5
    return net.to(device), [(torch.randn(8, 3, 32, 32).to(device),) for _ in range(3)]


def captured(name: str, device: str) -> tuple[go.Model, list[tuple[torch.Tensor]]]:
    net, images = net_and_images(name, device)
    return go.capture(net, images[0], dynamic={0: {0: "batch"}}), images


def devices(model: go.Model) -> set[str]:
    return {tensor.device.type for tensor in model.params.values() if tensor.is_floating_point()}


def outputs(model: go.Model, batch: tuple[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.call_flat(batch)[0].cpu()


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet"])
def test_exact_passes_keep_what_it_computes_and_where(name: str) -> None:
    model, images = captured(name, "cuda")
    small, reports = go.run(model, "exact")
    assert any(report.edits for report in reports) and devices(small) == {"cuda"}
    assert relative_error(outputs(small, images[1]), outputs(model, images[1])) < LIMIT


@pytest.mark.parametrize("importance", MEASURES)
@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_pruning_is_as_on_the_processor(name: str, importance: str) -> None:
    text = f"prune-channels{{macs=0.5,importance={importance},refit=false}}"
    left, made = [], []
    for device in ("cpu", "cuda"):
        model, images = captured(name, device)
        small, (report,) = go.run(model, text, calib=images)
        assert devices(small) == {device}
        left.append(report.findings["achieved"]["macs"])
        made.append(outputs(small, images[0]))
    assert left[0] == pytest.approx(left[1], abs=0.03) and 0.4 < left[1] <= 0.5
    if importance in ("magnitude", "l1", "bn-scale", "random"):  # others may break ties in another way
        assert relative_error(made[1], made[0]) < LIMIT


@pytest.mark.parametrize("name", NETS)
def test_refitting_on_the_gpu_brings_the_outputs_nearer(name: str) -> None:
    model, images = captured(name, "cuda")
    small, (report,) = go.run(model, "prune-channels{macs=0.6}", calib=images)
    error = report.findings["output error"]
    assert error["refitted"] < error["cut"] and devices(small) == {"cuda"}


def test_branches_go() -> None:
    model, images = captured("resnet", "cuda")
    _, (report,) = go.run(model, "prune-channels{macs=0.4,branches=true}", calib=images)
    assert report.findings["achieved"]["macs"] <= 0.4


def test_the_module_gets_its_tensors_back_on_its_device() -> None:
    net, images = net_and_images("resnet", "cuda")
    small, _ = go.run(go.capture(net, images[0]), "prune-channels{macs=0.5}")
    with torch.no_grad():
        go.write_back(small, net)
        assert relative_error(net(*images[0]).cpu(), outputs(small, images[0])) < LIMIT
    assert {parameter.device.type for parameter in net.parameters()} == {"cuda"}


def labelled(images: list[tuple[torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.cpu(), torch.arange(len(x)) % 10) for (x,) in images] * 4


@pytest.mark.parametrize("kind", [DHSPG, HESSO, HESSOCric])
def test_optimizers_choose_as_on_the_processor(kind: Any) -> None:
    zeros = []
    for device in ("cpu", "cuda"):
        model, images = captured("mobilenet", device)
        optimizer = kind(model, 0.01, 0.5, steps=16, start_step=2, momentum=0.9)
        finetune(model, labelled(images), epochs=4, optimizer=optimizer)
        assert optimizer.finished
        zeros.append(optimizer.zero)
    assert int(zeros[0].sum()) == int(zeros[1].sum())
    assert (zeros[0] == zeros[1]).float().mean() > 0.85  # rounding decides between units that are nearly equal


def test_a_teacher_on_the_gpu_is_learned_from() -> None:
    teacher, images = net_and_images("vgg", "cuda")
    student, _ = net_and_images("mobilenet", "cuda")
    done = finetune(student, labelled(images), epochs=8, lr=1e-2, teacher=teacher)
    assert next(student.parameters()).device.type == "cuda" and done.losses[-1] < 0.9 * done.losses[0]
