"""Writing loop nests as TIR: a recorder of statements that reads like the code it makes.

    code = Code()
    with code.loop("row", rows, parallel=True) as row:
        total = code.variable("total", lanes)
        code.store(total, ...)

All index arithmetic is in int64, so that tensors of more than 2^31 bytes are no special case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx

__all__ = ["Code", "flat", "index", "lanes_of", "unravelled", "vector"]

Expr = Any
"""A TIR expression (TVM's Python package has no types)."""


def index(value: int | Expr) -> Expr:
    """An int64 index."""
    if isinstance(value, int):
        return tirx.const(value, "int64")
    return value if str(value.ty.dtype) == "int64" else tirx.Cast("int64", value)


def vector(start: int | Expr, lanes: int) -> Expr:
    """The indices start, start + 1, ..., start + lanes - 1."""
    return index(start) if lanes == 1 else tirx.Ramp(index(start), tirx.const(1, "int64"), lanes)


def lanes_of(value: Expr, lanes: int) -> Expr:
    """A scalar repeated in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def flat(code: Code, buffer: Expr) -> Expr:
    """The same memory as a buffer of one dimension."""
    size: Expr = index(1)
    for extent in buffer.shape:
        size = size * extent
    view = tirx.decl_buffer((size,), buffer.dtype, f"{buffer.name}_flat", scope=buffer.scope())
    code.add(tirx.DeclBuffer(view, data=tirx.buffer.buffer_data(buffer)))
    return view


def unravelled(code: Code, number: Expr, sizes: Sequence[Expr]) -> list[Expr]:
    """The indices of an element of this number in a tensor of these sizes, the last axis fastest."""
    places: list[Expr] = []
    for size in reversed(sizes[1:]):
        places.append(code.let("place", tirx.floormod(number, size)))
        number = tirx.floordiv(number, size)
    return [code.let("place", number), *reversed(places)] if sizes else []


class Code:
    """Statements in the order they were recorded, with open loops and conditions as a stack."""

    def __init__(self) -> None:
        self._open: list[list[Any]] = [[]]

    def add(self, statement: Any) -> None:
        self._open[-1].append(statement)

    def store(self, buffer: Expr, place: Expr | Sequence[Expr], value: Expr) -> None:
        places = list(place) if isinstance(place, list | tuple) else [place]
        self.add(tirx.BufferStore(buffer, value, places))

    def let(self, name: str, value: Expr) -> Expr:
        """Give a value a name; it is computed once, here."""
        if isinstance(value, tirx.IntImm | tirx.Var):
            return value
        variable = tirx.Var(name, value.ty)
        self.add(tirx.Bind(variable, value))
        return variable

    def local(self, name: str, size: int, dtype: str = "float32") -> Expr:
        """A small buffer on the stack; LLVM keeps it in registers when all places are constants."""
        buffer = tirx.decl_buffer((tirx.const(size, "int64"),), dtype, name, scope="local")
        self.add(tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)}))
        return buffer

    def fetch(self, buffer: Expr, place: Expr) -> None:
        """Have the memory of an element brought into the second cache. There need not be such an element.

        Not into the first, which is too small for what is fetched ahead and waits for fewer lines at a time.
        """
        for_reading, second_cache, data = (tirx.const(number, "int32") for number in (0, 2, 1))
        address = tirx.address_of(buffer[place])
        self.add(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, for_reading, second_cache, data)))

    def scratch(self, name: str, shape: Sequence[int | Expr], dtype: str = "float32") -> Expr:
        """A buffer from the thread's pool of work space."""
        buffer = tirx.decl_buffer(tuple(index(size) for size in shape), dtype, name)
        self.add(tirx.AllocBuffer(buffer))
        return buffer

    @contextmanager
    def loop(self, name: str, extent: int | Expr, kind: str = "serial", start: int | Expr = 0) -> Iterator[Expr]:
        """A loop (`serial`, `parallel` or `vectorized`). One round of a constant extent makes no loop."""
        if isinstance(extent, int) and extent == 1:
            yield index(start)
            return
        variable = tirx.Var(name, "int64")
        self._open.append([])
        yield variable
        kinds = {
            "serial": tirx.ForKind.SERIAL,
            "parallel": tirx.ForKind.PARALLEL,
            "vectorized": tirx.ForKind.VECTORIZED,
        }
        body = _sequence(self._open.pop())
        self.add(tirx.For(variable, index(start), index(extent), kinds[kind], body))

    @contextmanager
    def when(self, condition: Expr) -> Iterator[None]:
        self._open.append([])
        yield
        body = _sequence(self._open.pop())
        self.add(tirx.IfThenElse(condition, body, None))

    def done(self) -> Any:
        """The recorded statement."""
        (statements,) = self._open
        return _sequence(statements)


def _sequence(statements: list[Any]) -> Any:
    if not statements:
        return tirx.Evaluate(tirx.const(0, "int32"))
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
