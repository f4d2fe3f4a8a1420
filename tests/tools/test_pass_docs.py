"""docs/passes.md says what the docstrings say, and the examples in them run."""

from __future__ import annotations

import doctest
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from graphopt.errors import GraphoptError
from graphopt.registry import get_pass, pass_names
from graphopt.tools._pass_docs import HEADINGS, render, sections
from graphopt.transform import Pass

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: make docs"


@pytest.mark.parametrize("name", pass_names())
def test_example_runs(name: str) -> None:
    text = sections(get_pass(name))["Example"]
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples, "no line of the example starts with >>>"
    failures = []
    doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", pass_names())
def test_every_section_says_something(name: str) -> None:
    found = sections(get_pass(name))
    assert tuple(found) == ("", *HEADINGS) and all(text.strip() for text in found.values())
    assert name in found["Example"]


def test_docstring_without_a_section_is_refused() -> None:
    @dataclass(frozen=True)
    class Short(Pass):
        """Do little.

        What:
            Little.
        """

        name: ClassVar[str] = "short"

        def run(self, rw: object) -> None:
            """Do nothing."""

    with pytest.raises(GraphoptError, match="'short' has the sections What"):
        sections(Short)
