"""Wider transformers that compute the same: on paper, when they are trained, when they are cut back, and refused."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import GraphoptError
from tests.compare import relative_error
from tests.coupling import nets
from tests.passes.apply import Net, gradients, reasons
from tests.passes.expand_nets import NETS, Gpt, Llama, Vit, tokens

WIDE = {
    "expand-mlp": "expand-mlp{by=3}",
    "expand-heads": "expand-heads{by=2}",
    "expand-head-size": "expand-head-size{by=2}",
    "expand-attention": "expand-attention{by=2}",
    "expand-hidden": "expand-hidden{times=2}",
}


@cache
def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any, go.Model]:
    torch.manual_seed(0)
    make, inputs = NETS[name]
    net = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)

    def args(batch: int, seed: int = 0) -> Tensor:
        x = inputs(batch, seed)
        return x.to(dtype) if x.is_floating_point() else x

    return net, args, go.capture(net, (args(2),), dynamic={0: {0: "batch"}})


def same(net: nn.Module, model: go.Model, args: Any, limit: float) -> None:
    for batch in (2, 3):
        with torch.no_grad():
            assert relative_error(model(args(batch, 5)), net(args(batch, 5))) <= limit


def shapes(model: go.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def cut_back(model: go.Model, report: go.Report) -> go.Model:
    for row in report.findings["groups"]:
        layer, positions = next(iter(row["new"].items()))
        model, _ = go.run(model, f"remove-channels{{layer={layer},indices={';'.join(map(str, positions))}}}")
    return model


@pytest.mark.parametrize("text", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("name", NETS)
def test_outputs_stay_and_a_cut_gives_the_model_back(name: str, text: str) -> None:
    net, args, model = built(name)
    wide, (report,) = go.run(model, text)
    json.dumps(report.to_json())
    assert report.changed and not any("stays" in reason for reason in reasons(report)), reasons(report)
    same(net, wide, args, 1e-6)
    back = cut_back(wide, report)
    assert shapes(back) == shapes(model) != shapes(wide)
    assert all(torch.equal(back.params[n], model.params[n]) for n in shapes(model))
    same(net, back, args, 1e-6)


@pytest.mark.parametrize("text", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("name", NETS)
def test_exact_in_double_precision(name: str, text: str) -> None:
    net, args, model = built(name, torch.float64)
    same(net, go.run(model, text)[0], args, 1e-12)


def test_all_at_once() -> None:
    for name in NETS:
        net, args, model = built(name, torch.float64)
        wide, _ = go.run(model, ",".join(WIDE.values()))
        same(net, wide, args, 1e-12)


# What grows


def grown(name: str, text: str) -> dict[str, tuple[int, ...]]:
    _, _, model = built(name)
    before, after = shapes(model), shapes(go.run(model, text)[0])
    return {key: after[key] for key in before if after[key] != before[key] and (".1." not in key)}


def test_what_an_mlp_gains() -> None:
    assert grown("gpt", "expand-mlp{by=3}") == {
        "layers.0.up.weight": (13, 12),
        "layers.0.up.bias": (13,),
        "layers.0.down.weight": (12, 13),
    }
    assert set(grown("llama", "expand-mlp{to=11}").values()) == {(11, 12), (12, 11)}


def test_what_attention_gains() -> None:
    assert grown("llama", "expand-heads{by=1}") == {  # two heads of queries for every head of keys
        "layers.0.query.weight": (24, 12),
        "layers.0.out.weight": (12, 24),
        "layers.0.key.weight": (12, 12),
        "layers.0.value.weight": (12, 12),
    }
    assert grown("llama", "expand-head-size{to=5}") == {
        "layers.0.out.weight": (12, 20),
        "layers.0.value.weight": (10, 12),
    }
    assert grown("llama", "expand-attention{by=1}") == {  # a pair of features
        "layers.0.query.weight": (24, 12),
        "layers.0.key.weight": (12, 12),
    }
    assert grown("gpt", "expand-attention{by=1}") == {"layers.0.qkv.weight": (42, 12), "layers.0.qkv.bias": (42,)}
    fused = {"layers.0.qkv.weight": (42, 12), "layers.0.qkv.bias": (42,), "layers.0.out.weight": (12, 14)}
    assert grown("vit", "expand-attention{by=1}") == grown("vit", "expand-head-size{by=1}") == fused


def test_keys_are_zero_and_queries_are_not() -> None:
    _, _, model = built("gpt")
    wide, (report,) = go.run(model, "expand-attention{by=1,only=layers.0}")
    new = report.findings["groups"][0]["new"]["layers.0.qkv"]
    assert new == [4, 9, 14, 19, 24, 29]  # a feature of each of three heads, of queries and of keys
    rows = wide.params["layers.0.qkv.weight"][new].abs().amax(1)
    assert (rows[:3] > 0).all() and (rows[3:] == 0).all() and not wide.params["layers.0.qkv.bias"][new[3:]].any()


def test_the_scale_of_scores_stays() -> None:
    _, _, model = built("vit")
    wide, _ = go.run(model, "expand-attention{by=10}")
    op = torch.ops.aten.scaled_dot_product_attention.default
    assert [node.kwargs.get("scale") for node in wide.graph.nodes if node.target is op] == [6**-0.5] * 2


@torch.no_grad()
def test_names_seed_and_init() -> None:
    _, _, model = built("gpt")
    one, (report,) = go.run(model, "expand-mlp{by=2,leave=layers.1}")
    assert [row["group"] for row in report.findings["groups"]] == ["layers.0.up"]
    again, other, copied = (
        go.run(model, f"expand-mlp{{by=2,only=layers.0,{option}}}")[0] for option in ("seed=0", "seed=1", "init=copy")
    )
    rows = [m.params["layers.0.up.weight"][10:] for m in (one, again, other, copied)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(rows[3], model.params["layers.0.up.weight"][[9, 9]])
    wide, _ = go.run(model, "expand-mlp{by=1000,only=layers.0}")
    drawn = wide.params["layers.0.up.weight"][10:].std() / model.params["layers.0.up.weight"].std()
    assert float(drawn) == pytest.approx(1, rel=0.05)


def test_twice_is_twice_and_to_is_once() -> None:
    _, _, model = built("gpt")
    twice, _ = go.run(model, "expand-mlp{by=2},expand-mlp{by=2}")
    assert len(twice.params["layers.0.up.bias"]) == 14
    _, (_, report) = go.run(model, "expand-mlp{to=14},expand-mlp{to=14}")
    assert not report.changed and "it has 14 already" in reasons(report)[-1]


@pytest.mark.parametrize("text", WIDE.values(), ids=WIDE.keys())
@pytest.mark.parametrize("name", NETS)
def test_training_reaches_all_that_is_new(name: str, text: str) -> None:
    _, args, model = built(name)
    wide, _ = go.run(model, text)
    new = {key: parameter for key, parameter in wide.named_parameters() if parameter.shape != model.params[key].shape}
    reached = {key: torch.zeros_like(parameter, dtype=torch.bool) for key, parameter in new.items()}
    for _ in range(3):
        for key, gradient in gradients(wide, [args(2)]).items():
            assert gradient is not None and gradient.isfinite().all()
            if key in new:
                reached[key] |= gradient != 0
        with torch.no_grad():
            for parameter in wide.parameters():
                parameter -= 1e-3 * parameter.grad
    # Ids that the batch lacks, and the bias that a softmax takes out of keys, have no gradient.
    for key, hit in reached.items():
        if "embed" not in key and not key.endswith("qkv.bias"):
            assert hit.any(tuple(range(1, hit.dim()))).all() if hit.dim() > 1 else hit.all(), key


@settings(max_examples=7, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_widths_and_heads(data: st.DataObject) -> None:
    number = st.integers(2, 4)
    heads, size, hidden, by = (data.draw(number) for _ in range(4))
    width = heads * size
    net: nn.Module
    torch.manual_seed(data.draw(st.integers(0, 9)))
    kind = data.draw(st.sampled_from(sorted(NETS)))
    if kind == "llama":
        net = Llama(width, heads * data.draw(st.integers(1, 2)), heads, 2 * size, hidden)
    else:
        net = (Gpt if kind == "gpt" else Vit)(width, heads, hidden, layers=1)
    net = net.double().eval()
    inputs = NETS[kind][1]
    args = (lambda b, s=0: inputs(b, s).double()) if kind == "vit" else inputs
    model = go.capture(net, (args(2),), dynamic={0: {0: "batch"}})
    passes = data.draw(st.lists(st.sampled_from(sorted(WIDE)), min_size=1, max_size=2))
    text = ",".join(f"{name}{{times={by}}}" if name == "expand-hidden" else f"{name}{{by={by}}}" for name in passes)
    wide, reports = go.run(model, text)
    assert all(report.changed for report in reports)
    same(net, wide, args, 1e-12)


MIXED = (
    "flip stack shuffle pixel_shuffle repeat_interleave bias_table grouped_queries_flag c2f unet experts gated rotary"
)


@pytest.mark.parametrize("name", MIXED.split())
def test_whatever_lies_between_layers(name: str) -> None:
    net, args, _ = nets.build(name)
    model = go.capture(net, args)
    for text in WIDE.values():
        wide, (report,) = go.run(model, text)
        assert report.changed or report.misses
        assert relative_error(wide(*args), net(*args)) <= 1e-6


@pytest.mark.parametrize("name", ["plain", "flip"])
def test_copies_are_found_again_behind_a_permutation(name: str) -> None:
    net, args, _ = nets.build(name)
    model = go.capture(net, args)
    wide, (report,) = go.run(model, "expand-mlp{by=3}")
    assert report.findings["groups"][0]["new"] == {"first": [8, 9, 10]}
    zero = {"plain": [8, 9, 10], "flip": [0, 1, 2]}[name]
    read = wide.params["last.weight"].flatten(1).abs().amax(0)
    assert (read == 0).nonzero().flatten().tolist() == zero
    back = cut_back(wide, report)
    assert all(torch.equal(back.params[key], model.params[key]) for key in shapes(model))


@pytest.mark.parametrize("name", ["roll", "permuted"])
def test_copies_that_would_mix(name: str) -> None:
    net, args, _ = nets.build(name)
    for init in ("normal", "copy"):
        assert "copies mix with originals" in refused(go.capture(net, args), f"expand-mlp{{by=3,init={init}}}")


# Refusals


def sequence(*layers: nn.Module, mode: str = "eval") -> go.Model:
    net = nn.Sequential(*layers)
    return go.capture(net.train(mode == "train"), (torch.randn(4, 6),))


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([nn.Linear(6, 8), nn.Softmax(-1), nn.Linear(8, 2)], "lets its positions meet"),
        ([nn.Linear(6, 8)], "is an output"),
    ],
)
def test_pinned_layers_say_why(layers: list[nn.Module], reason: str) -> None:
    _, (report,) = go.run(sequence(*layers), "expand-mlp{by=1}")
    assert not report.changed and any(reason in found for found in reasons(report))


def refused(model: go.Model, text: str) -> str:
    after, (report,) = go.run(model, text)
    assert not report.changed and shapes(after) == shapes(model)
    return "; ".join(reasons(report))


def test_dropout_is_refused_in_training_mode_only() -> None:
    layers = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 2)
    assert "draws random numbers" in refused(sequence(*layers, mode="train"), "expand-mlp{by=1}")
    assert go.run(sequence(*layers), "expand-mlp{by=1}")[1][0].changed
    assert go.run(sequence(*layers[::2], mode="train"), "expand-mlp{by=1}")[1][0].changed


def test_batch_norms_are_refused_in_training_mode_only() -> None:
    layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    assert "updates statistics" in refused(sequence(*layers, mode="train"), "expand-mlp{by=1}")
    wide, (report,) = go.run(sequence(*layers), "expand-mlp{by=1}")
    assert report.changed and len(wide.params["1.running_var"]) == 9


def test_an_operator_that_is_not_known() -> None:
    net = Net(
        lambda net, x: net.last(torch.special.bessel_j0(net.first(x))), first=nn.Linear(6, 8), last=nn.Linear(8, 2)
    )
    assert "is an operator that is not known" in refused(go.capture(net, (torch.randn(4, 6),)), "expand-mlp{by=1}")


def test_masked_weights_stay_zero() -> None:
    model = sequence(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)).clone()
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[:, 2] = True
    with torch.no_grad():
        model.params["0.weight"][mask] = 0
    model.params.masks["0.weight"] = mask
    wide, _ = go.run(model, "expand-mlp{by=2}")
    assert wide.params.masks["0.weight"].shape == (10, 6) and not wide.params["0.weight"][:, 2].any()
    assert wide.params["0.weight"][8:, [0, 1, 3, 4, 5]].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    net, args, model = built("vit", dtype)
    wide, _ = go.run(model, ",".join(WIDE.values()))
    assert all(parameter.dtype == dtype for parameter in wide.parameters())
    same(net, wide, args, 8 * torch.finfo(dtype).eps)


def test_a_norm_over_hidden_units_is_none_of_an_mlp_and_multiples_are_exact() -> None:
    model = sequence(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    _, (report,) = go.run(model, "expand-mlp{by=1}")
    assert report.findings["groups"] == []
    assert go.run(model, "expand-hidden")[1][0].findings["groups"][0]["to"] == 16


def test_a_statistic_that_is_no_mean() -> None:
    net = Net(
        lambda net, x: net.last((h := net.first(x)) / h.norm(dim=-1, keepdim=True)),
        first=nn.Linear(6, 8),
        last=nn.Linear(8, 2),
    )
    model = go.capture(net, (torch.randn(4, 6),))
    assert "takes a statistic" in refused(model, "expand-hidden")


def test_a_norm_of_queries_and_keys() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).view(-1, 5, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(self.norm(q), self.norm(k), v)
            return self.out(y.transpose(1, 2).flatten(2))

    net, x = Normed().eval(), torch.randn(2, 5, 8)
    model = go.capture(net, (x,))
    assert "takes a statistic" in refused(model, "expand-attention{by=1}")
    assert "its heads stay: they are one only, or tied" in refused(model, "expand-heads{by=1}")
    wide, (report,) = go.run(model, "expand-head-size{by=1}")
    assert report.changed and relative_error(wide(x), net(x)) <= 1e-6


def test_tied_embeddings() -> None:
    torch.manual_seed(0)
    net = Gpt(tied=True).eval()
    model = go.capture(net, (tokens(2),))
    assert "makes the positions in one place and reads them in another" in refused(model, "expand-hidden")
    wide, (report,) = go.run(model, "expand-mlp{by=1},expand-heads{by=1}")[0], go.run(model, "expand-mlp{by=1}")[1]
    assert report.changed and relative_error(wide(tokens(2)), net(tokens(2))) <= 1e-6
    assert frozenset({"embed.weight", "head.weight"}) in wide.params.ties()


def test_a_layer_that_is_used_twice_stays_one() -> None:
    net = Net(
        lambda net, x: net.down(torch.relu(net.up(net.down(torch.relu(net.up(x)))))),
        up=nn.Linear(6, 8),
        down=nn.Linear(8, 6),
    )
    x = torch.randn(4, 6)
    wide, _ = go.run(go.capture(net, (x,)), "expand-mlp{by=3}")
    assert shapes(wide)["up.weight"] == (11, 6) and relative_error(wide(x), net(x)) <= 1e-6


def test_grouped_convolutions() -> None:
    conv = nn.Conv2d
    net = nn.Sequential(conv(3, 8, 1), nn.SiLU(), conv(8, 8, 3, groups=4), nn.SiLU(), conv(8, 2, 1)).eval()
    model = go.capture(net, (torch.randn(1, 3, 6, 6),))
    assert "has groups" in refused(model, "expand-mlp{by=1}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expand-mlp", "it needs to know how much"),
        ("expand-mlp{by=1,to=12}", "it needs to know how much"),
        ("expand-heads{by=0}", "by is 0"),
        ("expand-hidden{times=1}", "times is 1"),
        ("expand-mlp{by=1,only=layer}", "nothing that could be expanded is called 'layer'"),
    ],
)
def test_wrong_options(text: str, message: str) -> None:
    _, _, model = built("gpt")
    with pytest.raises(GraphoptError, match=message):
        go.run(model, text)


def test_a_function_that_is_not_finite_fails_the_proof() -> None:
    net = Net(lambda net, x: net.last(torch.log(net.first(x))), first=nn.Linear(6, 8), last=nn.Linear(8, 2))
    with torch.no_grad():
        net.first.bias.copy_(torch.arange(10.0, 18.0))
    model = go.capture(net, (torch.randn(4, 6),))
    with pytest.raises(GraphoptError, match="changed by inf"):
        go.run(model, "expand-mlp{by=20}")
    wide, _ = go.run(model, "expand-mlp{by=20,init=copy}")
    assert len(wide.params["first.bias"]) == 28
