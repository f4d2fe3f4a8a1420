"""Pruned models back in the modules they came from: what follows, what is refused, and that nothing is half done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.errors import CheckFailed, GraphoptError, UnsupportedError, UsageError
from tests import zoo  # lets torchvision be imported
from tests.compare import relative_error
from tests.coupling import nets as coupled
from tests.surgery import nets

torchvision = pytest.importorskip("torchvision")
HALF = "prune-channels{macs=0.5}"


def lively(net: nn.Module) -> nn.Module:
    """Statistics and scales that matter."""
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name.endswith(("running_var", "norm.weight", "norm.bias")):
            tensor.data.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.data.normal_()
    return net.eval()


@cache
def _captured(make: Callable[..., nn.Module], *args: Any) -> tuple[nn.Module, go.Model]:
    net = lively(make(*args))
    return net, go.capture(net, nets.inputs(net), dynamic={0: {0: "batch"}})


@cache
def _pruned(pipeline: str, *made: Any) -> go.Model:
    return go.run(_captured(*made)[1], pipeline)[0]


def pruned(pipeline: str, *made: Any) -> tuple[nn.Module, go.Model]:
    """A fresh net of a kind, and what a pipeline has made of it; every net of a kind has the same weights."""
    return copy.deepcopy(_captured(*made)[0]), _pruned(pipeline, *made).clone()


def state(net: nn.Module) -> dict[str, Any]:
    """Everything in a module that a write-back may touch, by value and by identity."""
    found: dict[str, Any] = {}
    for path, part in net.named_modules(remove_duplicate=False):
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
            if isinstance(value, Tensor):
                found[f"{path}.{name}"] = (id(value), value.clone(), value.requires_grad)
            elif isinstance(value, bool | int | float | str | tuple | list):
                found[f"{path}.{name}"] = value
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, tuple) and len(x) == 3 and isinstance(x[1], Tensor):
            return x[0] == y[0] and torch.equal(x[1], y[1]) and x[2] == y[2]
        return x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def assert_back(
    model: go.Model, net: nn.Module, make: Callable[[int], tuple[Tensor, ...]], recapture: bool = False
) -> list[str]:
    """Write back, and compare at two batch sizes, capture again, and train a step; returns the changes as text."""
    changes = go.write_back(model, net)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert shapes == {name: model.params[name].shape for name in shapes}
    with torch.no_grad():
        for batch in (2, 5):
            args = make(batch)
            assert relative_error(net(*args), model(*args)) <= 1e-5
        again = go.capture(net, args) if recapture else model
        assert relative_error(again(*args), model(*args)) <= 1e-5
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    output = net(*args)
    tensor = output if isinstance(output, Tensor) else next(v for v in output.values() if isinstance(v, Tensor))
    tensor.square().sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert all(p.grad is None or p.grad.shape == p.shape for p in net.parameters())
    return [str(change) for change in changes]


def assert_refused(model: go.Model, net: nn.Module, kind: type[GraphoptError] = UnsupportedError) -> str:
    before, weights = state(net), copy.deepcopy(net.state_dict())
    with pytest.raises(kind) as caught:
        go.write_back(model, net)
    assert same(before, state(net)), "the module was changed"
    assert all(torch.equal(a, b) for a, b in zip(weights.values(), net.state_dict().values(), strict=True))
    return str(caught.value)


# What follows


def test_convolutions_norms_and_a_number_of_the_module() -> None:
    net, small = pruned("prune-channels{macs=0.5,most=0.5}", nets.Images)
    changes = assert_back(small, net, lambda n: nets.inputs(net, n), recapture=True)
    assert net.mid.groups == net.mid.in_channels == net.mid.out_channels == net.up.out_channels < 12
    assert net.norm.num_features == net.stem.out_channels == net.norm.running_mean.shape[0] < 8
    assert net.group_norm.num_groups == net.groups.groups < 4
    assert net.features == net.head.in_features == 16 * net.groups.out_channels
    assert f"features: 128 -> {net.features}" in changes


@pytest.mark.parametrize(("fused", "scale"), [(False, "default"), (True, "default"), (False, "kept")])
@pytest.mark.parametrize("part", ["heads", "features"])
def test_heads_and_features_of_heads(part: str, fused: bool, scale: str) -> None:
    indices = "0;1;2;3" if part == "heads" else "0;1;4;5;8;9;12;13"
    layers = ["qkv"] if fused else ["q", "v"]
    steps = [f"remove-channels{{layer=blocks.{i}.{layer},indices={indices}}}" for i in (0, 1) for layer in layers]
    net, small = pruned(",".join(steps), nets.Tokens, fused, scale)
    changes = assert_back(small, net, lambda n: nets.inputs(net, n), recapture=True)
    sizes = {(block.num_heads, block.head_dim) for block in net.blocks}
    assert all(heads < 4 and dim == 4 if part == "heads" else heads == 4 and dim < 4 for heads, dim in sizes)
    scaled = [row for row in changes if "queries times" in row]
    assert bool(scaled) == (part == "features" and scale == "default")
    assert [str(change) for change in go.write_back(small, net.eval()) if not change.note] == []  # and once more
    args = nets.inputs(net)
    assert relative_error(net(*args), small(*args)) <= 1e-5


def test_ties_stay_and_objects_that_keep_their_shape_too() -> None:
    net, small = pruned("prune-channels{params=0.6,only=head}", nets.Tokens, False, "default")
    net.mlp[2].bias.requires_grad_(False)
    hooked: list[int] = []
    net.mlp.register_forward_hook(lambda *_: hooked.append(1))
    objects = dict(net.named_parameters())
    go.write_back(small, net)
    assert net.head.weight is net.embed.weight and net.embed.weight.shape[0] == 11 and net.embed.embedding_dim < 16
    for name, parameter in net.named_parameters():
        assert (parameter is objects[name]) == (parameter.shape == objects[name].shape)
        assert parameter.requires_grad == objects[name].requires_grad
    hooked.clear()
    net(*nets.inputs(net))
    assert hooked == [1]


def test_buffers_of_both_kinds() -> None:
    net, small = pruned(HALF, nets.Normed, False)
    go.write_back(small, net)
    assert net.shift.shape == net.ramp.shape == (net.first.out_features,) and net.first.out_features < 8
    assert "ramp" not in net.state_dict() and "shift" in net.state_dict()
    args = nets.inputs(net)
    assert relative_error(net(*args), small(*args)) <= 1e-5


def test_values_alone_go_back_in_place() -> None:
    net, model = pruned("dead-code", nets.Images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    objects = [id(p) for p in net.parameters()]
    args = nets.inputs(net)
    assert relative_error(net(*args), model(*args)) > 1e-2
    assert go.write_back(model, net) == []
    assert [id(p) for p in net.parameters()] == objects
    assert relative_error(net(*args), model(*args)) <= 1e-5


def test_training_mode_stays_and_statistics_are_the_models() -> None:
    net, small = pruned(HALF, nets.Images)
    net.train()
    net.norm.eval()  # frozen
    go.write_back(small.train(), net)
    assert net.training and not net.norm.training and net.stem.training
    assert torch.equal(net.norm.running_mean, small.params["norm.running_mean"])
    assert int(net.norm.num_batches_tracked) == 0


def test_a_model_captured_in_training_mode() -> None:
    net = lively(nets.Images()).train()
    model = go.capture(net, nets.inputs(net)).clone()
    with torch.no_grad():
        model.params["head.bias"].add_(1)
    before = net.norm.running_mean.clone()
    assert go.write_back(model, net) == [] and net.training and net.norm.training
    assert torch.equal(net.head.bias, model.params["head.bias"])
    assert torch.equal(net.norm.running_mean, before) and int(net.norm.num_batches_tracked) == 0


def test_torchs_attention_keeps_its_heads_and_loses_the_rest() -> None:
    net, small = pruned("prune-channels{params=0.8,only=block.linear1}", nets.TorchAttention)
    assert_back(small, net, lambda n: nets.inputs(net, n))
    assert net.block.linear1.out_features < 32 and net.block.self_attn.num_heads == 4


def test_resnet() -> None:
    net = zoo.build("resnet18")
    small, _ = go.run(go.capture(net.module, net.args(), dynamic=net.dynamic), HALF)
    assert_back(small, net.module, net.args, recapture=True)


def test_heads_and_widths_of_gpt2() -> None:
    """Its layers are not torch's, and keep their widths under names of their own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_embd=32, n_layer=1, n_head=4, n_positions=16, use_cache=False)
    net = GPT2LMHeadModel(config).eval()
    model = go.capture(net, (torch.randint(0, 11, (3, 7)),), dynamic={0: {0: "batch"}})
    heads = "remove-channels{layer=transformer.h.0.attn.c_attn,indices=0;1;2;3;4;5;6;7}"
    small, _ = go.run(model, f"{heads},prune-channels{{params=0.7,leave=transformer.h.0.attn.c_attn}}")
    changes = assert_back(small, net, lambda n: (torch.randint(0, 11, (n, 7)),))
    assert "transformer.h.0.attn.split_size: 32 -> 24" in changes
    assert "transformer.h.0.attn.c_attn.nf: 96 -> 72" in changes


