"""Convolutions of one value side by side become one wider convolution, or stay with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.measure import LatencyTable
from tests import zoo
from tests.passes.apply import Net, apply, errors_at, gradients, operators, reasons
from tests.passes.branched import conv_norm, trained

PASS = "merge-parallel-conv"
BATCH = {0: {0: "batch"}}


def images(size: int = 2, channels: int = 6) -> tuple[Tensor]:
    return (torch.randn(size, channels, 9, 7, generator=torch.Generator().manual_seed(size)),)


class Three(nn.Module):
    """1x1 convolutions `a`, `b` and `c` of 8, 4 and 6 channels, and a 3x3 one, `d`; forward is the given function."""

    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(6, width, 1) for width in (8, 4, 6))
        self.d = nn.Conv2d(6, 4, 3, padding=1)
        self.function = forward

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def merged(net: nn.Module, pipeline: str = PASS) -> tuple[go.Model, go.transform.Report]:
    """The model after the pass: equal to the net at two batch sizes, trainable, and left alone by a second run."""
    net = net.eval()
    _, after, report = apply(net, images(), pipeline, dynamic=BATCH)
    assert errors_at(net, after, images(2), images(3)) <= 1e-6
    found = {name: grad for name, grad in gradients(after, images()).items() if name not in after.kept}
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found.values())
    again, reports = go.run(after, pipeline)
    assert not reports[-1].edits and str(again) == str(after)
    return after, report


def kept(net: nn.Module, *expected: str) -> None:
    before, after, report = apply(net.eval(), images(), PASS)
    assert not report.edits and str(after) == str(before)
    assert len(report.misses) == len(expected), report.misses
    for reason, text in zip(reasons(report), expected, strict=True):
        assert text in reason


def test_a_concatenation_of_all_is_the_wider_convolution() -> None:
    after, report = merged(Three(lambda net, x: torch.cat([net.b(x), net.a(x), net.c(x)], 1)))
    assert operators(after) == ["conv2d"] and len(report.edits) == 1
    assert {name: tuple(t.shape) for name, t in after.state_dict().items() if name not in after.kept} == {
        "b_a_c.weight": (18, 6, 1, 1),
        "b_a_c.bias": (18,),
    }


def test_activations_are_computed_once_and_before_the_concatenation() -> None:
    after, _ = merged(Three(lambda net, x: torch.cat([F.silu(net.a(x)), x, F.silu(net.b(x)), F.silu(net.c(x))], -3)))
    assert operators(after).count("conv2d") == 1 and operators(after)[:2] == ["conv2d", "silu"]
    after, _ = merged(Three(lambda net, x: torch.cat([x, F.silu(net.a(x)), F.silu(net.b(x))], -3)))
    assert operators(after) == ["conv2d", "silu", "cat"]


def test_outputs_that_go_separate_ways_are_split() -> None:
    def apart(net: nn.Module, x: Tensor) -> Tensor:
        a, b, c = net.a(x).relu(), net.b(x).relu(), net.c(x).relu()
        return torch.cat([a, b.cumsum(2), c.flip(3)], 1)

    after, report = merged(Three(apart))
    assert operators(after)[:3] == ["conv2d", "relu", "split_with_sizes"] and len(report.edits) == 3


def test_batch_norms_and_multiplications_go_with_their_layer() -> None:
    net = trained(
        lambda: Net(
            lambda net, x: torch.cat([net.a(x).relu(), (net.b(x) * 2).relu()], 1),
            a=conv_norm(6, 4, 1),
            b=conv_norm(6, 8, 1),
        ),
        (6, 9, 7),
    )
    after, _ = merged(net)
    assert operators(after) == ["conv2d", "relu"]


def test_paths_of_heads_are_views_of_the_pieces() -> None:
    """1x1 queries, keys and values, as attention over images has them."""

    def attend(net: nn.Module, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], -1, 63) for layer in (net.a, net.b, net.c))
        return q.sum(1) * k.sum(1) + v.sum(1)

    after, report = merged(Three(attend))
    assert operators(after).count("conv2d") == 1 and not report.misses


def test_a_wider_kernel_is_merged_only_where_it_is_measured_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fire module: 1x1 beside 3x3. Padded to 3x3 the first takes nine times as many products."""
    fire = Three(lambda net, x: torch.cat([net.a(x).relu(), net.d(x).relu()], 1))
    kept(fire, "merging is exact, but takes 81,648 instead of 33,264 multiply-accumulates")
    monkeypatch.setattr(LatencyTable, "seconds", lambda table, node: 1e-6)
    after, _ = merged(fire, "merge-parallel-conv{target=cpu,threads=1}")
    assert operators(after) == ["conv2d", "relu"] and after.params["a_d.weight"].shape == (12, 6, 3, 3)


