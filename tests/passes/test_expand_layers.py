"""Deeper models that compute the same: where layers come, what is zero, and what has no place for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import GraphoptError
from tests.compare import relative_error
from tests.passes.apply import gradients, reasons
from tests.passes.expand_nets import NETS, Gpt, GptLayer, tokens


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Callable[..., Tensor], go.Model]:
    torch.manual_seed(0)
    make, inputs = NETS[name]
    net = make().to(dtype).eval()
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)

    def args(batch: int, seed: int = 0) -> Tensor:
        x = inputs(batch, seed)
        return x.to(dtype) if x.is_floating_point() else x

    return net, args, go.capture(net, (args(2),), dynamic={0: {0: "batch"}})


def same(net: nn.Module, model: go.Model, args: Callable[..., Tensor], limit: float) -> None:
    for batch in (2, 3):
        with torch.no_grad():
            assert relative_error(model(args(batch, 5)), net(args(batch, 5))) <= limit


def names(model: go.Model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", NETS)
def test_a_layer_behind_the_last(name: str) -> None:
    net, args, model = built(name)
    deep, (report,) = go.run(model, "expand-layers")
    assert report.findings["added"] == [{"behind": "layers.1", "name": "layers.2"}]
    same(net, deep, args, 1e-12)
    new = {key: p for key, p in deep.named_parameters() if key.startswith("layers.2.")}
    assert {key.replace(".2.", ".1.") for key in new} == {key for key in names(model) if key.startswith("layers.1.")}
    zeros = {key for key, p in new.items() if not p.any()}
    assert zeros == {key for key in new if key.split(".")[2] in ("out", "down")}
    for key, parameter in new.items():  # vectors are copies, weights are not, and nothing is shared
        old = model.params[key.replace(".2.", ".1.")]
        assert key in zeros or torch.equal(parameter, old) == (parameter.dim() == 1)
    calls = [len([node for node in m.graph.nodes if node.op == "call_function"]) for m in (model, deep)]
    assert calls[0] < calls[1] <= 1.6 * calls[0]


@pytest.mark.parametrize("name", NETS)
def test_removal_gives_the_model_back(name: str) -> None:
    net, args, model = built(name)
    deep, _ = go.run(model, "expand-layers{by=2,only=layers.0}")
    assert {key.split(".")[1] for key in names(deep) if key.startswith("layers.")} == {"0", "1", "2", "3"}
    back, _ = go.run(deep, "remove-layers{count=2,only=layers.2;layers.3}", calib=[[args(2)]])
    assert names(back) == names(model)
    assert all(torch.equal(back.params[key], model.params[key]) for key in names(model))
    same(net, back, args, 1e-12)


def test_in_single_precision_and_twice() -> None:
    net, args, model = built("gpt", torch.float32)
    deep, reports = go.run(model, "expand-layers,expand-layers{by=2},expand-mlp{by=1},expand-heads{by=1}")
    assert [row["name"] for report in reports[:2] for row in report.findings["added"]] == [
        "layers.2",
        "layers.3",
        "layers.4",
    ]
    assert len(reports[2].findings["groups"]) == len(reports[3].findings["groups"]) == 5
    same(net, deep, args, 1e-6)


def test_where_none_comes() -> None:
    _, _, model = built("gpt")
    _, (report,) = go.run(model, "expand-layers{leave=layers.1}")
    assert report.findings["added"] == [{"behind": "layers.0", "name": "layers.2"}]


@torch.no_grad()
def test_seed_and_init() -> None:
    _, _, model = built("vit")
    texts = ("expand-layers", "expand-layers{seed=0}", "expand-layers{seed=1}", "expand-layers{init=copy}")
    rows = [go.run(model, text)[0].params["layers.2.qkv.weight"] for text in texts]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[3], model.params["layers.1.qkv.weight"])
    assert float(rows[0].std() / rows[3].std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("name", NETS)
def test_training_reaches_all_that_is_new(name: str) -> None:
    _, args, model = built(name)
    deep, _ = go.run(model, "expand-layers")
    new = {key: p for key, p in deep.named_parameters() if key.startswith("layers.2.")}
    reached: set[str] = set()
    for step in range(3):
        found = gradients(deep, [args(2)])
        reached |= {key for key in new if (found[key] != 0).any()}
        if step == 0:
            assert reached == {key for key in new if key.split(".")[2] in ("out", "down")}
        with torch.no_grad():
            for parameter in deep.parameters():
                parameter -= 1e-2 * parameter.grad
    assert reached == set(new)


class Block(nn.Module):
    """x + f(x), or something near it."""

    def __init__(self, *layers: nn.Module, after: nn.Module | None = None, beside: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.after, self.beside = nn.Sequential(*layers), after, beside

    def forward(self, x: Tensor) -> Tensor:
        y = (x if self.beside is None else self.beside(x)) + self.inner(x)
        return y if self.after is None else self.after(y)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def around(*blocks: nn.Module, mode: str = "eval") -> tuple[nn.Module, go.Model]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 3)).train(mode == "train")
    return net, go.capture(net, (torch.randn(3, 4),))


@pytest.mark.parametrize(
    "block",
    [
        Block(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Dropout(0.1), Scaled()),
        Block(nn.Linear(6, 6), nn.BatchNorm1d(6)),
        Block(nn.Linear(6, 6), nn.LayerNorm(6)),
        Block(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6, bias=False), nn.ReLU()),
    ],
    ids=["scaled", "batch norm", "layer norm", "relu"],
)
def test_ends_that_can_be_zero(block: nn.Module) -> None:
    net, model = around(block)
    deep, (report,) = go.run(model, "expand-layers")
    assert [row["behind"] for row in report.findings["added"]] and len(names(deep)) > len(names(model))
    x = torch.randn(3, 4)
    assert relative_error(deep(x), net(x)) <= 1e-6


@pytest.mark.parametrize(
    ("block", "mode", "reason"),
    [
        (Block(nn.Linear(6, 6), nn.Sigmoid()), "eval", "does not end with a layer"),
        (Block(nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False)), "eval", "does not end with a layer"),
        (Block(nn.Linear(6, 6), beside=nn.Linear(6, 6)), "eval", "is not added to the value that it starts from"),
        (Block(nn.Linear(6, 6), nn.Dropout(0.1), nn.Linear(6, 6)), "train", "draws random numbers"),
        (Block(nn.Linear(6, 6), nn.Dropout(0.1)), "train", "draws random numbers"),
    ],
    ids=["sigmoid", "norm without weights", "projection", "dropout", "dropout last"],
)
def test_what_has_no_place_for_a_layer(block: nn.Module, mode: str, reason: str) -> None:
    _, model = around(block, mode=mode)
    deep, (report,) = go.run(model, "expand-layers")
    assert not report.changed and names(deep) == names(model)
    assert any(reason in found for found in reasons(report)), reasons(report)


class PostNorm(GptLayer):
    """Norms behind the sums."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (part.view(n, length, 3, 4).transpose(1, 2) for part in self.qkv(x).split(12, 2))
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = self.norm0(x + self.out(mixed.transpose(1, 2).reshape(n, length, 12)))
        return self.norm1(x + self.down(torch.relu(self.up(x))))