def images(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 32, 32),)


def test_depthwise_layers_of_a_mobilenet() -> None:
    rows = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    net = lively(torchvision.models.MobileNetV2(10, inverted_residual_setting=rows))
    small, _ = go.run(go.capture(net, images(2), dynamic={0: {0: "batch"}}), HALF)
    changes = assert_back(small, net, images)
    assert any(".groups: " in row for row in changes)


def test_branches_of_a_shufflenet() -> None:
    net = lively(torchvision.models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256], num_classes=10))
    model = go.capture(net, images(2), dynamic={0: {0: "batch"}})
    inside = ";".join(f"stage{stage}.1.branch2.0" for stage in (2, 3, 4))
    small, _ = go.run(model, f"prune-channels{{params=0.95,only={inside}}}")
    changes = assert_back(small, net, images)
    assert any(row.startswith("stage4.1.branch2.3.groups: 96 -> ") for row in changes)


@pytest.mark.parametrize("name", ["shuffle", "stack", "transposed", "experts", "squeeze_excite", "rotary", "gated"])
def test_what_moves_channels_by_their_number(name: str) -> None:
    net, args, _ = coupled.build(name)
    small, _ = go.run(go.capture(net, args), HALF)
    go.write_back(small, net)
    assert relative_error(net(*args), small(*args)) <= 1e-5


