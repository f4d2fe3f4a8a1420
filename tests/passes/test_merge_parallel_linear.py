"""Linear layers that read one value become one, whatever reads their outputs, or stay with a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import UsageError
from tests import tiny
from tests.passes.apply import apply, errors_at, gradients, operators, reasons

PASS = "merge-parallel-linear"
BATCH = {0: {0: "batch"}}


class Parallel(nn.Module):
    """Layers `a`, `b` and `c` of widths 8, 4 and 6 on one input; forward is the given function."""

    def __init__(self, forward: Callable[..., Tensor], bias: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.function = forward
        self.a, self.b, self.c = (nn.Linear(6, n, bias=has) for n, has in zip((8, 4, 6), bias, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def summed(net: nn.Module, x: Tensor) -> Tensor:
    return net.a(x).relu().sum(-1) + net.b(x).tanh().sum(-1) * net.c(x).sigmoid().sum(-1)


def batch(size: int = 2, *middle: int) -> tuple[Tensor]:
    return (torch.randn(size, *middle, 6, generator=torch.Generator().manual_seed(size)),)


def merged(net: nn.Module, *middle: int) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, trainable, and left alone by a second run."""
    net = net.eval()
    _, after, report = apply(net, batch(2, *middle), PASS, dynamic=BATCH)
    assert errors_at(net, after, batch(2, *middle), batch(3, *middle)) <= 1e-6
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in gradients(after, batch(2, *middle)).values())
    again, reports = go.run(after, PASS)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


def test_three_layers_become_one() -> None:
    after, report = merged(Parallel(summed), 5)
    assert operators(after)[:2] == ["linear", "split_with_sizes"] and operators(after).count("linear") == 1
    assert len(report.edits) == 3 and not report.misses
    shapes = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    assert shapes == {"a_b_c.weight": (18, 6), "a_b_c.bias": (18,)}


def test_gradients_are_those_of_the_separate_layers() -> None:
    net = Parallel(summed).eval()
    before, after, _ = apply(net, batch(), PASS)
    separate, joined = gradients(before, batch()), gradients(after, batch())
    for part in ("weight", "bias"):
        expected = torch.cat([separate[f"{name}.{part}"] for name in "abc"])
        assert torch.allclose(joined[f"a_b_c.{part}"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "grouped_query"])
def test_query_key_and_value_become_one(name: str) -> None:
    net = tiny.build(name)
    _, after, report = apply(net.module, net.args(2), PASS, dynamic=net.dynamic)
    assert len(report.edits) == 3 and "query_key_value.weight" in after.state_dict()
    assert errors_at(net.module, after, net.args(2), net.args(3)) <= 1e-6


def test_keys_and_values_of_another_input_are_merged_without_the_query() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory))

    net, inputs = Cross().eval(), (torch.randn(2, 3, 6), torch.randn(2, 5, 6))
    _, after, report = apply(net, inputs, PASS)
    assert set(after.state_dict()) == {"q.weight", "q.bias", "k_v.weight", "k_v.bias"} and len(report.edits) == 2
    assert errors_at(net, after, inputs) <= 1e-6


def test_no_biases_stay_none_and_a_missing_one_is_zero() -> None:
    after, _ = merged(Parallel(summed, (False, False, False)))
    assert set(after.state_dict()) == {"a_b_c.weight"}
    after, _ = merged(Parallel(summed, (True, False, True)))
    assert bool((after.state_dict()["a_b_c.bias"][8:12] == 0).all())


def test_names_keep_what_the_layers_have_in_common() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({name: nn.Linear(6, 4) for name in ("q_proj", "k_proj", "v_proj")})
            self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            y = sum(layer(x).relu() for layer in self.attn.values())
            return sum(layer(y).relu() for layer in self.more)

    after, _ = merged(Block())
    assert set(after.state_dict()) == {
        "attn.q_proj_k_proj_v_proj.weight", "attn.q_proj_k_proj_v_proj.bias", "more.0_to_5.weight", "more.0_to_5.bias"
    }  # fmt: skip


