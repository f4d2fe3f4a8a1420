"""Targets as data: presets, JSON, files, errors that name everything wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graphopt import cpus
from graphopt import target as module
from graphopt.errors import UsageError
from graphopt.target import Target


def test_this_machine_has_cores_and_a_vector_width() -> None:
    here = Target.parse("cpu")
    assert here.kind != "cuda"
    assert here.cores >= 1
    assert here.vector_bits in (0, 128, 256, 512)
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
    assert Target.parse("armv7").needs >= {"neon", "vfpv3"} and "vfpv4" not in Target.parse("armv7").needs
    assert "vfpv4" in Target.parse("cortex-a15").needs
    assert Target.parse("riscv64").vector_bits == 0


def test_every_preset_says_how_it_was_tested() -> None:
    assert all(len(Target.tested(name)) > 5 for name in Target.names())
    assert "qemu" in Target.tested("cortex-a72") and "qemu" not in Target.tested("cuda")


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


def changed(name: str, **changes: object) -> Target:
    """A preset with other fields, as a JSON file would give it."""
    return Target.from_json(Target.parse(name).to_json() | changes)


@pytest.mark.parametrize(
    ("name", "changes", "texts"),
    [
        ("x86-64-v3", {"cpu": "skylake-avx51"}, ("unknown CPU 'skylake-avx51' of x86_64", "skylake-avx512")),
        ("x86-64-v3", {"features": ["avx2", "avx512vni"]}, ("unknown feature 'avx512vni'", "avx512vnni")),
        ("x86-64-v3", {"cpu": "cortex-a72"}, ("unknown CPU 'cortex-a72' of x86_64",)),
        ("cortex-a72", {"cpu": "cortex-a7b"}, ("unknown CPU 'cortex-a7b' of aarch64", "cortex-a76")),
        ("cortex-a72", {"features": ["asimdp"]}, ("unknown feature 'asimdp' of aarch64", "asimddp")),
        ("cortex-a72", {"arch": "arm64"}, ("wrong 'arch' of kind arm64: 'arm64', it is aarch64",)),
        ("x86-64", {"cpu": "i686"}, ("unknown CPU 'i686'",)),
        ("x86-64", {"cpu": "zen3", "features": ["sse9"], "cores": 0}, ("'zen3'", "'sse9'", "wrong 'cores'")),
    ],
)
def test_names_that_do_not_exist_are_refused_with_the_nearest(
    name: str, changes: dict[str, object], texts: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        changed(name, **changes)
    assert all(text in str(error.value) for text in texts), error.value


def test_a_target_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="unknown CPU 'skylakex'"):
        replace(Target.parse("x86-64-v4"), cpu="skylakex")


def test_the_name_of_a_cpu_is_no_target_but_leads_to_one() -> None:
    with pytest.raises(UsageError, match="no target 'znver2'") as error:
        Target.parse("znver2")
    assert "a CPU of x86_64. Did you mean znver4 or znver3? Or write a JSON file" in str(error.value)
    with pytest.raises(UsageError, match=r"a CPU of aarch64. Did you mean cortex-a\d\d or"):
        Target.parse("cortex-a73")
    assert "avx2" in changed("x86-64", cpu="znver2").needs


def test_features_in_the_spelling_of_llvm_are_translated() -> None:
    assert changed("x86-64", features=["sse4.2", "bmi", "avx2", "avx2"]).features == ("avx2", "bmi1", "sse4_2")
    assert changed("arm64", features=["neon", "fullfp16"]).features == ("asimd", "asimdhp", "fphp")


def test_a_machine_lacks_what_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    small = changed("x86-64-v3", features=["avx2"])
    monkeypatch.setattr(module, "this_machine", lambda: small)
    assert module.why_not_here(small) is None
    assert module.why_not_here(Target.parse("x86-64")) is None
    reason = module.why_not_here(changed("x86-64", cpu="skylake-avx512", features=["avx512_vnni"]))
    assert reason is not None and "avx512_vnni, avx512bw, avx512cd" in reason and "x86-64-v3 (" in reason
    assert "avx2" not in reason.partition(";")[0]
    assert "this machine is x86_64" in str(module.why_not_here(Target.parse("cortex-a72")))


def test_this_machine_runs_code_for_itself() -> None:
    assert module.why_not_here(Target.parse("cpu")) is None


TRIPLES = {"armv7": "armv7a-linux-gnueabihf"}


@pytest.mark.parametrize("arch", ["x86_64", "aarch64", "armv7", "riscv64"])
def test_the_table_of_processors_is_the_compilers(arch: str) -> None:
    from tvm.target import Target as Compiled
    from tvm.target import codegen

    def features(**more: object) -> set[str]:
        return {str(f) for f in codegen.llvm_get_cpu_features(Compiled({**triple, **more}))}

    triple = {"kind": "llvm", "mtriple": TRIPLES.get(arch, f"{arch}-linux-gnu")}
    table = cpus._table(arch)
    listed = {str(cpu) for cpu in codegen.llvm_get_cpu_archlist(Compiled(triple)) if "_" not in str(cpu)}
    if arch == "x86_64":
        listed = {cpu for cpu in listed if "64bit" in features(mcpu=cpu)}
    if arch in ("x86_64", "aarch64"):  # of the others not all are listed
        assert listed <= set(table["cpus"])
    assert all(codegen.llvm_is_valid_cpu(cpu, triple["mtriple"]) for cpu in table["cpus"])
    for cpu in table["cpus"]:
        found = features(mcpu=cpu)
        assert cpus.features_of(arch, cpu) == {name for name, llvm in table["features"].items() if llvm in found}, cpu
    for name in cpus.known_features(arch):
        (llvm,) = cpus.llvm_names(arch, [name])
        assert llvm in features(mattr=[f"+{llvm}"]), llvm
