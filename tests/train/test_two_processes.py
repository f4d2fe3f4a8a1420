"""Two processes with half of every batch each end with the weights, and the zeros, of one that has the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import graphopt as go
from graphopt.train import Distill, finetune
from graphopt.train.dhspg import DHSPG
from graphopt.train.hesso import HESSO, HESSOCric
from graphopt.train.sparse import SparseOptimizer

ROOT = Path(__file__).resolve().parents[2]
KINDS: dict[str, type[SparseOptimizer]] = {"dhspg": DHSPG, "hesso": HESSO, "cric": HESSOCric, "finetune": HESSO}


class Small(nn.Module):
    """A residual net without batch norm, whose statistics would be those of half a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + self.b(torch.relu(self.a(x)))).mean((2, 3)))


def train(kind: str, rank: int = 0, world: int = 1) -> dict[str, object]:
    """Two dozen steps; each process sees its part of every batch. In float64, so that no choice hangs on a rounding."""
    torch.manual_seed(0)
    model = go.capture(Small().double(), (torch.randn(2, 3, 6, 6).double(),), dynamic={0: {0: "batch"}}).train()
    optimizer = KINDS[kind](model, 0.1, 0.5, steps=14, start_step=4, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, 6, 6, generator=generator).double() for _ in range(32)]
    data = [(x.chunk(world)[rank], x.mean((2, 3)).argmax(1).chunk(world)[rank]) for x in images]
    if kind == "finetune":
        add = next(node.name for node in model.graph.nodes if str(node.target).startswith("aten.add"))
        finetune(model, data, optimizer=optimizer, teacher=model.clone(), distill=Distill(inner=(add,)))
    else:
        own_loop(DistributedDataParallel(model.module) if world > 1 else model.module, optimizer, data)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"weights": weights, "zeros": optimizer.zeros(), "finished": optimizer.finished}


def own_loop(net: nn.Module, optimizer: SparseOptimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def main(folder: Path) -> None:
    """Both processes, which part as soon as torch is imported: that takes longer than all they do."""
    other = os.fork()
    rank = int(other == 0)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({kind: train(kind, rank, 2) for kind in KINDS}, folder / f"{rank}.pt")
    dist.destroy_process_group()
    if other and os.waitpid(other, 0)[1]:
        sys.exit("the other process has failed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, object]]]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_with_one(kind: str, ranks: list[dict[str, dict[str, object]]]) -> None:
    alone, (first, second) = train(kind), (rank[kind] for rank in ranks)
    assert alone["finished"] and sum(map(len, alone["zeros"].values())) == 10
    assert first["zeros"] == second["zeros"] == alone["zeros"]
    for name, expected in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert torch.allclose(first["weights"][name], expected, rtol=1e-9, atol=1e-12), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
