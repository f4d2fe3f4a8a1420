"""`graphopt sensitivity`: errors that are known otherwise, what is written, what is refused."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt as go
from graphopt.analysis.coupling import couple
from graphopt.analysis.removal import Conflict, Removal
from graphopt.errors import GraphoptError
from graphopt.passes import _sensitivity
from graphopt.passes._sensitivity import FRACTIONS, Row, sensitivity
from graphopt.surgery import masked_outputs
from graphopt.tools import sensitivity as command
from graphopt.tools._heat_map import heat_map
from tests.coupling import nets
from tests.tools.command import graphopt, output, refused

HIDDEN = 10


class TwoBranches(nn.Module):
    """What `heard` computes is read with weights, what `unheard` computes with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.unheard = nn.Linear(6, HIDDEN), nn.Linear(6, 4)
        self.reads_heard, self.reads_unheard = nn.Linear(HIDDEN, 3), nn.Linear(4, 3)
        nn.init.zeros_(self.reads_unheard.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.reads_heard(torch.relu(self.heard(x))) + self.reads_unheard(torch.relu(self.unheard(x)))


@pytest.fixture(scope="module")
def two() -> SimpleNamespace:
    """The net, its model and a batch for it."""
    torch.manual_seed(0)
    net, x = TwoBranches().eval(), torch.randn(64, 6)
    return SimpleNamespace(net=net, model=go.capture(net, (x,)), x=x)


@pytest.fixture(scope="module")
def files(two: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The model and the batch as files."""
    folder = tmp_path_factory.mktemp("two")
    two.model.save(folder / "two.gopt")
    np.savez(folder / "calib.npz", x=two.x.numpy())
    return SimpleNamespace(model=folder / "two.gopt", calib=folder / "calib.npz")


def by_hand(two: SimpleNamespace, fraction: float) -> tuple[float, float]:
    """The error without the units of least magnitude, when they are zeroed and when the readout is fitted again."""
    net = two.net
    with torch.no_grad():
        magnitude = net.heard.weight.square().sum(1) + net.reads_heard.weight.square().sum(0)
        hidden, expected = torch.relu(net.heard(two.x)).double(), two.model(two.x).double()
        kept = magnitude.argsort()[round(HIDDEN * fraction) :]
        zeroed = torch.zeros_like(hidden)
        zeroed[:, kept] = hidden[:, kept]
        lost = (hidden - zeroed) @ net.reads_heard.weight.double().T
    known = torch.cat((hidden[:, kept], torch.ones(len(hidden), 1)), 1)
    fitted = known @ torch.linalg.lstsq(known, expected).solution
    size = expected.square().sum()
    return float((lost.square().sum() / size).sqrt()), float(((fitted - expected).square().sum() / size).sqrt())


def test_errors_are_those_of_zeroing_and_of_least_squares(two: SimpleNamespace) -> None:
    rows = sensitivity(two.model, [[two.x]], importance="magnitude", fractions=(0.5, 0.2, 0.8), only=["heard"])
    assert [row.fraction for row in rows] == [0.2, 0.5, 0.8] and [row.removed for row in rows] == [2, 5, 8]
    for row in rows:
        cut, fitted = by_hand(two, row.fraction)
        assert row.error == pytest.approx(cut, rel=1e-5) and cut > 0.01
        # The readout is held back a little, so that it does well on other data too.
        assert fitted * (1 - 1e-3) <= row.refitted <= fitted * 1.05 and row.refitted < row.error
        assert row.parameters == pytest.approx(
            1 - row.removed * (6 + 1 + 3) / sum(p.numel() for p in two.net.parameters())
        )
    assert [row.macs for row in rows] == [pytest.approx(1 - row.removed * 9 / (14 * 9)) for row in rows]


def test_a_group_that_nobody_hears_loses_nothing(two: SimpleNamespace) -> None:
    rows = [row for row in sensitivity(two.model, [[two.x]]) if row.group == "unheard"]
    assert [row.removed for row in rows] == [0, 1, 2, 3, 3]
    assert all(row.error == 0 and row.refitted == pytest.approx(0, abs=1e-6) for row in rows)
    assert rows[0].macs == 1 and 0 < rows[4].macs < rows[1].macs < 1


def test_batches_are_one_set_of_data_and_the_model_stays(two: SimpleNamespace) -> None:
    text, halves = str(two.model), [[two.x[:32]], [two.x[32:]]]
    torch.manual_seed(1)
    small = go.capture(two.net, (two.x[:32],))
    together = sensitivity(two.model, [[two.x]], importance="l1", only=["heard"])
    apart = sensitivity(small, halves, importance="l1", only=["heard"])
    assert [row.error for row in apart] == [pytest.approx(row.error, rel=1e-5) for row in together]
    assert str(two.model) == text and two.model.history == ()


@pytest.mark.parametrize("name", ["attention", "shuffle"])
def test_every_family_agrees_with_the_oracle(name: str) -> None:
    net, args, _ = nets.build(name)
    model = go.capture(net, args).eval()
    (inputs,) = [model.flatten_inputs(args, {})]
    coupling = couple(model)
    rows = sensitivity(model, [inputs], importance="magnitude", fractions=[0.5], refit=False)
    assert [(row.group, row.family, row.units) for row in rows] == [
        (group.name, number, len(family))
        for group in coupling.groups.values()
        for number, family in enumerate(group.families)
    ]
    scores = _sensitivity.measure("magnitude", coupling, [inputs], 0)
    for row in rows:
        group = coupling.groups[row.group]
        units = np.argsort(scores.scores(group, row.family), kind="stable")[: row.removed]
        removal = Removal(coupling, [c for unit in units for c in group.families[row.family][unit]])
        with torch.no_grad():
            masked, expected = masked_outputs(model, removal, inputs), model.call_flat(inputs)
        lost = sum(float((a - b).double().square().sum()) for a, b in zip(masked, expected, strict=True))
        size = sum(float(b.double().square().sum()) for b in expected)
        assert row.error == pytest.approx((lost / size) ** 0.5, rel=1e-4) and row.refitted is None


def test_something_of_every_tensor_stays() -> None:
    net, args, _ = nets.build("c2f")  # whose first convolution is split in halves
    model = go.capture(net, args)
    (row,) = sensitivity(model, [model.flatten_inputs(args, {})], fractions=[0.97], only=["cv1"])
    assert (row.units, row.removed, row.reason) == (12, 10, None) and row.error > 0


def test_fractions_that_round_alike_are_cut_once(two: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[int] = []
    monkeypatch.setattr(
        _sensitivity, "cut_copy", lambda *given, cut=_sensitivity.cut_copy: (cuts.append(1), cut(*given))[1]
    )
    rows = sensitivity(two.model, [[two.x]], fractions=(0.5, 0.51, 0.49), refit=False, only=["heard"])
    assert len(cuts) == 1 and len({row.error for row in rows}) == 1


def refuse_some(coupling: object, classes: object, cut=_sensitivity.cut_copy) -> go.Model:
    """A cut that cannot be made when much goes."""
    if len(classes) > 5:
        raise Conflict("nothing would be left", where="'cat'")
    return cut(coupling, classes)


def test_what_cannot_be_cut_is_a_row_with_the_reason(
    files: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sensitivity, "cut_copy", refuse_some)
    page = tmp_path / "page.html"
    found = output("sensitivity", files.model, "--calib", files.calib, "--only", "heard", "--html", page)
    last = found["rows"][-1]
    assert last["error"] is last["refitted"] is last["macs"] is None and found["rows"][0]["reason"] is None
    assert last["reason"] == "nothing would be left, at 'cat'"
    assert re.search(r'class="cell unknown"[^>]*nothing would be left', page.read_text())
    shown = graphopt("sensitivity", files.model, "--calib", files.calib).stdout
    assert "?: heard at 90 %: nothing would be left, at 'cat'" in shown


# The command


def test_json_has_a_row_for_every_group_and_fraction(files: SimpleNamespace) -> None:
    found = output("sensitivity", files.model, "--calib", files.calib, "--calib", files.calib)
    assert list(found) == ["input", "importance", "batches", "rows"]
    assert (found["input"], found["importance"], found["batches"]) == (str(files.model), "taylor", 2)
    fields = ["group", "family", "units", "fraction", "removed", "error", "refitted", "macs", "parameters", "reason"]
    assert all(list(row) == fields for row in found["rows"])
    expected = [(group, fraction) for group in ("heard", "unheard") for fraction in FRACTIONS]
    assert [(row["group"], row["fraction"]) for row in found["rows"]] == expected


def test_tables_show_both_errors(files: SimpleNamespace) -> None:
    arguments = ("sensitivity", files.model, "--calib", files.calib, "--fractions", "0.1,0.5")
    result = graphopt(*arguments)
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["unheard", "4", "-", "0"] in lines and sum(line[:2] == ["heard", "10"] for line in lines) == 2
    assert ["group", "units", "10", "%", "50", "%"] in lines and "less than a unit" in result.stdout
    assert "refitted" not in graphopt(*arguments, "--no-refit").stdout


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", stream := Terminal())
    command._show([Row("a", 0, 4, 0.5, 2, 0.5, 0.001), Row("a", 0, 4, 0.8, 3, None)], refit=True)
    assert "\x1b[31m" in stream.getvalue() and "\x1b[32m" in stream.getvalue()


def test_the_page_has_a_cell_for_every_pair(files: SimpleNamespace, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = graphopt("sensitivity", files.model, "--calib", files.calib, "--html", page)
    assert result.exit_code == 0 and "wrote" in result.stderr
    text = page.read_text()
    cells = re.findall(r'<td class="cell.*?title="(\w+): (\d+) of \d+ units go.*?">([^<]+)</td>', text)
    assert len(cells) == 2 * 2 * len(FRACTIONS) and {cell[0] for cell in cells} == {"heard", "unheard"}
    assert all(re.fullmatch(r"-|[\d.e-]+", shown) for *_, shown in cells)
    assert "http" not in text and "prefers-color-scheme: dark" in text


def test_the_page_holds_any_names_and_any_errors() -> None:
    rows = [Row("<b>", 1, 4, 0.5, 2, error, None) for error in (0.0, 1e-30, 3.0, None)]
    text = heat_map("<i>&", "taylor", rows)
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt; | 2" in text
    assert re.findall(r"--v:(\d+)%", text) == ["0", "0", "100", "0"]
    assert "refitted" not in text and "Nothing can be removed" in heat_map("x", "taylor", [])


def test_a_model_that_can_lose_nothing_is_no_error(tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=np.ones((2, 3), np.float32))
    result = graphopt("sensitivity", "tests.tools.nets:unknown", "--calib", tmp_path / "calib.npz")
    assert result.exit_code == 0 and "0 groups" in result.stdout


# What is refused


def test_calibration_data_are_needed(files: SimpleNamespace, tmp_path: Path) -> None:
    refused(graphopt("sensitivity", files.model), 2, "needs calibration data", "--calib DATA.npz", "numpy.savez")
    np.savez(tmp_path / "bad.npz", x=np.ones((64, 7), np.float32))
    refused(graphopt("sensitivity", files.model, "--calib", tmp_path / "bad.npz"), 2, "bad.npz", "float32[64, 6]")
    np.savez(tmp_path / "nan.npz", x=np.full((64, 6), np.nan, np.float32))
    refused(graphopt("sensitivity", files.model, "--calib", tmp_path / "nan.npz"), 2, "holds NaN")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--only", "hear"), ("there is no group 'hear'", "did you mean heard")),
        (("--fractions", "0.5,1"), ("1: a fraction is more than 0 and less than 1", "such as 0.25,0.5")),
        (("--fractions", "-0.5"), ("-0.5: a fraction",)),
        (("--fractions", "nan"), ("nan: a fraction",)),
        (("--fractions", "half"), ("'half' is no list of fractions",)),
        (("--fractions", ","), ("there are no fractions",)),
        (("--importance", "tailor"), ("there is no importance 'tailor'", "did you mean taylor")),
    ],
)
def test_wrong_options_are_refused(files: SimpleNamespace, options: tuple[str, ...], texts: tuple[str, ...]) -> None:
    refused(graphopt("sensitivity", files.model, "--calib", files.calib, *options), 2, *texts)


class Chooses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


def test_outputs_that_tell_no_error_are_refused(two: SimpleNamespace) -> None:
    silent = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False))
    nn.init.zeros_(silent[1].weight)
    for net, batches, text in (
        (Chooses(), [[two.x]], "no output has floating point"),
        (silent, [[two.x]], "are all zero"),
        (two.net, [], "needs calibration data"),
    ):
        with pytest.raises(GraphoptError, match=text):
            sensitivity(go.capture(net, (two.x,)), batches)
