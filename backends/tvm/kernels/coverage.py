"""Which rule wrote each function of a compiled model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GENERAL", "Coverage"]

GENERAL = "general"
"""In place of a rule's name: no rule took the function, the general schedule did what it could."""


@dataclass(frozen=True)
class Coverage:
    """The functions of a compiled model by what wrote them.

    The compiler names a function after the operators in it: `fused_convolution_add`, `cumsum`.

    Attributes:
        rules: the functions that each rule has taken; a rule that took none is not there.
        general: the functions that no rule took.
    """

    rules: Mapping[str, tuple[str, ...]]
    general: tuple[str, ...]

    @classmethod
    def of(cls, taken: Mapping[str, str]) -> Coverage:
        """From the rule (or `GENERAL`) of each function."""
        rules: dict[str, tuple[str, ...]] = {}
        for function, rule in sorted(taken.items()):
            rules[rule] = (*rules.get(rule, ()), function)
        general = rules.pop(GENERAL, ())
        return cls(rules, general)

    def to_json(self) -> dict[str, object]:
        return {"rules": {rule: list(names) for rule, names in self.rules.items()}, "general": list(self.general)}