def test_a_split_counts_where_time_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Three(lambda net, x: net.a(x).relu().sum(1) + net.b(x).relu().sum(1))
    split = lambda table, node: 5e-6 if "split" in str(node.target) else 1e-6  # noqa: E731
    monkeypatch.setattr(LatencyTable, "seconds", split)
    _, _, report = apply(net.eval(), images(), "merge-parallel-conv{target=cpu,threads=1}")
    assert not report.edits and "takes 6.0 instead of 2.0 microseconds on cpu" in reasons(report)[0]


def test_a_real_fire_module_is_decided_by_measurement(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    fire = Three(lambda net, x: torch.cat([net.a(x).relu(), net.d(x).relu()], 1))
    _, after, report = apply(fire.eval(), images(), "merge-parallel-conv{target=cpu,threads=1}")
    assert errors_at(fire, after, images()) <= 1e-6 and len(report.edits) + len(report.misses) == 1


# Left alone


def test_outputs_of_the_model_and_of_unknown_operators_stay_in_one_piece() -> None:
    kept(
        Three(lambda net, x: (net.a(x), net.b(x).relu(), net.c(x).view(2, -1))),
        "it is an output of the model",
        "it is an output of the model",
        "it is an output of the model",
    )
    kept(
        Three(lambda net, x: torch.special.spherical_bessel_j0(net.a(x)) + net.b(x).relu().sum()),
        "is unknown and may need it without gaps",
    )


def test_other_activations_strides_and_kinds_stay() -> None:
    kept(Three(lambda net, x: net.a(x).relu().sum() + net.b(x).tanh().sum()), "another activation follows")
    strided = Net(
        lambda net, x: net.a(x).relu().sum() + net.b(x).relu().sum(),
        a=nn.Conv2d(6, 4, 1),
        b=nn.Conv2d(6, 4, 1, stride=2),
    )
    kept(strided, "their strides differ: [1, 1], [2, 2]")
    frozen = Three(lambda net, x: net.a(x).relu().sum() + net.b(x).relu().sum())
    frozen.b.requires_grad_(False)
    kept(frozen, "the requires_grad of the weight of 'conv2d_1' is False, not True")
    grouped = Net(
        lambda net, x: net.a(x).relu().sum() + net.b(x).relu().sum(),
        a=nn.Conv2d(6, 6, 3, groups=6),
        b=nn.Conv2d(6, 6, 3, groups=6),
    )
    kept(grouped, "merging is exact, but takes 45,360 instead of 7,560 multiply-accumulates")


def test_shared_weights_and_transposed_convolutions_are_left_out_and_the_others_are_merged() -> None:
    def shared(net: nn.Module, x: Tensor) -> Tensor:
        return net.a(x).relu().sum() + net.b(x).relu().sum() + net.c(x).relu().sum() + net.a(x * 2).sum()

    after, report = merged(Three(shared))
    assert "b_c.weight" in after.state_dict() and "'a.weight' is also used by" in reasons(report)[0]
    up = Net(
        lambda net, x: net.a(x).relu().sum() + net.b(x).relu().sum(),
        a=nn.Conv2d(6, 4, 1),
        b=nn.ConvTranspose2d(6, 4, 1),
    )
    kept(up, "'conv_transpose2d' is a transposed convolution")


def test_one_percent_on_one_weight_would_be_noticed() -> None:
    net = Three(lambda net, x: torch.cat([net.b(x), net.a(x)], 1)).eval()
    _, after, _ = apply(net, images(), PASS)
    weight = after.params["b_a.weight"].detach().clone()
    weight.view(-1)[weight.abs().argmax()] *= 1.01
    after.params.set("b_a.weight", weight)
    assert errors_at(net, after, images()) > 1e-5


# Known nets


@pytest.mark.parametrize(("name", "layers"), [("inception_v3", 29), ("squeezenet1_1", 0), ("googlenet", 27)])
def test_known_nets_merge_their_1x1_and_keep_what_would_cost_more(name: str, layers: int) -> None:
    """In float64: inception_v3 with random weights amplifies the rounding of float32 a thousandfold."""
    net = zoo.build(name)
    module = net.module.double()
    args = [tuple(x.double() for x in net.args(batch, batch)) for batch in (2, 3)]
    folded, _ = go.run(go.capture(module, args[0], dynamic=net.dynamic), "exact")
    after, (report,) = go.run(folded, PASS)
    splits = operators(after).count("split_with_sizes")
    assert len(report.edits) == layers
    assert operators(folded).count("conv2d") - operators(after).count("conv2d") == layers - splits
    assert errors_at(module, after, *args) <= 1e-10
    dearer = sum("merging is exact, but takes" in reason for reason in reasons(report))
    assert dearer == {"inception_v3": 4, "squeezenet1_1": 8, "googlenet": 0}[name]
