"""Let torchvision be imported next to a CPU build of torch.

Its published wheel is linked against CUDA. Where that library does not load, `import torchvision` fails, as
it registers shapes for operators that do not exist; so fails what imports it: timm, parts of transformers.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

__all__ = ["define_missing"]

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A schema lives as long as the library object that defined it.
_definitions: list[torch.library.Library] = []


def define_missing() -> None:
    """Define the schemas that `import torchvision` needs, unless its own library loads. Call it before."""
    spec = importlib.util.find_spec("torchvision")
    if _definitions or spec is None or spec.origin is None or _loads(Path(spec.origin).with_name("_C.so")):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _definitions.append(library)


def _loads(extension: Path) -> bool:
    try:
        torch.ops.load_library(str(extension))
    except OSError:
        return False
    return True
