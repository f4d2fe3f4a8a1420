"""Recurrent layers and cells. Nothing is claimed about their axes: they are costed, not edited."""

from __future__ import annotations

from torch.fx import Node

from graphopt.ops.arguments import argument
from graphopt.ops.axes import Opaque
from graphopt.ops.info import Kind, OpInfo, rows
from graphopt.ops.sizes import Size, numel, product, shape

__all__ = ["ROWS"]


def layer_macs(node: Node) -> Size:
    """input [time, batch, in], in any order or without batch: every matrix is applied everywhere."""
    positions = product(shape(argument(node, "input"))[:-1])
    matrices = [weight for weight in argument(node, "params") if len(shape(weight)) == 2]
    return sum((product((positions, numel(weight))) for weight in matrices), start=0)


def cell_macs(node: Node) -> Size:
    """One step: input and state times their matrices."""
    positions = product(shape(argument(node, "input"))[:-1])
    return sum((product((positions, numel(argument(node, name)))) for name in ("w_ih", "w_hh")), start=0)


LAYER = OpInfo(Kind.RECURRENT, Opaque(), macs=layer_macs, work=10, training="train", probability="dropout")
CELL = OpInfo(Kind.RECURRENT, Opaque(), macs=cell_macs, work=10)

ROWS: dict[str, OpInfo] = {
    **rows("lstm.input gru.input rnn_tanh.input rnn_relu.input", LAYER),
    **rows("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", CELL),
}
