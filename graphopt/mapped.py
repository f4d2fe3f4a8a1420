"""Tensors that stay on disk until they are looked at: of a safetensors file, also where that lies in a zip file, and
new ones in scratch files."""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError

__all__ = ["map_tensors", "on_disk"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SCRATCH = 2**20
"""Bytes from which a new tensor gets a file."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of a zip file's local header: the signature, and the lengths of the name and of the extra field behind it."""


def map_tensors(path: Path, member: str) -> dict[str, torch.Tensor] | None:
    """The tensors of the file `member` in a folder or zip file; None where it is compressed and has to be read.

    They may be written to: changes stay in this process. Nothing checks that the numbers are undamaged.

    Raises:
        LoadError: for a file that does not hold what its header says.
    """
    file, start, size = (path / member, 0, None) if path.is_dir() else (path, *_place(path, member))
    if start < 0:
        return None
    with file.open("rb") as stream:
        whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    size = len(whole) - start if size is None else size
    if size < 8 or start + size > len(whole):
        raise LoadError(f"'{file}' is damaged", why=f"{member} is cut short")
    (length,) = struct.unpack_from("<Q", whole, start)
    if length > size - 8:
        raise LoadError(f"'{file}' is damaged", why=f"the header of {member} is cut short")
    header = json.loads(whole[start + 8 : start + 8 + length])
    rows = {name: row for name, row in header.items() if name != "__metadata__"}
    return {name: _tensor(whole, start + 8 + length, start + size, name, row) for name, row in rows.items()}


def on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a large tensor in a scratch file without a name, which is gone with the tensor; a small one as it is.

    The file lies where temporary files do (`TMPDIR`). The copy may be written to.
    """
    if tensor.numel() * tensor.element_size() < _SCRATCH or tensor.layout is not torch.strided:
        return tensor
    plain = tensor.detach().cpu().contiguous()
    with tempfile.TemporaryFile() as stream:
        stream.write(plain.flatten().view(torch.uint8).numpy().data)
        stream.flush()
        whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(whole, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def _place(path: Path, member: str) -> tuple[int, int]:
    """Where in a zip file the contents of a stored member begin, and their length; -1 where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        return -1, 0
    with path.open("rb") as stream:
        stream.seek(info.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise LoadError(f"'{path}' is damaged", why=f"{member} is not where the directory says")
    return info.header_offset + _LOCAL_HEADER.size + name + extra, info.file_size


def _tensor(whole: mmap.mmap, start: int, end: int, name: str, row: Mapping[str, Any]) -> torch.Tensor:
    dtype, shape = _DTYPES.get(row["dtype"]), tuple(row["shape"])
    first, last = (start + int(offset) for offset in row["data_offsets"])
    if dtype is None:
        raise LoadError(f"tensor '{name}' has the dtype {row['dtype']!r}, which is not known")
    count = prod(shape)
    if not start <= first <= last <= end or last - first != count * dtype.itemsize:
        raise LoadError(f"tensor '{name}' lies outside its file, or is not as large as its shape says")
    if not count:
        return torch.empty(shape, dtype=dtype)
    # Bytes first: in a zip file nothing stands at a multiple of its size.
    return torch.frombuffer(whole, dtype=torch.uint8, count=last - first, offset=first).view(dtype).reshape(shape)
