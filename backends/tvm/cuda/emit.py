"""Code for the blocks and threads of a GPU, in the terms of `kernels.emit`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from tvm import ir, tirx
from tvm.backend.cuda.op import cuda_func_call

from graphopt.backends.tvm.kernels.emit import Code

__all__ = ["GpuCode", "header"]

Expr = Any
"""A TIR expression (TVM's Python package has no types)."""


@cache
def header(name: str) -> str:
    """The text of a CUDA header beside this file."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


class GpuCode(Code):
    """Statements of a kernel; all indices are int32 until they meet a buffer."""

    @contextmanager
    def launched(self, **extents: int | Expr) -> Iterator[dict[str, Expr]]:
        """A kernel launch: extents of `block_x`, `block_y`, `block_z`, `thread_x` and `cluster_z`, as wanted."""
        variables = {name: tirx.Var(name, "int32") for name in extents}
        self._open.append([])
        yield variables
        (body,) = (self._done(self._open.pop()),)
        for name, extent in reversed(extents.items()):
            size = tirx.const(extent, "int32") if isinstance(extent, int) else tirx.Cast("int32", extent)
            span = ir.Range(tirx.const(0, "int32"), size)
            axis = tirx.IterVar(span, variables[name], tirx.IterVar.ThreadIndex, _TAGS[name])
            body = tirx.AttrStmt(axis, "thread_extent", size, body)
        self.add(body)

    def call(self, function: str, *arguments: Expr, headers: tuple[str, ...]) -> None:
        """Call a device function (a template's instance, say) that these headers define."""
        text = "\n".join(header(name) for name in headers)
        self.add(tirx.Evaluate(cuda_func_call(function, *arguments, source_code=text)))

    def value(self, function: str, *arguments: Expr, headers: tuple[str, ...]) -> Expr:
        """What a device function that returns a float gives."""
        text = "\n".join(header(name) for name in headers)
        return cuda_func_call(function, *arguments, source_code=text, return_type="float32")

    def shared(self, name: str, size: int, dtype: str = "float32") -> Expr:
        """The block's shared memory; there can be one such buffer in a kernel."""
        buffer = tirx.decl_buffer((tirx.const(size, "int64"),), dtype, name, scope="shared.dyn", data_alignment=128)
        self.add(tirx.AllocBuffer(buffer))
        return buffer

    def _done(self, statements: list[Any]) -> Any:
        return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


_TAGS = {
    "block_x": "blockIdx.x",
    "block_y": "blockIdx.y",
    "block_z": "blockIdx.z",
    "cluster_z": "clusterCtaIdx.z",
    "thread_x": "threadIdx.x",
}
