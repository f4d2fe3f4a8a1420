"""Fine-tuning: what it learns, that it goes on as if it had never stopped, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.check import relative_error
from graphopt.errors import LoadError, UsageError
from graphopt.train import HESSO, Distill, Diverged, finetune
from graphopt.train.checkpoint import load_checkpoint, save_checkpoint
from tests.train.loop import batches, captured, equal


class Drawn:
    """Batches with noise from torch's own random numbers, which break off with an error after some of them."""

    def __init__(self, count: int, fail_at: int | None = None) -> None:
        self.data, self.fail_at, self.seen = list(batches(count)), fail_at, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(self.data)).tolist():
            if self.seen == self.fail_at:
                raise KeyboardInterrupt
            self.seen += 1
            x, y = self.data[index]
            yield x + 0.1 * torch.randn_like(x), y


def loss_of(model: go.Model, data: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in data]).mean())


def test_it_learns_and_leaves_the_mode_as_it_was() -> None:
    model, data = captured().eval(), list(batches(12))
    before = loss_of(model, data)
    done = finetune(model, data, epochs=4, lr=0.05)
    assert model.mode == "eval" and done.steps == 48 and len(done.losses) == len(done.seconds) == 4
    assert done.losses[-1] < 0.7 * done.losses[0] and loss_of(model, data) < 0.7 * before


def test_a_module_is_trained_as_its_captured_model_is() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Linear(6, 5))
    data = list(batches(6))
    model = go.capture(net.eval(), (data[0][0],))
    model.own_tensors(go.capture(net, (data[0][0],)))
    ours, theirs = finetune(model, data, epochs=2), finetune(net, data, epochs=2)
    assert not net.training and ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    assert relative_error(model(data[0][0]), net(data[0][0])) < 1e-4


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path: Path, stop: int) -> None:
    through, broken = captured(), captured()
    torch.manual_seed(1)
    whole = finetune(through, Drawn(8), epochs=2, ema=0.9)
    torch.manual_seed(1)
    options = {"epochs": 2, "ema": 0.9, "checkpoint": tmp_path / "run", "every": 1}
    with pytest.raises(KeyboardInterrupt):
        finetune(broken, Drawn(8, fail_at=stop), **options)
    assert load_checkpoint(tmp_path / "run")["done"]["steps"] == stop
    again = captured()
    torch.manual_seed(77)
    done = finetune(again, Drawn(8), **options)
    assert done.losses == whole.losses and done.steps == 16 and equal(through, again)
    untouched = finetune(captured(), Drawn(8), **options)  # all is done already
    assert untouched.steps == 16 and untouched.losses == whole.losses


def test_a_sparse_optimizer_resumes_and_its_zeros_survive_the_mean_of_weights(tmp_path: Path) -> None:
    ends = []
    for stops in ((), (6,)):
        file = tmp_path / str(len(stops))
        for fail_at in (*stops, None):
            model = captured()
            optimizer = HESSO(model, lr=0.05, sparsity=0.4, steps=10, periods=2)
            torch.manual_seed(1)
            try:
                finetune(model, Drawn(14, fail_at), optimizer=optimizer, ema=0.9, checkpoint=file, every=1)
            except KeyboardInterrupt:
                continue
        ends.append(model)
        assert int(optimizer.zero.sum()) == optimizer.quota.goal > 0
        assert float(optimizer.units.norms()[optimizer.zero].max()) == 0.0
    assert equal(*ends)


def test_a_teacher_alone_is_enough() -> None:
    teacher, model = captured().eval(), captured("residual").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    x = next(batches(1))[0]
    before = relative_error(model(x), teacher(x))
    finetune(model, [(x, None) for x, _ in batches(15)], epochs=4, lr=0.02, teacher=teacher, distill=Distill(1.0))
    assert relative_error(model(x), teacher(x)) < 0.7 * before
    assert teacher.mode == "eval" and all(torch.equal(teacher.state_dict()[name], x) for name, x in state.items())


