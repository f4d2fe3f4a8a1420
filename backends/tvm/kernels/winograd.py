"""Winograd's convolution: 3x3 windows of stride one by fewer multiplications.

The output is cut into squares of m x m pixels. The m + 2 by m + 2 pixels behind a square are transformed, multiplied
position by position with transformed weights (one matrix product per position, over the channels), and the products
are transformed back: (m + 2)^2 multiplications where the direct form has 9 m^2. (Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", CVPR 2016.) Sums are formed
of numbers larger than the result, so that it is less exact than the direct form: relative to the largest output, m = 4
errs by 6e-6 at 32 input channels and 2e-5 at 512, m = 2 by 1e-6, the direct form by 5e-7 and 3e-6.

A task does all of this for some squares of an image and some output channels, in work space that stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tvm import te, tirx

from graphopt.backends.tvm.kernels.choices import window_problem
from graphopt.backends.tvm.kernels.emit import Code, flat, index, lanes_of, vector
from graphopt.backends.tvm.kernels.fused import ANCHOR, Fused
from graphopt.backends.tvm.kernels.geometry import Window
from graphopt.backends.tvm.kernels.machine import Machine
from graphopt.backends.tvm.kernels.product import column_of
from graphopt.backends.tvm.kernels.rows import crossing
from graphopt.backends.tvm.kernels.tile import (
    Panels,
    accumulate,
    best_tile,
    cycles_of,
    each_part,
    fetching,
    steps_at_once,
)
from graphopt.backends.tvm.kernels.transforms import SQUARES, Transform

__all__ = ["best_square", "transformed_weight", "winograd", "winograd_kernel"]

_BYTES_PER_CYCLE = 8
"""What one core draws from the third-level cache or memory while others draw too."""

_FEWEST_CHANNELS = 16
"""On either side: vectors of all of them may be few, but the transforms of fewer take what the products save."""

_SIDES = {"direct": 0, **{f"squares of {m}": m for m in SQUARES}}


def best_square(window: Window, inputs: int, outputs: int, machine: Machine) -> int:
    """The side m of the squares that is fastest, as measured or by the model; 0 when the direct form is."""
    if min(inputs, outputs) < min(2 * machine.lanes, _FEWEST_CHANNELS):
        return 0
    lanes = machine.lanes_for(outputs)
    told = machine.tuned.algorithms.get(window_problem(window, inputs, outputs))
    if told is not None:
        return _SIDES[told]
    vectors, each = -(-outputs // lanes), machine.of_lanes(lanes).multiply_adds
    pixels = math.prod(window.result)
    direct = pixels * 9 * inputs * vectors / each
    choices = [(max(direct, 9 * inputs * outputs * 4 / _BYTES_PER_CYCLE), 0)]
    for m in SQUARES:
        squares = _squares(window, m)
        positions = (m + 2) ** 2
        products = positions * squares * inputs * vectors / each
        moves = 4 * positions * squares * (inputs + outputs) / lanes
        weights = positions * inputs * outputs * 4 / _BYTES_PER_CYCLE
        choices.append((max(products, weights) + moves, m))
    return min(choices)[1]


def _squares(window: Window, m: int) -> int:
    rows, columns = window.result
    return -(-rows // m) * -(-columns // m)


def transformed_weight(weight: torch.Tensor, m: int) -> torch.Tensor:
    """weight [out, in, 3, 3] to [positions, out, in]: G w G^T, in float64."""
    g = torch.tensor(SQUARES[m].weights, dtype=torch.float64)
    positions = torch.einsum("pi,qj,ocij->pqoc", g, g, weight.double())
    return positions.flatten(0, 1).to(weight.dtype)


def winograd(data: te.Tensor, weight: te.Tensor, back: te.Tensor, channels: int, m: int, window: Window) -> te.Tensor:
    """data [N, H, W, C] and a packed transformed weight to [N, OH, OW, channels], as a specification.

    Args:
        weight: [positions, vectors, C, lanes].
        back: [3, m + 2], the matrix that turns a transformed weight back into the weight.
    """
    _, _, depth, lanes = (int(size) for size in weight.shape)
    size = m + 2
    y, x, k = te.reduce_axis((0, 3), "ky"), te.reduce_axis((0, 3), "kx"), te.reduce_axis((0, depth), "k")
    p, q = te.reduce_axis((0, size), "p"), te.reduce_axis((0, size), "q")
    height, width = window.size

    def element(n: Any, oy: Any, ox: Any, o: Any) -> Any:
        number = tirx.floordiv(o, lanes)
        lane = o - tirx.min(number * lanes, max(channels - lanes, 0))
        row, col = oy + y - window.before[0], ox + x - window.before[1]
        inside = tirx.all(row >= 0, row < height, col >= 0, col < width)
        pixel = tirx.if_then_else(inside, data(n, row, col, k), tirx.const(0, data.dtype))
        return te.sum(pixel * back(y, p) * back(x, q) * weight(p * size + q, number, k, lane), axis=[y, x, k, p, q])

    notes = {ANCHOR: "winograd", "graphopt.square": m, **window.notes()}
    return te.compute((data.shape[0], *window.result, channels), element, name="winograd", attrs=notes)


def winograd_kernel(fused: Fused, machine: Machine) -> Any | None:
    """The kernel of `winograd`; None when it is something else, not in float32, or narrower than a vector."""
    if fused.notes["kernel"] != "winograd" or str(fused.result.dtype) != "float32":
        return None
    code = Code()
    kernel = _Winograd(code, fused, machine)
    if min(kernel.depth, kernel.outputs) < kernel.lanes:
        return None
    kernel.emit()
    return fused.rewritten(code.done())


@dataclass
class _Winograd:
    code: Code
    fused: Fused
    machine: Machine

    def __post_init__(self) -> None:
        self.data, _, self.weight = self.fused.reads
        self.window = Window.read(self.fused.notes)
        self.m = int(self.fused.notes["square"])
        self.transform: Transform = SQUARES[self.m]
        self.positions, self.vectors, self.depth, self.lanes = (int(size) for size in self.weight.shape)
        self.machine = self.machine.of_lanes(self.lanes)
        self.outputs = int(self.fused.result.shape[-1])
        self.across = -(-self.window.result[1] // self.m)
        self.squares = _squares(self.window, self.m)

    def emit(self) -> None:
        code = self.code
        self.flat_weight = flat(code, self.weight)
        block, groups = self._division()
        blocks, group = -(-self.squares // block), -(-self.vectors // groups)
        tall, wide = best_tile(block, group, self.machine)
        tasks = blocks * groups
        with code.loop("task", self.data.shape[0] * tasks, "parallel") as task:
            image = code.let("image", tirx.floordiv(task, index(tasks)))
            place = code.let("place", tirx.floormod(task, index(tasks)))
            first = code.let(
                "first", tirx.min(tirx.floordiv(place, index(groups)) * block, index(self.squares - block))
            )
            base = code.let("base", tirx.min(tirx.floormod(place, index(groups)) * group, index(self.vectors - group)))
            inputs = code.scratch("inputs", [self.positions, block, self.depth])
            products = code.scratch("products", [self.positions, block, group, self.lanes])
            self._transform_inputs(image, first, block, inputs)
            with code.loop("position", self.positions) as position:
                self._multiply(position, base, (tall, wide), inputs, products)
            self._transform_back(image, first, base, (block, group), products)

    def _transform_inputs(self, image: Any, first: Any, block: int, inputs: Any) -> None:
        code, size = self.code, self.m + 2
        height, width = self.window.size
        with code.loop("square", block) as s:
            row, col = self._corner(first + s)
            row = code.let("row", row - self.window.before[0])
            col = code.let("col", col - self.window.before[1])
            inside = tirx.all(row >= 0, row + size <= height, col >= 0, col + size <= width)
            for condition, guarded in ((inside, False), (tirx.Not(inside), True)):
                with code.when(condition), code.loop("c", -(-self.depth // self.lanes)) as c:
                    at = self._channels(c)
                    pixels = [
                        [self._pixel(image, row + i, col + j, at, guarded) for j in range(size)] for i in range(size)
                    ]
                    for (i, j), value in self._both_ways(pixels, self.transform.input):
                        code.store(inputs, [index(i * size + j), s, at], value)

    def _channels(self, number: Any) -> Any:
        start = number * self.lanes
        if self.depth % self.lanes:
            start = tirx.min(start, index(self.depth - self.lanes))
        return vector(self.code.let("channel", start), self.lanes)

    def _pixel(self, image: Any, row: Any, col: Any, at: Any, guarded: bool) -> Any:
        value = self.data[image, row, col, at]
        if not guarded:
            return value
        height, width = self.window.size
        inside = tirx.all(row >= 0, row < height, col >= 0, col < width)
        return tirx.if_then_else(inside, value, lanes_of(tirx.const(0, "float32"), self.lanes))

    def _both_ways(self, values: list[list[Any]], once: Any) -> Iterator[tuple[tuple[int, int], Any]]:
        """Transform down the columns, then along the rows; half-way values are named."""
        name = self.code.let
        columns = [once([name("v", row[j]) for row in values], name) for j in range(len(values[0]))]
        for i in range(len(columns[0])):
            for j, value in enumerate(once([column[i] for column in columns], name)):
                yield (i, j), value

    def _multiply(self, position: Any, base: Any, tile: Any, inputs: Any, products: Any) -> None:
        code, lanes = self.code, self.lanes
        tall, wide = tile
        squares, group, panel = int(inputs.shape[1]), int(products.shape[2]), self.depth * lanes
        unroll, choices = steps_at_once(self.depth, self.machine.choices), self.machine.choices

        def block(q: Any, wide: int, p: Any, tall: int) -> None:
            ends = q + wide >= index(group)  # the next weights are then those of the next position
            following = position * self.vectors + base + tirx.Select(ends, index(self.vectors), q + wide)
            panels = Panels.side_by_side(following * panel, wide * panel)
            ahead = fetching(code, self.flat_weight, panels, (p, tall, squares), self.depth // unroll, choices)
            sums = accumulate(
                code,
                (tall, wide),
                lanes,
                [self.depth],
                lambda i, k: inputs[position, p + i, k],
                lambda j, k: self.weight[position, base + q + j, k, vector(0, lanes)],
                unroll,
                ahead,
            )
            for i, row in enumerate(sums):
                for j, total in enumerate(row):
                    value = total[vector(0, lanes)]
                    code.store(products, [position, p + i, q + j, vector(0, lanes)], value)

        def columns(q: Any, wide: int) -> None:
            each_part(code, "rows", tall, lambda p, tall: block(q, wide, p, tall))

        each_part(code, "vectors", wide, columns)

    def _transform_back(self, image: Any, first: Any, base: Any, sizes: tuple[int, int], products: Any) -> None:
        code, m, size, lanes = self.code, self.m, self.m + 2, self.lanes
        height, width = self.window.result
        block, group = sizes
        with code.loop("square", block) as s:
            row, col = self._corner(first + s)
            row, col = code.let("row", row), code.let("col", col)
            inside = tirx.all(row + m <= height, col + m <= width)
            whole = height % m == 0 and width % m == 0
            for condition, guarded in ((inside, False), (tirx.Not(inside), True))[: 1 if whole else 2]:
                with code.when(condition), code.loop("v", group) as v:
                    start = column_of(code, base + v, self.outputs, lanes)
                    values = [
                        [products[index(i * size + j), s, v, vector(0, lanes)] for j in range(size)]
                        for i in range(size)
                    ]
                    pixels = [[code.local(f"pixel_{i}_{j}", lanes) for j in range(m)] for i in range(m)]
                    for (i, j), value in self._both_ways(values, self.transform.output):
                        code.store(pixels[i][j], vector(0, lanes), value)
                    self._store(image, row, col, start, pixels, guarded)

    def _store(self, image: Any, row: Any, col: Any, start: Any, pixels: list[list[Any]], guarded: bool) -> None:
        code, (height, width) = self.code, self.window.result

        def put(i: int, j: int) -> None:
            with code.loop("lane", self.lanes, "vectorized") as lane:
                self.fused.epilogue.emit(code, pixels[i][j][lane], [image, row + i, col + j, start + lane])

        for i in range(self.m):
            for j in range(self.m):
                if guarded:
                    with code.when(tirx.all(row + i < height, col + j < width)):
                        put(i, j)
                else:
                    put(i, j)

    def _corner(self, square: Any) -> tuple[Any, Any]:
        across = index(self.across)
        return tirx.floordiv(square, across) * self.m, tirx.floormod(square, across) * self.m

    def _division(self) -> tuple[int, int]:
        """Squares of a task, and into how many groups of channels to divide them."""
        if self.machine.choices.division is not None:
            block, groups = self.machine.choices.division
            return block, groups
        threads, choices = self.machine.threads, []
        for block in range(1, self.squares + 1):
            for groups in {1, threads}:
                group = -(-self.vectors // groups)
                if groups > self.vectors:
                    continue
                space = 4 * self.positions * block * (self.depth + group * self.lanes)
                turns = -(-(-(-self.squares // block) * groups) // threads)
                products = cycles_of(*best_tile(block, group, self.machine), self.machine) * self.depth * self.positions
                moves = 4 * self.positions * block * (self.depth / self.lanes + group)
                weights = 4 * self.positions * group * self.lanes * self.depth
                waiting = max(0, weights / _BYTES_PER_CYCLE - products) + weights / 32
                spilled = max(0, space - self.machine.l2) / _BYTES_PER_CYCLE
                shared = crossing(math.prod(self.window.result), self.depth, self.outputs, groups)
                choices.append((turns * (products + moves + waiting + spilled) + shared, block, groups))
        return min(choices)[1:]
