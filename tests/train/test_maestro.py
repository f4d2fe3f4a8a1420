"""Maestro: what a step draws and uses, the order of columns, ranks that shrink, and going on from a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import UsageError
from graphopt.train import Maestro, as_factors
from graphopt.train.checkpoint import load_checkpoint, save_checkpoint
from graphopt.verify import verify


def two_layers(seed: int = 0) -> nn.Module:
    """Factors of ranks 6 and 4, a norm, and a part that is not factorised."""
    torch.manual_seed(seed)
    conv, linear = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)
    net = nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    return as_factors(net)[0]


def images(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(count)]
    return [(x, x.mean((2, 3)).argmax(1)) for x in found]


def train(net: nn.Module, maestro: Maestro, data: list[tuple[Tensor, Tensor]], loss: Any = F.cross_entropy) -> float:
    value = torch.zeros(())
    assert maestro.optimizer is not None
    for x, y in data:
        maestro.optimizer.zero_grad()
        value = loss(maestro(x), y) + maestro.penalty()
        value.backward()
        maestro.optimizer.step()
        maestro.step()
    return float(value.detach())


def squares(made: Tensor, wanted: Tensor) -> Tensor:
    return (made - wanted).square().sum(1).mean()


def adam(net: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=lr)


def test_the_first_columns_of_one_layer_are_used() -> None:
    net = two_layers().eval()
    maestro, x = Maestro(net), images(1)[0][0]
    seen = set()
    for _ in range(60):
        index, rank = maestro.drawn
        pair = maestro.pairs[index]
        other, _ = maestro.pairs[1 - index].matrices()
        net.zero_grad()
        made = maestro(x)
        made.square().sum().backward()
        kept = pair.outer.detach().clone()
        with torch.no_grad():
            pair.outer[:, rank:] = 0
            assert relative_error(made, net(x)) < 1e-6
            pair.outer.copy_(kept)
        outer, inner = pair.gradients()
        assert not outer[:, rank:].any() and not inner[rank:].any()
        assert outer[:, :rank].any(0).all() and inner[:rank].any(1).all()
        assert maestro.pairs[1 - index].gradients()[0].any(0).all() and other.shape[1] > 1
        seen.add((index, rank))
        maestro.step()
    assert len(seen) == 10


def test_all_pairs_of_layer_and_rank_are_as_likely_and_a_seed_draws_the_same() -> None:
    first, second, other = (Maestro(two_layers(), eps=0, seed=seed) for seed in (3, 3, 4))
    draws: list[list[tuple[int, int]]] = [[], [], []]
    for _ in range(3000):
        for found, maestro in zip(draws, (first, second, other), strict=True):
            found.append(maestro.drawn)
            maestro.step()
    counts = Counter(draws[0])
    assert set(counts) == {(0, b) for b in range(1, 7)} | {(1, b) for b in range(1, 5)}
    assert all(abs(count - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5 for count in counts.values())
    assert draws[0] == draws[1] != draws[2]


def test_the_penalty_is_that_of_every_tail() -> None:
    net = two_layers()
    maestro, wanted = Maestro(net, penalty=0.3), 0.0
    for pair in maestro.pairs:
        outer, inner = (matrix.detach() for matrix in pair.matrices())
        wanted += sum(float(outer[:, b:].norm() + inner[b:].norm()) for b in range(pair.rank))
    assert float(maestro.penalty().detach()) == pytest.approx(0.3 * wanted, rel=1e-6)
    pair = maestro.pairs[0]
    with torch.no_grad():
        pair.outer[:, 3:], pair.inner[3:] = 0, 0
    maestro.penalty().backward()
    outer, inner = pair.gradients()
    assert not outer[:, 3:].any() and not inner[3:].any() and bool(torch.isfinite(outer).all())
    tails = [pair.inner.flatten(1)[b:].norm().detach() for b in range(3)]
    assert torch.allclose(inner[1], 0.3 * pair.inner[1].detach().flatten() * (1 / tails[0] + 1 / tails[1]), rtol=1e-5)


def test_columns_of_half_precision_that_are_zero_have_finite_gradients() -> None:
    net = two_layers().half()
    maestro = Maestro(net, penalty=1.0)
    with torch.no_grad():
        maestro.pairs[0].outer[:, 3:], maestro.pairs[0].inner[3:] = 0, 1e-4
    maestro.penalty().backward()
    outer, inner = maestro.pairs[0].gradients()
    assert bool(torch.isfinite(outer).all() and torch.isfinite(inner).all()) and not outer[:, 3:].any()
    assert inner[3:].all()


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def order_errors(matrix: Tensor, x: Tensor, ordered: bool) -> list[float]:
    """How far the first b columns are from the best approximation of rank b of what `matrix` makes of the data."""
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False).double()
    net, _ = as_factors(layer)
    optimizer, steps = adam(net, 0.03), 1600
    maestro = Maestro(net, optimizer, penalty=0, eps=0)
    fade = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        squares((maestro if ordered else net)(x), x @ matrix.T).backward()
        optimizer.step()
        fade.step()
        maestro.step()
    (a, b), root = (m.detach() for m in maestro.pairs[0].matrices()), torch.linalg.cholesky(x.T @ x / len(x))
    left, values, right = torch.linalg.svd(matrix @ root)
    best = [left[:, :r] * values[:r] @ right[:r] for r in range(1, len(values) + 1)]
    return [float((a[:, : r + 1] @ b[: r + 1] @ root - w).norm() / w.norm()) for r, w in enumerate(best)]


def test_ordered_dropout_finds_singular_vectors_and_principal_components_in_order() -> None:
    """Horvath et al., section 4: on white data the columns become those of the SVD, of an autoencoder the PCA."""
    torch.manual_seed(0)
    matrix = orthogonal(6) * torch.tensor([4.0, 3, 2, 1.2, 0.6, 0.3]).double() @ orthogonal(6)
    white = torch.eye(6).double() * 6**0.5
    assert max(order_errors(matrix, white, ordered=True)) < 2e-3
    assert min(order_errors(matrix, white, ordered=False)[:5]) > 0.1
    data = torch.randn(300, 6).double() * torch.tensor([2.0, 1.5, 1, 0.7, 0.45, 0.3]).double() @ orthogonal(6)
    assert max(order_errors(torch.eye(6).double(), data, ordered=True)) < 1e-2


def test_a_planted_rank_is_found_and_the_planted_solution_too() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 3) * torch.tensor([3.0, 2, 1]) @ torch.randn(3, 12) / 5
    x = torch.randn(256, 12)
    net, _ = as_factors(nn.Sequential(nn.Linear(12, 8)))
    maestro = Maestro(net, adam(net), penalty=0.1, eps=1e-2)
    data, ranks = [(x, x @ matrix.T)], [8]
    for _ in range(400):
        train(net, maestro, data, squares)
        ranks.append(maestro.ranks()["0"])
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == 3 and len(set(ranks)) > 3
    biased = squares(net(x), data[0][1]).item()
    for _ in range(300):  # without penalty and dropout, as any net of these two layers
        maestro.optimizer.zero_grad()
        squares(net(x), data[0][1]).backward()
        maestro.optimizer.step()
    assert squares(net(x), data[0][1]).item() < 1e-6 * biased + 1e-7 * float(data[0][1].square().sum(1).mean())
    model = go.capture(net.eval(), (x,))
    assert [list(p.shape) for p in model.parameters()] == [[3, 12], [8, 3], [8]]
    assert relative_error(model(x), net(x)) < 1e-6


@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.SGD])
def test_cutting_keeps_the_columns_and_the_state_of_those_that_stay(rule: Any) -> None:
    net, data = two_layers(), images(4)
    options = {"lr": 0.01} | ({"momentum": 0.9} if rule is torch.optim.SGD else {})
    maestro = Maestro(net, rule(net.parameters(), **options), penalty=0, eps=0)
    train(net, maestro, data)
    pair, x = maestro.pairs[0], data[0][0]
    with torch.no_grad():
        pair.outer[:, 2:] *= 1e-4
    outer, inner = (matrix.detach().clone() for matrix in pair.matrices())
    name = "momentum_buffer" if rule is torch.optim.SGD else "exp_avg_sq"
    before = [maestro.optimizer.state[p][name].clone() for p in (pair.outer, pair.inner)]
    maestro.eps = float(outer[:, 2:].norm() * inner[2:].norm()) * 1.001
    loss = F.cross_entropy(net(x), data[0][1])  # a graph that knows the old shapes is still around
    maestro.step()
    assert maestro.ranks() == {"0": 2, "5": 4} and net[0][0].out_channels == net[0][1].in_channels == 2
    assert torch.equal(pair.matrices()[0], outer[:, :2]) and torch.equal(pair.matrices()[1], inner[:2])
    assert torch.equal(maestro.optimizer.state[pair.outer][name], before[0][:, :2])
    assert torch.equal(maestro.optimizer.state[pair.inner][name], before[1][:2])
    assert abs(train(net, maestro, data) - float(loss.detach())) < 1
    last = float((pair.matrices()[0][:, 1].norm() * pair.matrices()[1][1].norm()).detach())
    for eps, rank in ((0.999 * last, 2), (1.001 * last, 1)):
        other = Maestro(net, eps=eps, only=("0",))
        other.step()
        assert other.ranks() == {"0": rank}


def test_one_column_stays() -> None:
    maestro = Maestro(two_layers(), eps=1e9, every=2)
    maestro.step()
    assert maestro.ranks() == {"0": 6, "5": 4}
    maestro.step()
    assert maestro.ranks() == {"0": 1, "5": 1} and maestro.drawn[1] == 1
    maestro.step()
    maestro.step()
    assert maestro.ranks() == {"0": 1, "5": 1}


def test_a_state_that_cannot_be_cut_is_refused_before_anything_is() -> None:
    net, data = two_layers(), images(2)
    maestro = Maestro(net, torch.optim.Adafactor(net.parameters()), eps=0)
    train(net, maestro, data)
    maestro.eps = 1e9
    with pytest.raises(UsageError, match=r"of Adafactor has the shape .* cannot be cut"):
        maestro.step()
    assert maestro.ranks() == {"0": 6, "5": 4}


@pytest.mark.parametrize("stop", [3, 25])
def test_a_training_that_was_broken_off_ends_as_if_it_had_not_been(stop: int, tmp_path: Path) -> None:
    data, options = images(30), {"penalty": 0.1, "eps": 0.05}
    through, first, second = two_layers(), two_layers(), two_layers(seed=1)
    whole = Maestro(through, adam(through), **options)
    train(through, whole, data)
    before = Maestro(first, adam(first), **options)
    train(first, before, data[:stop])
    parts = {"maestro": before, "net": first, "optimizer": before.optimizer}
    save_checkpoint(tmp_path / "run", {name: dict(part.state_dict()) for name, part in parts.items()})
    assert (before.ranks() == {"0": 6, "5": 4}) == (stop == 3)
    saved = load_checkpoint(tmp_path / "run")
    after = Maestro(second, adam(second), seed=9, **options)
    after.load_state_dict(saved["maestro"])
    second.load_state_dict(saved["net"])
    after.optimizer.load_state_dict(saved["optimizer"])
    train(second, after, data[stop:])
    assert after.ranks() == whole.ranks() != {"0": 6, "5": 4} and after.drawn == whole.drawn
    state = second.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in through.state_dict().items())
    with pytest.raises(UsageError, match="not one of Maestro"):
        after.load_state_dict(saved["optimizer"])
    with pytest.raises(UsageError, match="of other factors"):
        Maestro(second, leave=("0",)).load_state_dict(saved["maestro"])


def test_a_captured_model_in_factors_is_trained_and_stays_sound() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    data = images(60)
    model = go.capture(net, (data[0][0],), dynamic={0: {0: "batch"}})
    model, _ = go.run(model, "low-rank{rank=0.5,forms=linear;kxk-1x1}")
    model.train()
    start = [float(F.cross_entropy(model(x), y).detach()) for x, y in data[:5]]
    maestro = Maestro(model, adam(model), penalty=0.01, eps=0.1)
    ranks = maestro.ranks()
    train(model.module, maestro, data)
    assert ranks == {"0": 4, "4": 2} and maestro.ranks()["0"] < 4
    verify(model.eval())
    assert sum(float(F.cross_entropy(model(x), y).detach()) for x, y in data[:5]) < 0.9 * sum(start)
    a, b = (matrix.detach() for matrix in maestro.pairs[0].matrices())
    values, rank = torch.linalg.svdvals(a @ b), maestro.ranks()["0"]
    eps = 1.01 * float(values[rank - 1] / values[0])
    small, (report,) = go.run(model, f"truncate-factors{{eps={eps}}}")
    assert report.findings["layers"][0]["layers"] == ["0", "0"] and report.findings["layers"][0]["rank"] < rank
    assert list(small.params["0.factors.0.weight"].shape) == [report.findings["layers"][0]["rank"], 3, 3, 3]


@pytest.mark.parametrize("options", [{"penalty": -1.0}, {"eps": float("nan")}, {"penalty": float("inf")}, {"every": 0}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"penalty is .*, eps .* and every"):
        Maestro(two_layers(), **options)
