"""A 1x1 convolution and the depthwise one behind it in one kernel, against float64; and when they stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tvm import s_tir, te, tirx

from graphopt.backends.tvm.chains import in_one
from graphopt.backends.tvm.kernels import expanded
from graphopt.backends.tvm.kernels.depthwise import depthwise
from graphopt.backends.tvm.kernels.expanded import expanded_kernel
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import packed_vectors, product
from tests.backends.kernels.building import Library, a_machine, compiled, examples, operand, packed, size
from tests.backends.kernels.images import Geometry, channels_last, convolved
from tests.compare import relative_error

LIMIT = 2e-6

SMALL = a_machine(threads=2, l2=16 << 10)
"""A cache in which few rows and channels fit."""


def relu(x: te.Tensor, bias: te.Tensor, name: str) -> te.Tensor:
    zero = tirx.const(0, "float32")
    return te.compute(x.shape, lambda *i: tirx.max(x(*i) + bias(i[-1]), zero), name=name)


def both(images: Any, geometry: Geometry, inputs: int, channels: int, lanes: int) -> Any:
    """The function of relu(depthwise(relu(x @ m + a), w) + b)."""
    rows, columns = geometry.size
    x, m = (
        operand(images, rows, columns, inputs),
        operand(len(packed_vectors(channels, lanes)), inputs, lanes, name="m"),
    )
    a, b = operand(channels, name="a"), operand(channels, name="b")
    w = operand(*geometry.window.kernel, channels, name="w")
    first = relu(product(x, m, channels), a, "first")
    between = operand(images, rows, columns, channels, name="between")
    second = relu(depthwise(between, w, geometry.window), b, "second")
    parts = ([x, m, a, first], [between, w, b, second])
    return in_one(*(s_tir.renew_defs(te.create_prim_func(part, "int64")) for part in parts))


def lowered(images: Any, geometry: Geometry, inputs: int, channels: int, machine: Machine) -> Any:
    return expanded_kernel(both(images, geometry, inputs, channels, machine.lanes), machine)


def error_of(
    kernel: Library, images: int, geometry: Geometry, inputs: int, channels: int, lanes: int = 8, factor: float = 1.0
) -> float:
    x, m = torch.randn(images, inputs, *geometry.size), torch.randn(channels, inputs)
    w, a, b = torch.randn(channels, *geometry.window.kernel), torch.randn(channels), torch.randn(channels)
    shape = (images, *geometry.result, channels)
    ours = kernel(channels_last(x) * factor, packed(m, 1, lanes), a, w.permute(1, 2, 0), b, shape=shape)
    wide = torch.einsum("nchw,oc->nohw", x.double(), m.double()) + a.double()[:, None, None]
    reference = convolved(wide.relu(), w[:, None], geometry, groups=channels) + b.double()
    return relative_error(ours.double(), reference.relu())


def image(rows: int, columns: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> Geometry:
    border = dilation * (kernel - 1) // 2
    pairs = ((kernel, kernel), (stride, stride), (border, border), (border, border), (dilation, dilation))
    return Geometry((rows, columns), *pairs)


def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the kernel whether it repays or not."""
    monkeypatch.setattr(expanded, "_repays", lambda *_: True)


GEOMETRIES = {
    "plain": image(9, 7),
    "one row": image(1, 6),
    "strided": image(11, 8, stride=2),
    "wide window": image(8, 9, kernel=5, stride=2),
    "wider than the image": image(3, 4, kernel=7),
    "dilated": image(9, 10, dilation=2),
    "no border": Geometry((8, 9), (3, 3), (1, 1), (0, 0), (0, 0)),
    "border on one side": Geometry((7, 8), (3, 3), (2, 2), (0, 0), (1, 1)),
}


@pytest.mark.parametrize(
    "machine",
    [a_machine(4), a_machine(8), a_machine(16), a_machine(16, multiply_adds=1), SMALL],
    ids=["4", "8", "16", "narrow", "small"],
)
def test_windows_and_borders(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    channels = 3 * machine.lanes
    kernels = compiled({name.replace(" ", "_"): lowered(2, g, 5, channels, machine) for name, g in GEOMETRIES.items()})
    for name, geometry in GEOMETRIES.items():
        assert error_of(kernels[name.replace(" ", "_")], 2, geometry, 5, channels, machine.lanes) < LIMIT, name


@pytest.mark.parametrize("machine", [a_machine(8), SMALL], ids=["large", "small"])
def test_channels_at_and_between_whole_vectors(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    counts = (8, 9, 15, 24, 58)
    kernels = compiled({f"channels_{c}": lowered(1, image(6, 5), 24, c, machine) for c in counts})
    for channels in counts:
        assert error_of(kernels[f"channels_{channels}"], 1, image(6, 5), 24, channels) < LIMIT, channels


def test_a_free_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    kernel = compiled({"kernel": lowered(size(), image(6, 5, stride=2), 16, 24, SMALL)})["kernel"]
    for images in (0, 1, 2, 5):
        assert error_of(kernel, images, image(6, 5, stride=2), 16, 24) < LIMIT, images


@examples(6)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.sampled_from((1, 3, 5)),
    stride=st.integers(1, 3),
    inputs=st.integers(1, 40),
    beyond=st.integers(0, 40),
    machine=st.builds(
        a_machine, st.sampled_from((4, 8, 16)), st.integers(1, 4), st.sampled_from((8 << 10, 64 << 10, 512 << 10))
    ),
)
def test_any_pair(sizes: tuple[int, int], kernel: int, stride: int, inputs: int, beyond: int, machine: Machine) -> None:
    geometry, channels = image(*sizes, kernel=kernel, stride=stride), machine.lanes + beyond
    with pytest.MonkeyPatch.context() as patch:
        always(patch)
        function = lowered(2, geometry, inputs, channels, machine)
    if function is None:  # no row of it fits into the cache
        assert 4 * geometry.size[1] * machine.lanes * kernel > machine.l2 // 2
        return
    assert error_of(compiled({"kernel": function})["kernel"], 2, geometry, inputs, channels, machine.lanes) < LIMIT


def test_the_function_of_both_is_right_without_the_kernel() -> None:
    kernel = compiled({"kernel": both(1, image(6, 5), 4, 8, 8)})["kernel"]
    assert error_of(kernel, 1, image(6, 5), 4, 8) < LIMIT


def test_refused() -> None:
    machine, plain = a_machine(threads=2), image(14, 14)
    assert lowered(1, plain, 64, 384, machine) is not None
    assert lowered(1, plain, 64, 7, machine) is None  # fewer channels than lanes
    assert lowered(1, image(14, 1000), 64, 384, a_machine(l2=8 << 10)) is None  # no row fits
    assert not expanded._repays(1e9, plain.window, 64, 48, machine)
    x, m = operand(8, 4), operand(1, 4, 8, name="m")
    alone = te.create_prim_func([x, m, product(x, m, 8)], "int64")
    assert expanded_kernel(s_tir.renew_defs(alone), machine) is None


def test_one_percent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch)
    kernel = compiled({"kernel": lowered(1, image(6, 5), 4, 8, a_machine())})["kernel"]
    assert error_of(kernel, 1, image(6, 5), 4, 8, factor=1.01) > 1e-3
