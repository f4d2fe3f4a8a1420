"""LSTM, GRU and RNN, as torch's whole operators.

ONNX stacks the weights of the directions, [directions, gates * hidden, inputs], and orders the gates i, o, f, c (LSTM)
and z, r, h (GRU) where torch has i, f, g, o and r, z, n. The weights stay parameters; slices of them are joined anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.frontends.onnx.registry import operator
from graphopt.frontends.onnx.values import Floats, Ints, refuse

_LSTM_GATES, _GRU_GATES = (0, 2, 3, 1), (1, 0, 2)
_LONGEST_UNROLLED = 64


def _directions(direction: str, w: Tensor) -> int:
    count = {"forward": 1, "reverse": 1, "bidirectional": 2}.get(direction)
    if count != w.shape[0]:
        raise refuse(f"direction '{direction}' with weights for {w.shape[0]} directions")
    return count


def _check(
    activations: tuple[str, ...] | None,
    usual: tuple[str, ...],
    lengths: Ints | None,
    steps: int,
    clip: float | None,
    parameters: Sequence[Floats | None],
) -> None:
    if activations is not None and tuple(a.lower() for a in activations) != tuple(a.lower() for a in usual):
        raise refuse(f"attribute 'activations'={list(activations)}: only {list(usual)} is handled")
    if clip is not None or any(parameters):
        raise refuse("attributes 'clip', 'activation_alpha' and 'activation_beta' are not handled")
    if lengths is not None and any(length != steps for length in lengths):
        raise refuse("its input 'sequence_lens': sequences of different lengths are not handled")


def _gates(stacked: Tensor, order: Sequence[int]) -> Tensor:
    """The blocks of rows in another order."""
    parts = stacked.chunk(len(order), 0)
    return torch.cat([parts[i] for i in order], 0)


def _weights(w: Tensor, r: Tensor, b: Tensor | None, order: Sequence[int]) -> list[Tensor]:
    """Per direction: input weights, recurrent weights and, if given, both biases."""
    flat: list[Tensor] = []
    for d in range(w.shape[0]):
        matrices = [w[d], r[d]]
        if b is not None:
            matrices += list(b[d].chunk(2, 0))
        flat += [_gates(m, order) if len(order) > 1 else m for m in matrices]
    return flat


def _start(state: Tensor | None, x: Tensor, count: int, hidden: int, layout: int) -> Tensor:
    if state is not None:
        return state.transpose(0, 1) if layout else state
    batch = x.shape[0] if layout else x.shape[1]
    return torch.zeros([count, batch, hidden], dtype=x.dtype)


def _outputs(y: Tensor, states: Sequence[Tensor], count: int, layout: int, backwards: bool) -> tuple[Tensor, ...]:
    """Y as [time, directions, batch, hidden], or [batch, time, directions, hidden] with `layout=1`."""
    y = y.unflatten(-1, (count, -1))
    if backwards:
        y = y.flip(1 if layout else 0)
    if layout:
        return (y, *(state.transpose(0, 1) for state in states))
    return (y.transpose(1, 2), *states)


def _forwards(x: Tensor, direction: str, layout: int) -> Tensor:
    return x.flip(1 if layout else 0) if direction == "reverse" else x


@operator("LSTM")
def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    count = _directions(direction, w)
    steps = x.shape[1 if layout else 0]
    _check(
        activations,
        ("Sigmoid", "Tanh", "Tanh") * count,
        sequence_lens,
        steps,
        clip,
        (activation_alpha, activation_beta),
    )
    if peepholes is not None or input_forget:
        raise refuse("peepholes and 'input_forget' are not handled")
    hidden = r.shape[2]
    states = (_start(initial_h, x, count, hidden, layout), _start(initial_c, x, count, hidden, layout))
    y, h, c = torch.lstm(
        _forwards(x, direction, layout), states, _weights(w, r, b, _LSTM_GATES),
        b is not None, 1, 0.0, False, count == 2, bool(layout),
    )  # fmt: skip
    return _outputs(y, (h, c), count, layout, direction == "reverse")


@operator("GRU")
def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """torch resets after the linear layer (`linear_before_reset=1`); the other kind is unrolled."""
    count = _directions(direction, w)
    steps = x.shape[1 if layout else 0]
    _check(activations, ("Sigmoid", "Tanh") * count, sequence_lens, steps, clip, (activation_alpha, activation_beta))
    start = _start(initial_h, x, count, r.shape[2], layout)
    if not linear_before_reset:
        return _gru_reset_first(x, w, r, b, start, direction, layout)
    y, h = torch.gru(
        _forwards(x, direction, layout), start, _weights(w, r, b, _GRU_GATES),
        b is not None, 1, 0.0, False, count == 2, bool(layout),
    )  # fmt: skip
    return _outputs(y, (h,), count, layout, direction == "reverse")


def _gru_reset_first(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, start: Tensor, direction: str, layout: int
) -> tuple[Tensor, ...]:
    """h' = (1 - z) * tanh(W x + R (r * h) + b) + z * h, step by step."""
    x = x.transpose(0, 1) if layout else x
    steps = x.shape[0]
    if not isinstance(steps, int) or steps > _LONGEST_UNROLLED:
        raise refuse(f"'linear_before_reset'=0 over {steps} steps; up to {_LONGEST_UNROLLED} are unrolled")
    ways = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}[direction]
    results = [_gru_direction(x, w[d], r[d], None if b is None else b[d], start[d], way) for d, way in enumerate(ways)]
    y = torch.stack([y for y, _ in results], 1)  # [time, directions, batch, hidden]
    h = torch.stack([h for _, h in results], 0)
    return (y.permute(2, 0, 1, 3), h.transpose(0, 1)) if layout else (y, h)


def _gru_direction(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, h: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    steps = range(x.shape[0])
    gates = x @ w.t()
    if b is not None:
        gates = gates + b.chunk(2, 0)[0] + b.chunk(2, 0)[1]
    rz, rr, rh = r.chunk(3, 0)
    ys: dict[int, Tensor] = {}
    for t in reversed(steps) if backwards else steps:
        xz, xr, xh = gates[t].chunk(3, -1)
        z, reset = torch.sigmoid(xz + h @ rz.t()), torch.sigmoid(xr + h @ rr.t())
        h = (1 - z) * torch.tanh(xh + (reset * h) @ rh.t()) + z * h
        ys[t] = h
    return torch.stack([ys[t] for t in steps], 0), h


@operator("RNN")
def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Ints | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Floats | None = None,
    activation_beta: Floats | None = None,
    activations: tuple[str, ...] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    count = _directions(direction, w)
    kind = (activations or ("Tanh",))[0].lower()
    if kind not in ("tanh", "relu"):
        raise refuse(f"attribute 'activations'={list(activations or ())} is not handled")
    steps = x.shape[1 if layout else 0]
    _check(activations, (kind,) * count, sequence_lens, steps, clip, (activation_alpha, activation_beta))
    run = torch.rnn_tanh if kind == "tanh" else torch.rnn_relu
    y, h = run(
        _forwards(x, direction, layout), _start(initial_h, x, count, r.shape[2], layout), _weights(w, r, b, (0,)),
        b is not None, 1, 0.0, False, count == 2, bool(layout),
    )  # fmt: skip
    return _outputs(y, (h,), count, layout, direction == "reverse")
