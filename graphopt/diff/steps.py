"""The page of a pipeline: the model before and after every pass, with what the pass did and what it left alone."""

from __future__ import annotations

from graphopt.diff.html import html_page
from graphopt.diff.page_data import PageData
from graphopt.instruments import Instrument
from graphopt.model import Model
from graphopt.transform import Pass, Report

__all__ = ["StepsPage"]


class StepsPage(Instrument):
    """Compares the model with itself after every pass, while the pipeline runs.

    Args:
        name: what to call the model.
        model: the model that goes into the pipeline.
    """

    def __init__(self, name: str, model: Model) -> None:
        self._data = PageData(name)
        self._first = self._last = model
        self._label = "at first"
        self._unchanged: int | None = None

    def after(self, step: Pass, model: Model, report: Report) -> None:
        title = f"{len(self._data.steps) + 1}. {report.text}"
        if report.changed:
            # Passes put new tensors in the place of old ones and write into none, so both models may share the rest.
            now, label = model.clone(share_tensors=True), f"after {title}"
            number = self._compare(self._last, now, self._label, label)
            self._last, self._label, self._unchanged = now, label, None
        else:
            if self._unchanged is None:
                self._unchanged = self._compare(self._last, self._last, self._label, self._label)
            number = self._unchanged
        self._data.step(title, number, report.edits, report.misses)

    def page(self) -> str:
        """The page of what has run so far, and at its end the pipeline as a whole.

        Raises:
            UsageError: when the layout library of the page was not fetched.
        """
        self._data.step("the whole pipeline", self._compare(self._first, self._last, "at first", "at the end"))
        return html_page(self._data.to_json())

    def _compare(self, a: Model, b: Model, name_a: str, name_b: str) -> int:
        from graphopt.diff import diff

        return self._data.compare(diff(a, b, names=(name_a, name_b)))