def test_views_of_the_pieces_still_work() -> None:
    def heads(net: nn.Module, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        split = net.a(x).view(n, length, 2, 4).transpose(1, 2).sum((1, 2)).sum(-1)
        flat = net.b(x).view(n * length, 4).relu().view(n, -1).sum(-1)
        joined = net.c(x).view(n, length * 6).relu().sum(-1)
        return split + flat + joined

    after, report = merged(Parallel(heads), 5)
    assert operators(after).count("linear") == 1 and not report.misses
    assert operators(after).count("reshape") == 1  # of the channels with another axis, which has to copy


def without_merge(net: nn.Module, *expected: str) -> None:
    """Nothing is merged, for the given reasons."""
    before, after, report = apply(net.eval(), batch(), PASS)
    assert not report.edits and str(after) == str(before)
    assert len(report.misses) == len(expected), report.misses
    for reason, text in zip(reasons(report), expected, strict=True):
        assert text in reason


def test_layers_of_different_inputs_stay() -> None:
    without_merge(Parallel(lambda net, x: net.a(x).sum(-1) + net.b(x * 2).sum(-1) + net.c(x + 1).sum(-1)))


def test_outputs_of_the_model_stay_in_one_piece() -> None:
    without_merge(
        Parallel(lambda net, x: (net.a(x), net.b(x).view(-1, 2, 2), net.c(x).relu())),
        "it is an output of the model",
        "it is an output of the model",
    )


def test_a_shared_or_tied_layer_is_left_out_and_the_others_are_merged() -> None:
    def shared(net: nn.Module, x: Tensor) -> Tensor:
        return summed(net, x) + net.a(x + 1).sum(-1)

    after, report = merged(Parallel(shared))
    assert "b_c.weight" in after.state_dict() and "a.weight" in after.state_dict()
    assert reasons(report) == ["'a.weight' is also used by 'linear_3'"]


def test_a_computed_weight_is_left_out() -> None:
    def computed(net: nn.Module, x: Tensor) -> Tensor:
        return summed(net, x) + F.linear(x, net.b.weight * 2).sum(-1)

    net = Parallel(computed)
    _, after, report = apply(net.eval(), batch(), PASS)
    assert "the weight of 'linear_3' is computed" in reasons(report) and "a_c.weight" in after.state_dict()
    assert errors_at(net, after, batch()) <= 1e-6


def test_frozen_and_trained_layers_are_not_mixed() -> None:
    net = Parallel(summed)
    net.b.requires_grad_(False)
    after, report = merged_without_gradients(net)
    assert "a_c.weight" in after.state_dict() and "requires_grad is False" in reasons(report)[0]
    after, _ = merged_without_gradients(Parallel(summed).requires_grad_(False))
    assert {p.requires_grad for p in after.parameters()} == {False}


def merged_without_gradients(net: nn.Module) -> tuple[go.Model, go.transform.Report]:
    _, after, report = apply(net.eval(), batch(), PASS)
    assert errors_at(net, after, batch()) <= 1e-6
    return after, report


def test_masks_and_precision_travel() -> None:
    model = go.capture(Parallel(summed).eval(), batch())
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1] = True
    model.params.set("b.weight", model.params["b.weight"].detach().masked_fill(mask, 0))
    model.params.masks["b.weight"] = mask
    for name in "abc":
        model.params.precision[f"{name}.weight"] = "bfloat16"
    after, _ = go.run(model, PASS)
    assert torch.equal(after.params.masks["a_b_c.weight"].nonzero()[:, 0].unique(), torch.tensor([9]))
    assert after.params.precision == {"a_b_c.weight": "bfloat16"} and set(after.params.masks) == {"a_b_c.weight"}
    model.params.precision["a.weight"] = "float16"
    after, (report,) = go.run(model, PASS)
    assert "b_c.weight" not in after.state_dict() and "precision is bfloat16" in reasons(report)[0]


def test_min_count_leaves_smaller_groups_alone() -> None:
    net = Parallel(summed).eval()
    _, _, report = apply(net, batch(), "merge-parallel-linear{min-count=4}")
    assert not report.edits
    _, _, report = apply(net, batch(), "merge-parallel-linear{min-count=3}")
    assert len(report.edits) == 3
    with pytest.raises(UsageError, match="min-count"):
        apply(net, batch(), "merge-parallel-linear{min-count=1}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    net, inputs = Parallel(summed).to(dtype).eval(), (batch()[0].to(dtype),)
    _, after, report = apply(net, inputs, PASS)
    assert len(report.edits) == 3 and {t.dtype for t in after.state_dict().values()} == {dtype}
    assert errors_at(net, after, inputs) <= (1e-12 if dtype is torch.float64 else 2e-2)


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = Parallel(summed).eval()
    _, after, _ = apply(net, batch(), PASS)
    weight = after.params["a_b_c.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("a_b_c.weight", weight)
    assert errors_at(net, after, batch()) > 1e-5


def test_weights_that_are_stored_transposed_are_turned() -> None:
    def turned(net: nn.Module, x: Tensor) -> Tensor:
        b = F.linear(x, net.b.weight.t(), net.b.bias)
        return net.a(x).relu().sum(-1) + b.tanh().sum(-1) + net.c(x).sigmoid().sum(-1)

    net = Parallel(turned)
    net.b.weight = nn.Parameter(torch.randn(6, 4))
    _, after, report = apply(net.eval(), batch(), PASS)
    assert len(report.edits) == 3 and not report.misses and operators(after).count("linear") == 1
    assert errors_at(net, after, batch()) <= 1e-6