def test_norms_behind_the_sums() -> None:
    net = Gpt().eval()
    net.layers = nn.ModuleList(PostNorm(12, 3, 10).eval() for _ in range(2))
    _, (report,) = go.run(go.capture(net, (tokens(2),)), "expand-layers")
    assert not report.changed and any("something stands between its branches" in why for why in reasons(report))


@pytest.mark.parametrize(
    ("text", "message"),
    [("expand-layers{by=0}", "by is 0"), ("expand-layers{only=layer.7}", "no block is called 'layer.7'")],
)
def test_wrong_options(text: str, message: str) -> None:
    _, _, model = built("gpt")
    with pytest.raises(GraphoptError, match=message):
        go.run(model, text)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans())
def test_any_depth(heads: int, size: int, layers: int, by: int, all_of_them: bool) -> None:
    torch.manual_seed(heads)
    net = Gpt(heads * size, heads, 5, layers=layers).double().eval()
    model = go.capture(net, (tokens(2),), dynamic={0: {0: "batch"}})
    only = ";".join(f"layers.{i}" for i in range(layers)) if all_of_them else f"layers.{layers - 1}"
    deep, (report,) = go.run(model, f"expand-layers{{by={by},only={only}}}")
    assert len(report.findings["added"]) == by * (layers if all_of_them else 1)
    assert len({row["name"] for row in report.findings["added"]}) == len(report.findings["added"])
    same(net, deep, tokens, 1e-12)