def test_inner_values_are_compared_through_maps_where_widths_differ() -> None:
    teacher = captured("residual").eval()
    small, _ = go.run(teacher, "prune-channels{macs=0.6}")
    add = next(node.name for node in teacher.graph.nodes if str(node.target).startswith("aten.add"))
    statistics = {name: x.clone() for name, x in small.state_dict().items() if "running" in name}
    with pytest.raises(UsageError, match="did you mean"):
        finetune(small, list(batches(2)), teacher=teacher, distill=Distill(inner=(add + "x",)))
    assert all(torch.equal(small.state_dict()[name], x) for name, x in statistics.items())
    data = list(batches(10))
    plain = Distill(logits=0.0, inner=(add,), inner_weight=5.0)
    done = finetune(small, data, epochs=5, lr=0.01, teacher=teacher, distill=plain)
    assert done.losses[-1] < 0.8 * done.losses[0] and small.mode == "eval"
    assert set(small.state_dict()) == set(teacher.state_dict())  # no map stays


def test_what_is_refused(tmp_path: Path) -> None:
    model, data = captured(), list(batches(2))
    for options, message in (
        ({"epochs": 0}, "at least 1"),
        ({"warmup": 1.0}, "warmup is 1"),
        ({"ema": 1.5}, "ema is 1.5"),
        ({"distill": Distill()}, "nobody to distil from"),
    ):
        with pytest.raises(UsageError, match=message):
            finetune(model, data, **options)
    with pytest.raises(UsageError, match="no data"):
        finetune(model, [])
    with pytest.raises(UsageError, match="no targets"):
        finetune(model, [(data[0][0], None)])
    with pytest.raises(UsageError, match="a pair"):
        finetune(model, [data[0][0]])
    with pytest.raises(UsageError, match="temperature is 0"):
        Distill(temperature=0)
    with pytest.raises(Diverged, match="the loss is nan at step 0"):
        finetune(model, [(x * torch.nan, y) for x, y in data])


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    data = list(batches(2))
    finetune(captured(), data, checkpoint=tmp_path / "run")
    with pytest.raises(LoadError, match="of another model"):
        finetune(captured("shuffle"), data, checkpoint=tmp_path / "run")
    with pytest.raises(LoadError, match="training of 2 steps, this one has 4"):
        finetune(captured(), data, epochs=2, checkpoint=tmp_path / "run")
    whole = (tmp_path / "run").read_bytes()
    saved = load_checkpoint(tmp_path / "run")
    del saved["schedule"]["lr_lambdas"]  # as an older version wrote it
    save_checkpoint(tmp_path / "older", saved)
    model = captured()
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    with pytest.raises(LoadError, match="written by another version"):
        finetune(model, data, checkpoint=tmp_path / "older")
    some = torch.optim.SGD(list(model.parameters())[:1], lr=0.1)
    with pytest.raises(LoadError, match="of another optimizer"):
        finetune(model, data, optimizer=some, checkpoint=tmp_path / "run")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.params.items())
    for damaged in (b"", b"no safetensors", whole[: len(whole) // 2]):
        (tmp_path / "run").write_bytes(damaged)
        with pytest.raises(LoadError, match="no checkpoint"):
            finetune(captured(), data, checkpoint=tmp_path / "run")


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    state = {"a": [1, 2.5, None, True], 3: ("x", {"t": torch.arange(3)}), "empty": {}, "scalar": torch.tensor(1.5)}
    save_checkpoint(tmp_path / "file", state)
    found = load_checkpoint(tmp_path / "file")
    assert torch.equal(found[3][1].pop("t"), state[3][1].pop("t")) and found.pop("scalar") == state.pop("scalar")
    assert found == state
    with pytest.raises(TypeError, match="a set"):
        save_checkpoint(tmp_path / "file", {"x": {1, 2}})
    assert load_checkpoint(tmp_path / "file")["a"] == [1, 2.5, None, True]  # the old file is whole