# What is refused, and that nothing is half done


def test_a_number_in_the_code_is_refused_with_its_line() -> None:
    net, small = pruned(HALF, nets.HardCoded)
    message = assert_refused(small, net)
    assert "tests/surgery/nets.py" in message and "return self.last(y.view(-1, 2, 4).flatten(1))" in message
    assert "(HardCoded)" in message and "view(%relu, [-1, " in message  # what it would have to say


def test_a_number_that_fails_nowhere_is_refused_too() -> None:
    """Rolled channels have another order when some are gone, and the code runs all the same."""
    net, args, _ = coupled.build("roll")
    small, _ = go.run(go.capture(net, args), HALF)
    message = assert_refused(small, net)
    assert "something else" in message and "index_select" in message  # which the code does not do


@pytest.mark.parametrize(("name", "line"), [("c2f", "y.append(y[-1] + block(y[-1]))"), ("padded_shortcut", "F.pad(x")])
def test_unequal_halves_and_paddings_are_refused(name: str, line: str) -> None:
    net, args, _ = coupled.build(name)
    small, _ = go.run(go.capture(net, args), HALF)
    assert line in assert_refused(small, net)


def test_queries_narrower_than_values_are_refused() -> None:
    net, small = pruned("remove-channels{layer=blocks.1.q,indices=0;4;8;12}", nets.Tokens)
    assert small.params["blocks.1.q.weight"].shape[0] < small.params["blocks.1.v.weight"].shape[0]
    assert "module 'blocks.1' (Attention)" in assert_refused(small, net)


def test_torchs_attention_without_some_heads_is_refused() -> None:
    net, small = pruned("remove-channels{layer=block.self_attn,indices=0;1;2;3}", nets.TorchAttention)
    assert "nn.MultiheadAttention has as many features in its heads" in assert_refused(small, net)


def test_folded_norms_are_refused_with_the_pass() -> None:
    net, small = pruned(f"fold-batch-norm,{HALF}", nets.Images)
    message = assert_refused(small, net)
    assert "'norm.weight'" in message and "'fold-batch-norm'" in message and "prune without" in message


def test_another_module_is_refused_with_the_nearest_name() -> None:
    _, small = pruned(HALF, nets.Images)

    class Renamed(nets.Images):
        def __init__(self) -> None:
            super().__init__()
            self.stam = self.stem
            del self.stem

    message = assert_refused(small, Renamed().eval(), UsageError)
    assert "no 'stem.weight'" in message and "did you mean stam.weight" in message


def test_computed_weights_are_refused_by_name() -> None:
    net, small = pruned("dead-code", nets.Normed)
    scale = "first.parametrizations.weight.original0"
    small.params.set(scale, small.params[scale][:5])
    message = assert_refused(small, net)
    assert "module 'first'" in message and "parametrization" in message


def test_other_dtypes_and_ties_are_refused() -> None:
    net, small = pruned(HALF, nets.Tokens, False, "default")
    assert "is float64 in the module" in assert_refused(small, copy.deepcopy(net).double(), UsageError)
    small.params.module.head.weight = nn.Parameter(small.params["head.weight"].detach() * 2)
    assert "are one tensor in the module" in assert_refused(small, net)


def test_the_last_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail would be none."""
    from graphopt.surgery import settle as searching

    net, small = pruned(HALF, nets.Images)

    def wrong(search: Any) -> Any:
        search.module.head.bias.data += 1e-2
        search.module.features = search.module.head.in_features
        return search.settled

    monkeypatch.setattr(searching._Search, "run", wrong)
    assert "away from the model's" in assert_refused(small, net, CheckFailed)
