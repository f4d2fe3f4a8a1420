"""Real ONNX models on real input: equal to ONNX Runtime before and after the exact passes, or refused by name."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

import graphopt as go
from benchmarks import corpora
from benchmarks.pages import ROTATIONS, line, orientation_input, page, recognition_input
from graphopt.errors import UnsupportedError
from graphopt.printer import operator_name
from tests.compare import relative_error

Array = np.ndarray


def model_file(name: str) -> Path:
    """The file, fetched if need be; a test that cannot have it fails, or is skipped when that was asked for."""
    try:
        return corpora.path(name)
    except corpora.Unavailable as error:
        if corpora.offline():
            pytest.skip(str(error))
        raise


def turned_page() -> dict[str, Array]:
    return {"x": orientation_input(page(3, 180))}


def text_line() -> dict[str, Array]:
    return {"x": recognition_input(line(1)[0])}


def detection() -> dict[str, Array]:
    pixels = np.asarray(page(2).resize((160, 224)), np.float32).transpose(2, 0, 1)[None]
    return {"x": (pixels / 255 - 0.5) / 0.5}


def text_direction() -> dict[str, Array]:
    pixels = np.asarray(line(4)[0].convert("RGB").resize((192, 48)), np.float32).transpose(2, 0, 1)[None]
    return {"x": (pixels / 255 - 0.5) / 0.5}


def face() -> dict[str, Array]:
    """Ten crops, for the size that the file declares."""
    image = Image.open(model_file("astronaut")).convert("RGB").resize((160, 64))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    crops = [pixels[:, row : row + 32, column : column + 32] for row in (0, 32) for column in range(0, 160, 32)]
    return {"input.1": np.stack(crops)}


REAL: dict[str, Callable[[], dict[str, Array]]] = {
    "pp-lcnet": turned_page,
    "ppocr-v6-rec": text_line,
    "ppocr-v6-det": detection,
    "ppocr-v3-rec-en": text_line,
    "ppocr-v3-rec-ch": text_line,
    "ppocr-v3-det": detection,
    "ppocr-v2-cls": text_direction,
    "centerface": face,
}


def tells_rotations(model: go.Model) -> None:
    """Three pages in four rotations, all told apart: the classes are in the order of the rotations."""
    for label, rotation in enumerate(ROTATIONS):
        pages = np.concatenate([orientation_input(page(seed, rotation)) for seed in range(3)])
        with torch.no_grad():
            assert model(torch.from_numpy(pages)).argmax(1).tolist() == [label] * 3


def reads_lines(model: go.Model, characters: Mapping[int, str]) -> None:
    """Two lines of different widths, read without a mistake (greedy CTC; class 0 is the blank)."""
    for seed in (2, 5):
        image, text = line(seed)
        with torch.no_grad():
            classes = model(torch.from_numpy(recognition_input(image)))[0].argmax(1).tolist()
        read = [label for label, before in zip(classes, [0, *classes], strict=False) if label not in (0, before)]
        assert "".join(characters[label] for label in read) == text


def reads_chinese_and_latin(model: go.Model) -> None:
    import onnx

    stored = {entry.key: entry.value for entry in onnx.load(model_file("ppocr-v6-rec")).metadata_props}
    reads_lines(model, dict(enumerate([*stored["character"].split("\n"), " "], 1)))


def reads_latin(model: go.Model) -> None:
    letters = {ord(letter) - 47: letter for letter in string.ascii_letters}
    reads_lines(model, {**letters, 93: ".", 96: " "})


# What a model is for still works, at sizes other than it was compared at.
PURPOSE: dict[str, Callable[[go.Model], None]] = {
    "pp-lcnet": tells_rotations,
    "ppocr-v6-rec": reads_chinese_and_latin,
    "ppocr-v3-rec-en": reads_latin,
}
SILERO = ("silero-vad-sequence", "silero-vad-step")
CONTROL_FLOW = ("silero-vad", "silero-vad-op15", "silero-vad-half", "silero-vad-op18")


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options)


def speech(count: int) -> Array:
    """Harmonics of a gliding tone in bursts, the shape of voiced speech, at 16 kHz."""
    time = np.arange(count) / 16000
    phase = 2 * np.pi * (140 * time + 30 * time**2)
    voice = sum(np.sin(k * phase) / k for k in range(1, 12)) * (np.sin(2 * np.pi * 3 * time) > 0)
    return (0.2 * voice).astype(np.float32)


def silero_inputs(runtime: onnxruntime.InferenceSession, model: go.Model) -> dict[str, Array]:
    """Speech for the widest float input, zeros for the states."""
    shapes = {
        spec.name: [2 if isinstance(dim, str) else dim for dim in spec.dims] for spec in model.signature.tensor_inputs
    }
    audio = max(shapes, key=lambda name: shapes[name][-1])
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    count = int(np.prod(shapes[audio]))
    inputs[audio] = speech(count + 4000)[4000:].reshape(shapes[audio])
    return inputs


def agree(name: str, inputs: Callable[[onnxruntime.InferenceSession, go.Model], dict[str, Array]]) -> go.Model:
    """Compare both models with ONNX Runtime on the same inputs; returns what the passes made."""
    path = model_file(name)
    runtime, model = session(path), go.load(path)
    feed = inputs(runtime, model)
    expected = [torch.from_numpy(np.asarray(value)) for value in runtime.run(None, feed)]
    small, reports = go.run(model, "exact")
    names = [spec.name for spec in model.signature.inputs]
    for each in (model, small):
        with torch.no_grad():
            actual = each.call_flat([torch.from_numpy(feed[key]) for key in names])
        for ours, theirs in zip(actual, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-4
            assert theirs.abs().max() > 0
    assert any(report.changed for report in reports)
    return small


@pytest.mark.parametrize("name", REAL)
def test_equal_to_onnxruntime_before_and_after_exact(name: str) -> None:
    def feed(runtime: onnxruntime.InferenceSession, model: go.Model) -> dict[str, Array]:
        (key,) = [entry.name for entry in runtime.get_inputs()]
        (value,) = REAL[name]().values()
        return {key: value}

    small = agree(name, feed)
    calls = [operator_name(node.target) for node in small.graph.nodes if node.op == "call_function"]
    assert "batch_norm" not in calls
    if name in PURPOSE:
        PURPOSE[name](small)


@pytest.mark.parametrize("name", SILERO)
def test_recurrent_audio_models(name: str) -> None:
    agree(name, silero_inputs)


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_control_flow_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        go.load(model_file(name))
    text = str(caught.value)
    assert "operator If" in text and "control flow" in text and "node '" in text and "do:" in text


def test_the_declared_size_of_centerface_is_kept_and_weights_keep_their_names() -> None:
    import onnx

    path = model_file("centerface")
    proto, model = onnx.load(path), go.load(path)
    weights = {entry.name for entry in proto.graph.initializer if len(entry.dims) == 4}
    assert weights and weights <= {name for name, _ in model.named_parameters()}
    assert [spec.name for spec in model.signature.outputs] == [entry.name for entry in proto.graph.output]


def test_centerface_finds_the_face_and_none_in_a_cup(tmp_path: Path) -> None:
    import onnx

    proto = onnx.load(model_file("centerface"))
    (entry,) = [given for given in proto.graph.input if given.name == "input.1"]
    for dim, size in zip(entry.type.tensor_type.shape.dim, (1, 3, 256, 256), strict=True):
        dim.dim_value = size  # the declared one is nominal
    onnx.save(proto, tmp_path / "centerface.onnx")
    small, _ = go.run(go.load(tmp_path / "centerface.onnx"), "exact")
    peaks = {}
    for name in ("astronaut", "coffee"):
        pixels = np.asarray(Image.open(model_file(name)).convert("RGB").resize((256, 256)), np.float32)
        with torch.no_grad():
            heat = small(torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()))[0]
        peaks[name] = float(heat.max())
    assert peaks["astronaut"] > 0.8 and peaks["coffee"] < 0.3, peaks
