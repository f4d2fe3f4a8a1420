"""Blocks that stay, each with its reason, and removals that go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import CheckFailed, GraphoptError
from graphopt.passes._blocks import find_blocks
from graphopt.rewriter import Rewriter
from tests.passes.apply import reasons
from tests.passes.residual import IMAGE, adding, batches, capture, failure, mlp, removed, resnet, shortened, worth


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("count=none", "it needs one budget"),
        ("count=1,macs=0.5", "it needs one budget"),
        ("count=0", "count is 0, it has to be at least 1"),
        ("count=5", "count is 5, and 4 blocks can go: blocks.0, blocks.1, blocks.2, blocks.3"),
        ("macs=1.5", "macs is 1.5, it has to be between 0 and 1"),
        ("params=0", "params is 0, it has to be between 0 and 1"),
        ("count=1,importance=size", "importance"),
        ("count=1,unit=head", "unit"),
    ],
)
def test_wrong_options(text: str, expected: str) -> None:
    assert expected in failure(capture(resnet()), text)


def test_data_and_mode_it_cannot_do_with() -> None:
    model = capture(resnet())
    assert "needs calibration data" in failure(model, "count=1", [])
    assert "evaluation mode" in failure(model.clone().train(), "count=1")
    assert "holds NaN" in failure(model, "count=1", [[torch.full(IMAGE, torch.nan)]])
    assert "zero or not finite" in failure(model, "count=1", [[torch.full(IMAGE, 1e38)]])
    for parameter in model.parameters():
        parameter.data.zero_()
    assert "zero or not finite" in failure(model, "count=1")


def test_a_block_whose_worth_cannot_be_told_stays() -> None:
    class Guarded(nn.Module):
        """Divides by what a block makes; the other one is harmless."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = adding(2.0), mlp(1)

        def forward(self, x: Tensor) -> Tensor:
            return 1 / (self.b(self.a(x * 0)) - self.b(x * 0))

    model = capture(Guarded(), (2, 1))
    _, report = shortened(model, "count=1", [[torch.ones(4, 1)]])
    assert (
        any("the outputs are not finite" in reason for reason in reasons(report)) and "a" not in removed(report)[0][:2]
    )


class Attention(nn.Module):
    """Attention and an MLP; the mask, if one is given, is an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.mlp = mlp()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(mask[:, None], -1e9)
        return self.mlp(x + self.out(scores.softmax(-1) @ self.v(x)))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(6, 6), nn.ModuleList([Attention(), Attention()]), nn.Linear(6, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def test_attention_by_hand_is_attention() -> None:
    model = go.capture(Stacked().eval(), (torch.randn(2, 5, 6),))
    assert [block.name for block in find_blocks(Rewriter(model), "layer")] == ["layers.0", "layers.1"]


def test_attention_under_a_mask_stays_and_its_mlp_with_it() -> None:
    inputs = (torch.randn(2, 5, 6), torch.zeros(2, 5, dtype=torch.bool))
    model = go.capture(Stacked().eval(), inputs)
    text = failure(model, "count=1", [inputs])
    assert "0 blocks can go" in text and "it reads 'mask', which does not come from what it is added to" in text
    _, report = shortened(model, "count=1,unit=branch", [inputs])
    assert list(worth(report)) == ["layers.0.mlp.layers", "layers.1.mlp.layers"]
    assert len(report.misses) == 2
    rw = Rewriter(model)
    assert find_blocks(rw, "layer") == []
    assert sum("takes both or neither" in miss.reason for miss in rw.misses) == 2


STAYS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "used elsewhere": (lambda m, x: (h := m.a(x)) * (x + m.b(h)), "is also used by"),
    "random": (lambda m, x: x + m.a(x + torch.rand(6)), "draws random numbers"),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_is_no_block(case: str) -> None:
    join, reason = STAYS[case]

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.stem, self.head = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(join(self, torch.relu(self.stem(x)))))

    text = failure(capture(Joined(), (2, 6)), "count=1", batches((2, 6)))
    assert "0 blocks can go" in text and reason in text


def test_no_output_becomes_an_input_and_something_is_left() -> None:
    one = capture(mlp(), (2, 6))
    assert "without it an output would be the input 'x'" in failure(one, "count=1", batches((2, 6)))
    two = capture(nn.Sequential(mlp(), mlp()), (2, 6))
    _, report = shortened(two, "count=1", batches((2, 6)))
    assert len(removed(report)) == 1
    assert "count=2 cannot be met: 1 blocks can go" in failure(two, "count=2", batches((2, 6)))
    bare = capture(nn.Sequential(nn.Tanh(), mlp(), nn.Tanh()), (2, 6))
    assert "cannot be met: 0 blocks can go" in failure(bare, "count=1", batches((2, 6)))


def test_a_wrong_removal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none: let the branch stand for the sum."""
    from graphopt.passes import remove_layers

    def wrong(rw: Rewriter, gone: Sequence[object]) -> None:
        add = next(node for node in rw.graph.nodes if node.name == gone[0].add.name)  # type: ignore[attr-defined]
        rw.replace(add, add.args[gone[0].operand], "a mistake")  # type: ignore[attr-defined]
        rw.model.touch()

    monkeypatch.setattr(remove_layers, "erase", wrong)
    with pytest.raises(GraphoptError) as caught:
        go.run(capture(resnet()), "remove-layers{count=1}", calib=batches())
    assert "of the largest reference output" in str(caught.value)
    assert isinstance(caught.value.__cause__ or caught.value, CheckFailed | GraphoptError)
