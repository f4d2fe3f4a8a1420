"""Mixtures of experts written in many ways, and what tests ask of those with fewer experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphopt as go
from tests.compare import relative_error

SIZE = 5


class Mlp(nn.Module):
    """Two layers, or with `gated` the product of two in front of the last."""

    def __init__(self, units: int = 7, gated: bool = False, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, units), nn.Linear(units, SIZE)
        self.gate = nn.Linear(SIZE, units) if gated else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h if self.gate is None else h * self.gate(x))


def permuted(expert: Mlp, order: Tensor) -> Mlp:
    """The same function with its hidden units in another order."""
    twin = copy.deepcopy(expert)
    with torch.no_grad():
        for layer in (twin.up, twin.gate):
            if layer is not None:
                layer.weight.copy_(layer.weight[order])
                layer.bias.copy_(layer.bias[order])
        twin.down.weight.copy_(twin.down.weight[:, order])
    return twin


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def masked(logits: Tensor) -> Tensor:
    """The two largest, the others zero."""
    best = logits.topk(2, -1).indices
    mask = torch.zeros_like(logits).scatter(-1, best, 1.0)
    return logits.softmax(-1) * mask


def scattered(logits: Tensor) -> Tensor:
    values, best = logits.softmax(-1).topk(2, -1)
    return torch.zeros_like(logits).scatter(-1, best, values / values.sum(-1, keepdim=True))


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": torch.sigmoid,
    "masked": masked,
    "scattered": scattered,
}
COLUMNS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "slice": lambda g: [g[..., i : i + 1] for i in range(g.shape[-1])],
    "select": lambda g: [g[..., i, None] for i in range(g.shape[-1])],
    "select, view": lambda g: [g[..., i].view(-1, 1) for i in range(g.shape[-1])],
    "from the end": lambda g: [g[..., i - g.shape[-1]].unsqueeze(-1) for i in range(g.shape[-1])],
    "split": lambda g: list(g.split(1, -1)),
    "chunk": lambda g: list(g.chunk(g.shape[-1], 1)),
    "unbind": lambda g: [one.unsqueeze(1) for one in g.unbind(-1)],
}
SUMS: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "python": lambda terms, x: sum(terms),  # type: ignore[dict-item,return-value]  # starts from 0
    "from the last": lambda terms, x: sum(terms[-2::-1], terms[-1]),
    "into the stream": lambda terms, x: sum(terms, x),
    "in pairs": lambda terms, x: (terms[0] + terms[1]) + sum(terms[3:], terms[2]),
}


class Dense(nn.Module):
    """A mixture between two layers, of which all experts are computed."""

    def __init__(
        self,
        experts: Sequence[nn.Module],
        gates: Callable[[Tensor], Tensor] = softmax,
        columns: Callable[[Tensor], list[Tensor]] = COLUMNS["slice"],
        total: Callable[[list[Tensor], Tensor], Tensor] = SUMS["python"],
    ) -> None:
        super().__init__()
        self.stem, self.router, self.last = nn.Linear(4, SIZE), nn.Linear(SIZE, len(experts)), nn.Linear(SIZE, 3)
        self.experts = nn.ModuleList(experts)
        self.gates, self.columns, self.total = gates, columns, total

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        columns = self.columns(self.gates(self.router(x)))
        return self.last(self.total([g * expert(x) for g, expert in zip(columns, self.experts, strict=True)], x))


class Indexed(nn.Module):
    """A mixture whose experts are stacked, and taken by the indices that the router selects, in several ways."""

    def __init__(self, experts: Sequence[Mlp], form: str = "bmm", best: int = 2) -> None:
        super().__init__()
        self.form, self.best, self.gated = form, best, experts[0].gate is not None
        self.stem, self.router, self.last = nn.Linear(4, SIZE), nn.Linear(SIZE, len(experts)), nn.Linear(SIZE, 3)
        into = [torch.cat((e.up.weight, e.gate.weight)) if e.gate is not None else e.up.weight for e in experts]
        bias = [torch.cat((e.up.bias, e.gate.bias)) if e.gate is not None else e.up.bias for e in experts]
        if form == "interleaved":
            into, bias = ([torch.stack(one.chunk(2), 1).flatten(0, 1) for one in both] for both in (into, bias))
        out = [e.down.weight for e in experts]
        turned = form == "turned"
        self.w1 = nn.Parameter(torch.stack([w.t() if turned else w for w in into]).detach().contiguous())
        self.w2 = nn.Parameter(torch.stack([w.t() if turned else w for w in out]).detach().contiguous())
        self.b1, self.b2 = (
            nn.Parameter(torch.stack(bias).detach()),
            nn.Parameter(torch.stack([e.down.bias for e in experts]).detach()),
        )

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        match self.form:
            case "turned":
                return torch.bmm(x.unsqueeze(1), weight).squeeze(1)
            case "einsum":
                return torch.einsum("si,soi->so", x, weight)
            case "matmul":
                return (weight @ x[..., None])[..., 0]
        return torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        values, best = self.router(x).softmax(-1).topk(self.best, -1)
        ids = best.reshape(-1)
        h = self._times(x.repeat_interleave(self.best, 0), self.w1[ids]) + self.b1[ids]
        if self.gated:
            up, gate = (h[:, ::2], h[:, 1::2]) if self.form == "interleaved" else h.chunk(2, -1)
            h = torch.tanh(up) * gate
        else:
            h = torch.tanh(h)
        made = (self._times(h, self.w2[ids]) + self.b2[ids]) * values.reshape(-1, 1)
        return self.last(made.view(x.shape[0], self.best, SIZE).sum(1))


class Computed(Indexed):
    """All stacked experts are computed, and weighted."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gates = self.router(x).softmax(-1)
        if self.form == "einsum":
            h = torch.tanh(torch.einsum("si,eoi->seo", x, self.w1) + self.b1)
            made = torch.einsum("seo,eio->sei", h, self.w2) + self.b2
            return self.last(torch.einsum("se,sei->si", gates, made))
        many = x.expand(len(self.w1), -1, -1) if self.form == "expanded" else x
        h = torch.tanh(many @ self.w1.transpose(1, 2) + self.b1.unsqueeze(1))
        made = h @ self.w2.transpose(1, 2) + self.b2.unsqueeze(1)
        if self.form == "left apart":
            return self.last(made).sum(0)
        return self.last((made * gates.t().unsqueeze(-1)).sum(0))


