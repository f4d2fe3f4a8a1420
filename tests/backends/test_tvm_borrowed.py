"""What was compiled is a model's weights at that time: training it later changes nothing, however they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.backends.tvm.borrowed import Borrowed
from tests.compare import relative_error


class Net(nn.Module):
    """Weights that are packed, looked up, reshaped, tied, too small to be taken out, and used as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.linear = nn.Linear(32, 32)
        self.depthwise = nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.rand(32) + 0.5)
        self.register_buffer("shift", torch.randn(1, 2, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.table(ids)) * self.scale + self.shift.view(32)
        return self.head(self.depthwise(x.transpose(1, 2)).transpose(1, 2))


def test_training_later_changes_nothing() -> None:
    torch.manual_seed(0)
    model = go.capture(Net().eval(), (torch.randint(50, (2, 7)),))
    ids = torch.randint(50, (2, 7))
    built = go.build(model, threads=1)
    with torch.no_grad():
        expected = model(ids)
        for tensor in model.state_dict().values():
            tensor.fill_(7.0)
        assert relative_error(model(ids), expected) > 0.1
    assert relative_error(built(ids), expected) < 1e-5


def test_constants_lie_in_the_models_memory_until_they_are_returned() -> None:
    borrowed, tensor = Borrowed(), torch.randn(32, 32)
    first, second = borrowed.constant(tensor), borrowed.constant(tensor)
    assert first.same_as(second), "tied tensors share one"
    tensor[0, 0] = 5
    assert first.value.numpy()[0, 0] == 5
    turned = borrowed.constant(tensor.T)  # not dense: a copy
    tensor[0, 0] = 6
    assert first.value.numpy()[0, 0] == 6 and turned.value.numpy()[0, 0] == 5
