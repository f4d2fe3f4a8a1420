"""Hypothesis strategies: random small nets that shrink to the fewest and plainest steps.

    @given(nets())
    def test(net: Net) -> None: ...

A failing example prints as Python that builds the same net.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import random_steps as rs
from tests.random_nets import Net, run
from tests.random_steps import Shape, Step

__all__ = ["example_inputs", "nets"]

MAX_SAMPLE_SIZE = 2048
INPUT_SHAPES = ((6,), (4, 6, 6), (6, 7, 5), (5, 8), (1, 4, 4), (8, 3, 3))

Draw = Callable[[st.SearchStrategy[Any]], Any]
Maker = Callable[[Draw, int, list[Tensor]], Step]


@st.composite
def nets(draw: Draw, max_steps: int = 8) -> Net:
    """Nets of one input and up to `max_steps` steps, in eval mode with calibrated statistics."""
    shape = draw(st.sampled_from(INPUT_SHAPES))
    steps: list[Step] = []
    layers: list[nn.Module] = []
    values = [torch.zeros(2, *shape)]
    origins: list[Step | None] = [None]
    while len(steps) < max_steps:
        step = draw(_next_step(steps, layers, values, origins))
        if step is None:
            break
        layer = layers[step.of] if isinstance(step, rs.Again) else step.module(tuple(values[step.x].shape))
        with torch.no_grad():
            outputs = run(step, layer.eval(), values)
        if all(output[0].numel() <= MAX_SAMPLE_SIZE for output in outputs):
            steps.append(step)
            layers.append(layer)
            values += outputs
            origins += [step] * len(outputs)
    return Net(shape, tuple(steps))


def example_inputs(net: Net) -> st.SearchStrategy[tuple[Tensor]]:
    """Inputs of one to five samples of any seed, in the dtype of the net."""
    dtype = next((p.dtype for p in net.parameters()), torch.float32)
    return st.builds(net.args, st.sampled_from((2, 1, 3, 5)), st.integers(0, 99), st.just(dtype))


@st.composite
def _next_step(
    draw: Draw, steps: list[Step], layers: list[nn.Module], values: list[Tensor], origins: list[Step | None]
) -> Step | None:
    """One more step, or None to stop. Its draws are one span, so that shrinking can drop the step whole."""
    # Zero is the simplest draw, so that shrinking stops early; it is rare, so that nets are long before.
    if steps and draw(st.integers(0, 15)) == 0:
        return None
    # The latest value comes first, half of the time: shrinking straightens a net into a chain.
    latest = len(values) - 1
    x = draw(st.sampled_from([latest] * len(values) + list(range(latest - 1, -1, -1))))
    makers = MAKERS[values[x].dim()] + (_usual_next(origins[x], steps) if values[x].dim() < 5 else [])
    again = _reusable(steps, layers, tuple(values[x].shape), values)
    twins = steps + 4 * [step for step in steps if isinstance(step, rs.Linear)]
    choice = draw(st.integers(0, len(makers) + 3 * bool(again) + min(len(twins), 8) - 1))
    if choice < len(makers):
        return makers[choice](draw, x, values)
    if choice < len(makers) + 3 * bool(again):
        return rs.Again(x, draw(st.sampled_from(again)))
    # A twin of an earlier step: the same operator on the same input, with weights of its own if it has any.
    return draw(st.sampled_from(twins))


def _usual_next(step: Step | None, steps: list[Step]) -> list[Maker]:
    """What follows a layer more often than by chance, because real nets are so and passes look for it."""
    if isinstance(step, rs.Linear) and steps.count(step) > 1:
        return [_combine] * 20
    if isinstance(step, rs.Conv | rs.Linear):
        return [_batch_norm] * 12 + [_scale, _plain(rs.ChannelScale), _plain(rs.ChannelShift)] * 2
    return [_linear] * 3 + [_conv_if_image] * 5 if isinstance(step, rs.BatchNorm) else []


def _reusable(steps: list[Step], layers: list[nn.Module], shape: Shape, values: list[Tensor]) -> list[int]:
    """Steps with weights whose layer also takes an input of this shape."""
    owners = [i for i, step in enumerate(steps) if not isinstance(step, rs.Again)]
    weighted = [i for i in owners if any(True for _ in layers[i].parameters())]
    return [i for i in weighted if tuple(values[steps[i].x].shape) == shape]


def _axis(draw: Draw, shape: Shape) -> int:
    return int(draw(st.integers(1, len(shape) - 1)))


def _width(draw: Draw, channels: int) -> int:
    """A number of output channels: as many as there are, so that residuals happen, or another."""
    return int(draw(st.sampled_from((channels, 4, 6, 8, 1, 3, 12))))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _plain(kind: type[Step]) -> Maker:
    return lambda draw, x, values: kind(x)


def _activation(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Activation(x, draw(st.sampled_from(list(rs.ACTIVATIONS))))


def _linear(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Linear(x, _width(draw, values[x].shape[-1]), draw(st.sampled_from((True, False))))


def _conv(draw: Draw, x: int, values: list[Tensor]) -> Step:
    shape = values[x].shape
    out = _width(draw, shape[1])
    smallest = min(shape[2:])
    kernel = draw(st.integers(1, min(3, smallest)))
    return rs.Conv(
        x,
        out,
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, kernel // 2)),
        dilation=draw(st.integers(1, 2 if 2 * (kernel - 1) < smallest else 1)),
        groups=draw(st.sampled_from(_divisors(math.gcd(out, shape[1])))),
        bias=draw(st.sampled_from((True, False))),
        transposed=draw(st.integers(0, 3)) == 3,
    )


def _conv_if_image(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return (_conv if values[x].dim() > 2 else _linear)(draw, x, values)


def _batch_norm(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.BatchNorm(x, draw(st.sampled_from((True, True, False))))


def _layer_norm(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.LayerNorm(x, draw(st.sampled_from((True, False))))


def _group_norm(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.GroupNorm(x, draw(st.sampled_from(_divisors(values[x].shape[1]))))


def _pool(draw: Draw, x: int, values: list[Tensor]) -> Step:
    kind = draw(st.sampled_from(("max", "avg")))
    kernel = draw(st.integers(1, min(3, *values[x].shape[2:])))
    return rs.Pool(x, kind, kernel, draw(st.integers(1, 2)), draw(st.integers(0, kernel // 2)))


def _softmax(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Softmax(x, _axis(draw, values[x].shape))


def _mean(draw: Draw, x: int, values: list[Tensor]) -> Step:
    keep = values[x].dim() == 2 or draw(st.booleans())
    return rs.Mean(x, _axis(draw, values[x].shape), keep)


def _pad(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Pad(x, draw(st.integers(0, 2)), draw(st.integers(0, 2)), draw(st.sampled_from((0.0, 1.0))))


def _scale(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Scale(x, draw(st.sampled_from((2.0, 0.5, -1.0, 1.0, 0.0))))


def _shift(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Shift(x, draw(st.sampled_from((1.0, -0.5, 0.0))))


def _flatten(draw: Draw, x: int, values: list[Tensor]) -> Step:
    rank = values[x].dim()
    start = draw(st.integers(1, rank - 2))
    return rs.Flatten(x, start, draw(st.sampled_from((-1, *range(start + 1, rank - 1)))))


def _unflatten(draw: Draw, x: int, values: list[Tensor]) -> Step:
    axis = _axis(draw, values[x].shape)
    size = values[x].shape[axis]
    first = draw(st.sampled_from(_divisors(size)))
    return rs.Unflatten(x, axis, (first, size // first))


def _permute(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Permute(x, (0, *draw(st.permutations(range(1, values[x].dim())))))


def _unsqueeze(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Unsqueeze(x, draw(st.integers(1, values[x].dim())))


def _squeeze(draw: Draw, x: int, values: list[Tensor]) -> Step:
    """Of an axis of size one; with another size it does nothing, which is worth having too."""
    return rs.Squeeze(x, _axis(draw, values[x].shape))


def _flip(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Flip(x, _axis(draw, values[x].shape))


def _roll(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Roll(x, _axis(draw, values[x].shape), draw(st.integers(1, 3)))


def _split(draw: Draw, x: int, values: list[Tensor]) -> Step:
    axis = _axis(draw, values[x].shape)
    size = values[x].shape[axis]
    if size == 1:
        return rs.Split(x, axis, (1,))
    half = size // 2
    sizes = draw(st.sampled_from(((size - half, half), (1, size - 1), (1,) * min(size, 4))))
    return rs.Split(x, axis, (*sizes[:-1], size - sum(sizes[:-1])))


def _partner(draw: Draw, x: int, values: list[Tensor], without: int | None = None) -> int:
    """A value shaped as value `x` but for axis `without`: one of the others, latest first, or `x` itself."""

    def key(value: Tensor) -> Shape:
        return tuple(-1 if axis == without else size for axis, size in enumerate(value.shape))

    alike = [i for i in range(len(values) - 1, -1, -1) if key(values[i]) == key(values[x])]
    return int(draw(st.sampled_from(sorted(alike, key=lambda i: i == x))))


def _combine(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Combine(x, _partner(draw, x, values), draw(st.sampled_from(("add", "sub", "mul", "maximum"))))


def _cat(draw: Draw, x: int, values: list[Tensor]) -> Step:
    axis = _axis(draw, values[x].shape)
    return rs.Join(x, _partner(draw, x, values, axis), axis)


def _stack(draw: Draw, x: int, values: list[Tensor]) -> Step:
    return rs.Join(x, _partner(draw, x, values), draw(st.integers(1, values[x].dim())), "stack")


# What may follow a value, by its rank, plainest first. Frequent ones are listed twice.
ANY = [_activation, _scale, _shift, _plain(rs.Ramp), _combine, _plain(rs.Dropout), _linear, _cat, _pad]
ANY += [_mean, _softmax, _layer_norm, _unflatten, _split, _flip, _roll]
CHANNELS: list[Maker] = [
    _plain(rs.ChannelShift),
    _plain(rs.ChannelScale),
    _plain(rs.PReLU),
    _batch_norm,
    _activation,
]
RANK_3_UP: list[Maker] = [
    _conv,
    _conv,
    _conv,
    _group_norm,
    _flatten,
    _permute,
    _squeeze,
    _combine,
    _batch_norm,
]
MAKERS: dict[int, list[Maker]] = {
    2: ANY + CHANNELS + [_linear, _unsqueeze],
    3: ANY + CHANNELS + RANK_3_UP + [_linear, _unsqueeze, _stack],
    4: ANY + CHANNELS + RANK_3_UP + [_conv, _conv, _conv, _batch_norm, _pool, _plain(rs.GlobalPool), _combine],
    5: [_flatten, _permute, _squeeze, _activation],
}
