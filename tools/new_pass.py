"""`python -m graphopt.tools.new_pass NAME`: start a pass from a template that works and is tested as it stands.

It drops a negation in front of an absolute value, which is small enough to be replaced in one go. Run it in the
checkout: it writes `passes/<name>.py` and `tests/passes/test_<name>.py`.
"""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from string import Template
from typing import NoReturn

from graphopt.errors import GraphoptError, UsageError
from graphopt.files import write_whole
from graphopt.tools.console import complain, data

__all__ = ["create"]

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")

_PASS = Template('''\
"""Dropping of negations in front of an absolute value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.match import Anything, Op, match
from graphopt.rewriter import Rewriter
from graphopt.transform import Contract, Pass

__all__ = ["$class_name"]

aten = torch.ops.aten

_PATTERN = Op(aten.abs.default, self=Op(aten.neg.default, self=Anything(name="x")))


@dataclass(frozen=True)
class $class_name(Pass):
    """Take the absolute value of what is negated instead of its negation.

    What:
        An absolute value reads past the negation in front of it; the negation goes if nothing else reads it.

    Algebra:
        |-x| = |x| for x [..] of any shape and dtype.

    When it applies:
        The input of an `abs` is a `neg`. Any other `abs` is left alone, with the operator in front of it as the reason.

    Safety:
        Exact: a negation turns the sign bit only, and the absolute value clears it. The gradient stays sign(x).

    Cost:
        One operator and one tensor written less for every negation that goes.

    Source:
        IEEE 754-2019, section 5.5.1, negate and abs.

    Example:
        >>> import torch, graphopt
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x):
        ...         return (-x).abs()
        >>> model = graphopt.capture(Net(), (torch.randn(2, 3),))
        >>> smaller, (report,) = graphopt.run(model, "$name")
        >>> [edit.why for edit in report.edits]
        ['the absolute value does not see the sign']
    """

    name: ClassVar[str] = "$name"
    contract: ClassVar[Contract] = Contract.EXACT

    def run(self, rw: Rewriter) -> None:
        """Read past negations until there is none, so that a second run finds nothing."""
        for node in rw.find(aten.abs.default):
            found = match(_PATTERN, node)
            if not found:
                rw.skip(node, found.reason)
            while found:
                rw.update(node, "the absolute value does not see the sign", self=found["x"])
                found = match(_PATTERN, node)
''')

_TEST = Template('''\
"""Negations in front of an absolute value go; everything else stays, with a reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import graphopt as go
from tests.passes.apply import apply, errors_at, gradients, operators, reasons

PASS = "$name"
BATCH = {0: {0: "batch"}}


class Net(nn.Module):
    """A linear layer, and then a function."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.then = nn.Linear(4, 3), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.linear(x))


def batch(size: int) -> tuple[Tensor]:
    return (torch.randn(size, 4, generator=torch.Generator().manual_seed(size)),)


def test_negation_goes() -> None:
    net = Net(lambda y: (-y).abs())
    _, after, report = apply(net, batch(2), PASS, dynamic=BATCH)
    assert operators(after) == ["linear", "abs"]
    assert len(report.edits) == 1 and not report.misses
    assert errors_at(net, after, batch(2), batch(5)) == 0.0
    assert all(grad is not None and bool(grad.any()) for grad in gradients(after, batch(2)).values())


def test_negations_in_a_row_go_at_once() -> None:
    _, after, report = apply(Net(lambda y: y.neg().neg().abs()), batch(2), PASS)
    assert operators(after) == ["linear", "abs"] and len(report.edits) == 2
    again, (report,) = go.run(after, PASS)
    assert not report.edits and str(again) == str(after)


def test_negation_with_another_reader_stays() -> None:
    net = Net(lambda y: (lambda n: n.abs() + n.exp())(-y))
    _, after, report = apply(net, batch(2), PASS, dynamic=BATCH)
    assert operators(after) == ["linear", "neg", "abs", "exp", "add.Tensor"] and len(report.edits) == 1
    assert errors_at(net, after, batch(2), batch(5)) == 0.0


def test_near_miss_keeps_its_operators() -> None:
    _, after, report = apply(Net(lambda y: y.relu().abs()), batch(2), PASS)
    assert operators(after) == ["linear", "relu", "abs"]
    assert not report.edits and len(reasons(report)) == 1 and "relu" in reasons(report)[0]


def test_comparison_notices_one_percent() -> None:
    net = Net(lambda y: (-y).abs())
    _, after, _ = apply(net, batch(2), PASS)
    with torch.no_grad():
        net.linear.weight.mul_(1.01)
    assert errors_at(net, after, batch(2)) > 1e-3
''')


def create(name: str, root: Path) -> tuple[Path, Path]:
    """Write the two files of a new pass into the checkout at `root` and return their paths.

    Raises:
        UsageError: for a name that is not kebab-case, is taken, or for a `root` that is no checkout.
    """
    if not _KEBAB.fullmatch(name) or keyword.iskeyword(name):
        raise UsageError(
            f"'{name}' is no name for a pass", todo="use lower-case words and digits joined by '-', such as fold-tanh"
        )
    if not (root / "passes" / "__init__.py").is_file() or not (root / "tests" / "passes").is_dir():
        raise UsageError(f"'{root}' is no checkout of graphopt", todo="run this where passes/ and tests/passes/ are")
    _refuse_taken(name)
    module = name.replace("-", "_")
    paths = root / "passes" / f"{module}.py", root / "tests" / "passes" / f"test_{module}.py"
    for path in paths:
        if path.exists():
            raise UsageError(f"'{path}' exists already")
    words = {"name": name, "class_name": "".join(word.capitalize() for word in name.split("-"))}
    for path, template in zip(paths, (_PASS, _TEST), strict=True):
        with write_whole(path) as scratch:
            scratch.write_text(template.substitute(words), encoding="utf-8")
    return paths


def _refuse_taken(name: str) -> None:
    from graphopt.registry import PRESETS, pass_names

    if name in pass_names():
        raise UsageError(f"there is a pass '{name}' already", todo=f"see `graphopt passes {name}`")
    if name in PRESETS or name == "repeat":
        raise UsageError(f"'{name}' has a meaning in pipelines already")


def main() -> NoReturn:
    """Entry point of `python -m graphopt.tools.new_pass`."""
    try:
        if len(sys.argv) != 2:
            raise UsageError("one name is needed", todo="make new-pass NAME=fold-tanh")
        _, test = paths = create(sys.argv[1], Path.cwd())
    except GraphoptError as error:
        complain(error, as_json=False)
        sys.exit(error.exit_code)
    data(f"wrote {' and '.join(str(path.relative_to(Path.cwd())) for path in paths)}")
    data(f"both work as they are: .venv/bin/python -m pytest {test.relative_to(Path.cwd())}")
    sys.exit(0)


if __name__ == "__main__":
    main()
