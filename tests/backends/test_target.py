"""Targets as data: presets, JSON, files, errors that name everything wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt import target as module
from graphopt.errors import UsageError
from graphopt.target import Target


def test_this_machine_has_cores_and_a_vector_width() -> None:
    here = Target.parse("cpu")
    assert here.kind in ("cpu", "arm64")
    assert here.cores >= 1
    assert here.vector_bits in (128, 256, 512)
    assert Target.parse("cpu") == here


@pytest.mark.parametrize("name", [name for name in Target.names() if name != "cpu"])
def test_every_preset_round_trips(name: str, tmp_path: Path) -> None:
    preset = Target.parse(name)
    assert Target.from_json(preset.to_json()) == preset
    assert Target.parse(json.dumps(preset.to_json())) == preset
    path = tmp_path / "target.json"
    path.write_text(json.dumps(preset.to_json()))
    assert Target.parse(str(path)) == preset


def test_presets_say_what_they_are() -> None:
    assert Target.parse("x86-64-v4").vector_bits == 512
    assert Target.parse("cortex-a72").kind == "arm64"
    assert Target.parse("cuda").kind == "cuda"


def test_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UsageError, match="no target 'cortex-a71'") as error:
        Target.parse("cortex-a71")
    assert "cortex-a72" in str(error.value)


def test_every_wrong_field_is_named_at_once() -> None:
    data = Target.parse("arm64").to_json() | {"cores": 0, "kind": "toaster", "colour": "red"}
    del data["l1"]
    with pytest.raises(UsageError) as error:
        Target.from_json(data)
    for part in ("unknown field 'colour'", "missing field 'l1'", "wrong 'cores': 0", "wrong 'kind': 'toaster'"):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["{not json", "[1]x.json", "/nowhere/at/all.json"])
def test_unreadable_text_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        Target.parse(text)


def test_a_file_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(UsageError, match="an object of fields"):
        Target.parse(str(path))


def test_detection_falls_back_where_the_system_tells_nothing(tmp_path: Path) -> None:
    assert module._cpu_flags(str(tmp_path / "missing")) == set()
    assert module._cache_sizes(str(tmp_path / "missing")) == {}


def test_caches_are_read_as_the_system_writes_them(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate([(1, "Data", "32K"), (1, "Instruction", "64K"), (3, "Unified", "32M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in {"level": level, "type": kind, "size": size}.items():
            (folder / name).write_text(f"{value}\n")
    assert module._cache_sizes(str(tmp_path)) == {1: 32 << 10, 3: 32 << 20}
