"""Bad input: one clear error, the right exit code, and nothing written."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphopt as go
from tests.tools.command import NETS, graphopt, refused

PASSES = "fold-batch-norm"
NETS_FILE = Path(__file__).with_name("nets.py")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to write to, which the test leaves empty."""
    place = tmp_path / "out"
    place.mkdir()
    yield place
    assert not list(place.iterdir()), "something was written"


def every_command(source: object, folder: Path) -> list[tuple[object, ...]]:
    """The commands that read a model, with that model."""
    return [
        ("info", source),
        ("explain", source, "-p", PASSES),
        ("opt", source, "-p", PASSES, "-o", folder / "out.gopt"),
        ("build", source, "-p", PASSES, "-o", folder / "bundle"),
        ("run", source, "-o", folder / "y.npz"),
        ("bench", source, "-p", PASSES),
    ]


# Models that cannot be read


def linear(**changes: object) -> onnx.ModelProto:
    """y = x + w, with changes to the model: opset, operator, domain."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3], np.ones(3, np.float32))
    node = helper.make_node(changes.get("operator", "Add"), ["x", "w"], ["y"], "the_node", domain=changes.get("domain"))
    ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3])] for name in ("x", "y")]
    opsets = [helper.make_opsetid("", int(changes.get("opset", 20)))]
    if changes.get("domain"):
        opsets.append(helper.make_opsetid(str(changes["domain"]), 1))
    return helper.make_model(helper.make_graph([node], "net", *ends, [weight]), opset_imports=opsets)


def truncated(path: Path) -> None:
    onnx.save(linear(), path)
    path.write_bytes(path.read_bytes()[:-20])


def text(path: Path) -> None:
    path.write_text("this is no model\n" * 20)


def outside(path: Path) -> None:
    """External data one folder up, where a file with the right size lies."""
    model = linear()
    (path.parent.parent / "secret.bin").write_bytes(np.ones(3, np.float32).tobytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    path.write_bytes(model.SerializeToString())


def saved(**changes: object) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(linear(**changes).SerializeToString()) and None


FILES: dict[str, tuple[Callable[[Path], object], int, tuple[str, ...]]] = {
    "missing": (lambda path: None, 2, ("there is no file", "net.onnx")),
    "truncated": (truncated, 2, ("net.onnx",)),
    "text": (text, 2, ("net.onnx",)),
    "empty": (lambda path: path.write_bytes(b""), 2, ("net.onnx",)),
    "a folder": (lambda path: path.mkdir(), 2, ("net.onnx",)),
    "data outside its folder": (outside, 2, ("secret.bin",)),
    "old opset": (saved(opset=5), 3, ("opset", "5")),
    "unknown operator": (saved(operator="NoSuchOperator"), 3, ("NoSuchOperator", "the_node")),
    "unknown domain": (saved(operator="Mine", domain="com.example"), 3, ("com.example",)),
}


@pytest.mark.parametrize("kind", FILES)
def test_onnx_file(kind: str, folder: Path, tmp_path: Path) -> None:
    make, code, texts = FILES[kind]
    path = tmp_path / "models" / "net.onnx"
    path.parent.mkdir()
    make(path)
    refused(graphopt("opt", path, "-p", PASSES, "-o", folder / "out.gopt"), code, *texts)
    result = graphopt("info", path, "--json")
    assert result.exit_code == code and not result.stdout
    found = json.loads(result.stderr)
    assert found["exit_code"] == code and all(any(text in str(value) for value in found.values()) for text in texts)


@pytest.mark.parametrize("suffix", [".gopt", ".pt2"])
@pytest.mark.parametrize("kind", ["missing", "text", "empty", "a folder"])
def test_other_files(suffix: str, kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    FILES[kind][0](path)
    for command in every_command(path, folder):
        refused(graphopt(*command), 2, f"net{suffix}")


def test_a_truncated_model(folder: Path, model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.gopt"
    path.write_bytes(model_file.read_bytes()[:-100])
    refused(graphopt("opt", path, "-p", PASSES, "-o", folder / "out.gopt"), 2, "half.gopt")


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "net.bin", "net"):
        refused(graphopt("opt", source, "-p", PASSES, "-o", folder / "out.gopt"), 2, "no model file", ".onnx")
    refused(graphopt("run", tmp_path, "-o", folder / "y.npz"), 2, "is not a saved artifact")


def test_module_and_callable(folder: Path) -> None:
    cases = {
        "no_such_module:net": (2, "the module 'no_such_module'"),
        f"{NETS}:no_such_net": (2, "has no function 'no_such_net'"),
        f"{NETS}:": (2, "is not module:callable"),
        ":small": (2, "is not module:callable"),
        f"{NETS}:fails": (2, "ZeroDivisionError"),
        f"{NETS}:returns_a_module": (2, "returned a Linear"),
    }
    for source, (code, reason) in cases.items():
        refused(graphopt("opt", source, "-p", PASSES, "-o", folder / "out.gopt"), code, reason)


def test_data_dependent_control_flow_names_the_users_line(folder: Path) -> None:
    result = graphopt("opt", f"{NETS}:branch", "-p", PASSES, "-o", folder / "out.gopt")
    message = refused(result, 3, "decides by the values of a tensor", "do:")
    line = next(at for at, row in enumerate(NETS_FILE.read_text().splitlines(), 1) if "if x.sum() > 0:" in row)
    assert f"{NETS_FILE}:{line}: if x.sum() > 0:" in message
    assert "def forward" not in result.stderr, "torch prints the half-traced graph"


def test_an_operator_that_a_backend_cannot_run(folder: Path) -> None:
    result = graphopt("build", f"{NETS}:unknown", "-p", PASSES, "-o", folder / "bundle")
    refused(result, 3, "the backend 'tvm' cannot run", "special_bessel_j0", "do:")


def test_what_a_format_cannot_hold(folder: Path) -> None:
    refused(graphopt("run", f"{NETS}:half", "-o", folder / "y.npz"), 3, "bfloat16")


# Wrong words on the command line


def test_all_wrong_passes_and_options_at_once(model_file: Path, folder: Path) -> None:
    for command in ("opt", "build"):
        result = graphopt(
            command, model_file, "-p", "fold-batchnorm,fold-batch-norm{rate=1},xyz", "-o", folder / "x.gopt"
        )
        refused(result, 2, "'fold-batchnorm'", "did you mean fold-batch-norm", "no option 'rate'", "'xyz'")
    refused(graphopt("explain", model_file, "-p", "fold-batchnorm"), 2, "did you mean fold-batch-norm")
    refused(graphopt("bench", model_file, "-p", "fold-batchnorm"), 2, "did you mean fold-batch-norm")


def test_broken_pipelines(model_file: Path, folder: Path) -> None:
    for pipeline, reason in {
        "": "is empty",
        " ": "is empty",
        ",": "missing",
        f"{PASSES},": "missing",
        "a;b": "';'",
    }.items():
        for command in ("opt", "build"):
            refused(graphopt(command, model_file, "-p", pipeline, "-o", folder / "x.gopt"), 2, reason)


def test_unknown_targets_backends_and_systems(model_file: Path, folder: Path) -> None:
    build = ("build", model_file, "-p", PASSES, "-o", folder / "bundle")
    refused(graphopt(*build, "--target", "cortex-a71"), 2, "there is no target 'cortex-a71'", "cortex-a72")
    refused(graphopt(*build, "--target", "none.json"), 2, "none.json")
    refused(graphopt(*build, "--backend", "tmv"), 2, "there is no backend 'tmv'", "tvm")
    refused(graphopt("run", model_file, "--backend", "x", "-o", folder / "y.npz"), 2, "there is no backend 'x'")
    message = refused(graphopt("bench", model_file, "--against", "onnxruntim,nothing"), 2, "'onnxruntim'", "'nothing'")
    assert "did you mean onnxruntime?" in message


def test_unknown_commands_and_options(model_file: Path) -> None:
    refused(graphopt("optimise"), 2, "No such command 'optimise'")
    refused(graphopt("--frob"), 2, "--frob", "graphopt --help")
    refused(graphopt("info", model_file, "--frob"), 2, "--frob", "graphopt info --help")
    refused(graphopt("info"), 2, "IN", "graphopt info --help")
    refused(graphopt("opt", model_file), 2, "--output")
    refused(graphopt("info", model_file, "--per", "layer"), 2, "'module', 'node'")
    refused(graphopt("info", model_file, "--at", "batch"), 2, "'batch'", "NAME=NUMBER")
    refused(graphopt("info", model_file, "--at", "n=2"), 2, "batch")
    refused(graphopt("bench", model_file, "--at", "n=2", "-p", PASSES), 2, "no free size 'n'", "batch")
    found = json.loads(graphopt("info", "--frob", "--json").stderr)
    assert found["exit_code"] == 2 and "--frob" in found["what"]


# Places that cannot be written


def test_places_that_cannot_be(model_file: Path, folder: Path, tmp_path: Path) -> None:
    refused(graphopt("opt", model_file, "-o", folder / "out.txt"), 2, "out.txt", ".gopt")
    refused(graphopt("opt", model_file, "-o", folder / "no" / "out.gopt"), 2, "there is no folder")
    refused(graphopt("build", model_file, "-o", folder / "no" / "bundle"), 2, "there is no folder")
    refused(graphopt("run", model_file, "-o", folder / "y.npy"), 2, ".npz")
    refused(graphopt("build", model_file, "-o", model_file.parent / "small.gopt" / "x"), 2, "there is no folder")
    onnx_folder = tmp_path / "folder.onnx"
    onnx_folder.mkdir()
    refused(graphopt("opt", model_file, "-o", onnx_folder), 2, "is a folder")
    refused(graphopt("opt", model_file, "-o", folder / "x.gopt", "--print-after", "fold"), 2, "there is no pass 'fold'")


def test_folders_of_others_are_not_replaced(model_file: Path, folder: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.gopt"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    refused(graphopt("build", model_file, "-o", precious), 2, "holds something else")
    refused(graphopt("build", model_file, "-o", file), 2, "is a file")
    refused(graphopt("opt", model_file, "-o", precious), 2, "holds something else")
    refused(graphopt("opt", model_file, "-o", folder / "x.gopt", "--repro", precious), 2, "holds something else")
    assert (precious / "thesis.txt").read_text() == file.read_text() == "mine"


@contextmanager
def full_disk(size: int = 2048) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing fails as on a full disk.

    Modules that are imported meanwhile are not kept compiled: Python does not notice that what it writes is cut off.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    keeps, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = keeps


@pytest.mark.parametrize("suffix", [".gopt", ".pt2", ".onnx"])
def test_full_disk_while_saving(suffix: str, model_file: Path, folder: Path) -> None:
    with full_disk():
        result = graphopt("opt", model_file, "-p", PASSES, "-o", folder / f"out{suffix}")
    refused(result, 2, f"out{suffix}' cannot be written", "nothing was left behind")


def test_full_disk_keeps_the_older_file(model_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gopt"
    path.write_bytes(b"older")
    with full_disk():
        refused(graphopt("opt", model_file, "-p", PASSES, "-o", path), 2, "cannot be written")
    assert path.read_bytes() == b"older" and list(tmp_path.iterdir()) == [path]


def test_full_disk_while_running_and_building(model_file: Path, x_file: Path, folder: Path) -> None:
    with full_disk(300):
        result = graphopt("run", model_file, "--input", f"input={x_file}", "-o", folder / "y.npz")
    refused(result, 2, "y.npz' cannot be written")


# Inputs that do not fit


def arrays(tmp_path: Path) -> dict[str, Path]:
    made = {
        "wide": np.zeros((2, 4, 8, 8), np.float32),
        "flat": np.zeros(3, np.float32),
        "double": np.zeros((2, 3, 8, 8)),
        "pickled": np.array([{}], dtype=object),
    }
    for name, array in made.items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "several.npz", input=made["wide"], other=made["flat"])
    return {name: tmp_path / f"{name}.npy" for name in (*made, "text", "missing")}


@pytest.mark.parametrize("what", ["model", "bundle"])
def test_wrong_arrays(what: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, files = request.getfixturevalue("model_file" if what == "model" else "bundle"), arrays(tmp_path)
    run = ("run", source, "-o", folder / "y.npz")
    cases = {
        "wide": "input 'input' has shape [2, 4, 8, 8], the model takes [batch, 3, 8, 8]",
        "flat": "input 'input' has shape [3], the model takes [batch, 3, 8, 8]",
        "double": "input 'input' has dtype float64, the model takes float32",
        "pickled": "is no .npy or .npz file of plain numbers",
        "text": "is no .npy or .npz file of plain numbers",
        "missing": "there is no file",
    }
    for name, reason in cases.items():
        refused(graphopt(*run, "--input", f"input={files[name]}"), 2, reason)
    refused(graphopt(*run), 2, "input 'input' is missing", "the model takes input: float32[batch, 3, 8, 8]")
    result = graphopt(*run, "--inputs", tmp_path / "several.npz")
    refused(result, 2, "there is no input 'other'", "has shape [2, 4, 8, 8]")
    refused(graphopt(*run, "--input", f"x={files['double']}"), 2, "there is no input 'x'", "input 'input' is missing")
    refused(graphopt(*run, "--input", str(files["wide"])), 2, "is not NAME=FILE")
    twice = ("--input", f"input={files['wide']}", "--input", f"input={files['wide']}")
    refused(graphopt(*run, *twice), 2, "input 'input' is given twice")


def test_wrong_calibration(model_file: Path, folder: Path, tmp_path: Path) -> None:
    arrays(tmp_path)
    opt = ("opt", model_file, "-p", PASSES, "-o", folder / "out.gopt", "--calib")
    refused(graphopt(*opt, tmp_path / "several.npz"), 2, "several.npz", "there is no input 'other'")
    refused(graphopt(*opt, tmp_path / "wide.npy"), 2, "one array without a name")
    refused(graphopt(*opt, model_file), 2, "is no .npz file")


# Bundles


def test_damaged_bundles(bundle: Path, x_file: Path, folder: Path, tmp_path: Path) -> None:
    library = next(path.name for path in bundle.iterdir() if path.suffix == ".so")
    damages: dict[str, Callable[[Path], object]] = {
        "no manifest": lambda copy: (copy / "manifest.json").unlink(),
        "manifest cut": lambda copy: (copy / "manifest.json").write_text("{"),
        "manifest empty": lambda copy: (copy / "manifest.json").write_text("{}"),
        "no library": lambda copy: (copy / library).unlink(),
        "library changed": lambda copy: (copy / library).write_bytes((copy / library).read_bytes()[:-1] + b"?"),
        "runtime cut": lambda copy: (copy / "lib" / "libtvm_runtime.so").write_bytes(b"x"),
    }
    for kind, damage in damages.items():
        copy = tmp_path / kind.replace(" ", "-")
        shutil.copytree(bundle, copy)
        damage(copy)
        refused(graphopt("run", copy, "--input", f"input={x_file}", "-o", folder / "y.npz"), 2, copy.name)


def test_bundles_have_their_sizes_and_no_model(bundle: Path) -> None:
    refused(graphopt("bench", bundle), 2, "batch may be anything", "--at batch=")
    refused(graphopt("info", bundle), 2, "no model file")


def test_a_fixed_batch_stays(tmp_path: Path) -> None:
    go.capture(torch.nn.Linear(3, 3), (torch.randn(2, 3),)).save(tmp_path / "fixed.gopt")
    refused(graphopt("bench", tmp_path / "fixed.gopt", "--batch", 4, "-p", PASSES), 2, "the first axis of", "is fixed")
