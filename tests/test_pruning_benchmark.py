"""The benchmark of accuracy after pruning: its data, its counter, and its page."""

from __future__ import annotations

import json

import pytest
import torch

import graphopt as go
from benchmarks.images import Images, Shuffled
from benchmarks.pruning_methods import Task, macs, ours
from benchmarks.pruning_table import PAGE, RESULTS, page, tables
from benchmarks.small_nets import NETS, small_net
from graphopt.analysis.widths import layer_macs


def pictures(count: int = 40) -> Images:
    """Images that say in every pixel which one they are, and where the pixel is."""
    x = torch.arange(count).float()[:, None, None, None] * 1000 + torch.arange(1.0, 65).reshape(8, 8)
    return Images(x.repeat(1, 3, 1, 1), torch.arange(count), x[:4], torch.arange(4))


def test_batches_follow_from_seed_and_epoch_and_show_every_image_once() -> None:
    data = pictures()
    batches = Shuffled(data, 10, seed=3, shift=2)
    first, again = list(batches), list(batches)
    assert len(batches) == len(first) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert sorted(torch.cat([y for _, y in first]).tolist()) == list(range(40))
    batches.set_epoch(1)
    assert not torch.equal(first[0][1], next(iter(batches))[1])
    assert not torch.equal(first[0][1], next(iter(Shuffled(data, 10, seed=4, shift=2)))[1])
    assert len(Shuffled(data, 10, seed=3, shift=2, limit=25)) == 2


def test_images_are_shifted_and_mirrored_and_stay_their_classes() -> None:
    mirrored = 0
    for x, y in Shuffled(pictures(), 10, seed=0, shift=2):
        for image, number in zip(x, y, strict=True):
            places = (image[0] - number * 1000).clamp(min=0)  # 0 is the border
            inside = places > 0
            assert inside.sum() >= 36 and places.max() <= 64
            steps = (places[:, 1:] - places[:, :-1])[inside[:, 1:] & inside[:, :-1]]
            assert set(steps.tolist()) in ({1.0}, {-1.0})
            mirrored += steps[0] < 0
    assert 10 < mirrored < 30


@pytest.mark.parametrize("name", NETS)
def test_modules_and_captured_models_are_counted_alike(name: str) -> None:
    net, x = small_net(name, 3, 32).eval(), torch.randn(1, 3, 32, 32)
    model = go.capture(net, (x,))
    assert macs(net, x) == macs(model, x) == sum(layer_macs(model).values()) > 1e6


def test_ours_leaves_the_net_as_it_is_and_meets_the_part() -> None:
    torch.manual_seed(0)
    net = small_net("mobilenet", 1, 28).eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    task = Task(net, 0.4, [(torch.randn(8, 1, 28, 28), torch.zeros(8).long())], seed=0)
    small = ours(task)
    assert 0.36 < macs(small, task.example) / macs(net, task.example) <= 0.4
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())


def test_the_page_holds_what_was_measured() -> None:
    results = json.loads(RESULTS.read_text())
    text = PAGE.read_text()
    assert page(text, results) == text
    for net, parts in results["nets"].items():
        for part, methods in parts.items():
            rows = [row for row in methods["graphopt"]["seeds"] if "after" in row]
            budget, most = part.split()
            assert len(rows) == 3, (net, part)
            if budget == "macs":
                assert all(row["macs"] <= float(most) + 1e-9 for row in rows), (net, part)
            else:  # measured again, after fine-tuning
                assert all(abs(row["latency"] - float(most)) < 0.1 for row in rows), (net, part)
    assert tables(results).count("| graphopt |") == sum(map(len, results["nets"].values()))
