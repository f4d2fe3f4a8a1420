"""What a pass is: its contract, its options, and the report of what it did."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from graphopt.space import Space

if TYPE_CHECKING:
    from graphopt.analysis.cost import Cost
    from graphopt.rewriter import Rewriter

__all__ = ["Check", "Contract", "Edit", "EditKind", "Miss", "Option", "Pass", "Report", "format_value"]


@dataclass(frozen=True)
class Contract:
    """How far a pass may change the numbers.

    `EXACT`: the same bits but for reassociation of sums and products. `CLOSE(rtol)`: within `rtol` of the largest
    output. `LOSSY(metric)`: judged by a metric of the user's, not by the outputs.
    """

    name: str
    rtol: float | None = None
    metric: str | None = None

    EXACT: ClassVar[Contract]

    @classmethod
    def CLOSE(cls, rtol: float) -> Contract:
        return cls("close", rtol=rtol)

    @classmethod
    def LOSSY(cls, metric: str) -> Contract:
        return cls("lossy", metric=metric)

    def __str__(self) -> str:
        detail = self.rtol if self.rtol is not None else self.metric
        return self.name if detail is None else f"{self.name}({detail})"


Contract.EXACT = Contract("exact")


class EditKind(enum.Enum):
    """What happened to a node or a tensor."""

    REPLACE = "replace"
    UPDATE = "update"
    ERASE = "erase"
    SET_TENSOR = "set-tensor"


@dataclass(frozen=True)
class Edit:
    """One journaled change: the node it started at, the text before and after, and why."""

    kind: EditKind
    node: str
    before: str
    after: str
    why: str


@dataclass(frozen=True)
class Miss:
    """A node that a pass looked at and left alone, and the reason."""

    node: str
    reason: str


@dataclass(frozen=True)
class Check:
    """What the numeric check found: the largest error relative to the largest reference output, and the limit."""

    error: float
    limit: float
    samples: int


@dataclass(frozen=True)
class Report:
    """What one pass did. Costs are None for a pass that changed nothing; `findings` is what the pass itself reports."""

    name: str
    text: str
    edits: tuple[Edit, ...]
    misses: tuple[Miss, ...]
    seconds: float
    cost_before: Cost | None = None
    cost_after: Cost | None = None
    check: Check | None = None
    findings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.edits)

    def to_json(self) -> dict[str, Any]:
        return {
            "pass": self.name,
            "text": self.text,
            "edits": [dataclasses.asdict(edit) | {"kind": edit.kind.value} for edit in self.edits],
            "misses": [dataclasses.asdict(miss) for miss in self.misses],
            "seconds": self.seconds,
            "cost_before": self.cost_before.to_json() if self.cost_before else None,
            "cost_after": self.cost_after.to_json() if self.cost_after else None,
            "check": dataclasses.asdict(self.check) if self.check else None,
            "findings": dict(self.findings),
        }


@dataclass(frozen=True)
class Option:
    """One option of a pass: its name on the command line, its type, its default (None: it has to be given)."""

    name: str
    type: Any
    default: Any
    required: bool


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a model. Subclasses are frozen dataclasses whose fields are the options.

    `name` is the kebab-case name in pipelines. `run` edits through the rewriter only, and for every candidate it
    leaves alone calls `rw.skip(node, reason)`. `space` is what `graphopt.search` may try of it; a pass without
    one takes part where it is named. The docstring has the sections What, Algebra, When it applies, Safety, Cost,
    Source, Example.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[tuple[str, ...]] = ()
    space: ClassVar[Space | None] = None

    @abstractmethod
    def run(self, rw: Rewriter) -> None:
        """Rewrite the model that `rw` holds."""

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options by their command-line name (`size_limit` is written `size-limit`)."""
        hints = typing.get_type_hints(cls)
        found = {}
        for field in dataclasses.fields(cls):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            default = None if required else field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            name = field.name.replace("_", "-")
            found[name] = Option(name, hints[field.name], default, required)
        return found

    def __str__(self) -> str:
        """The text form, options that have their default left out: `fold-constants{size-limit=4096}`."""
        given = {
            name: value
            for name, option in self.options().items()
            if (value := getattr(self, name.replace("-", "_"))) != option.default or option.required
        }
        if not given:
            return self.name
        return f"{self.name}{{{','.join(f'{name}={format_value(value)}' for name, value in given.items())}}}"


def format_value(value: Any) -> str:
    """An option value as pipelines write it; lists are separated by `;`."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return ";".join(format_value(item) for item in value)
    return "none" if value is None else str(value)


def parse_value(text: str, kind: Any) -> Any:
    """The inverse of `format_value` for a field of type `kind`.

    Raises:
        ValueError: when the text is not such a value.
    """
    choices = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if text == "none" and type(None) in choices:
            return None
        for choice in (c for c in choices if c is not type(None)):
            try:
                return parse_value(text, choice)
            except ValueError:
                continue
        raise ValueError(text)
    if typing.get_origin(kind) is tuple:
        return tuple(parse_value(item, choices[0]) for item in text.split(";")) if text else ()
    if typing.get_origin(kind) is typing.Literal:
        if text not in choices:
            raise ValueError(text)
        return text
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(f"options of type {kind} cannot be written as text")