def capture(net: nn.Module) -> go.Model:
    x = torch.randn(6, 4, dtype=next(net.parameters()).dtype)
    return go.capture(net.eval(), (x,), dynamic={0: {0: "batch"}})


def data(dtype: torch.dtype = torch.float64, count: int = 2) -> list[list[Tensor]]:
    return [[torch.randn(16, 4, dtype=dtype, generator=torch.Generator().manual_seed(s))] for s in range(count)]


def merged(model: go.Model, text: str, calib: Sequence[Sequence[Tensor]] | None = None) -> tuple[go.Model, go.Report]:
    small, (report,) = go.run(model, f"merge-experts{{{text}}}", calib=data() if calib is None else calib)
    json.dumps(report.to_json())
    return small, report


def layer(report: go.Report) -> dict[str, Any]:
    (row,) = report.findings["layers"]
    return row


def distance(small: go.Model, net: nn.Module) -> float:
    """At two batch sizes."""
    with torch.no_grad():
        return max(relative_error(small(x[:size]), net(x[:size])) for size in (16, 5) for (x,) in data())


def count_of(model: go.Model, suffix: str) -> int:
    return sum(name.endswith(suffix) for name in model.state_dict())


def copies(count: int, units: int = 7, gated: bool = False) -> list[Mlp]:
    """One expert, its hidden units in several orders."""
    first = Mlp(units, gated)
    return [first, *(permuted(first, torch.randperm(units)) for _ in range(count - 1))]


def favour(net: nn.Module, classes: Sequence[int]) -> None:
    """Router logits that are alike within a class, whose first expert is used more than the others."""
    with torch.no_grad():
        net.router.bias.zero_()
        net.router.weight.zero_()
        net.stem.bias.fill_(0.5)
        for expert, number in enumerate(classes):
            net.router.weight[expert, number] = 1.0 if number in classes[:expert] else 4.0
