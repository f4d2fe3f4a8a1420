"""Tensors in files: `.npy` and `.npz` in, `.npz` out. Needs numpy alone, so that a bundle can be run without torch."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt.errors import InputError, LoadError, UnsupportedError, UsageError
from graphopt.files import write_whole
from graphopt.signature import Signature, size_of

if TYPE_CHECKING:
    import torch

__all__ = ["bind", "read_arrays", "read_batch", "read_named", "require_plain", "sample_arrays", "write_npz"]

Array = np.ndarray[Any, np.dtype[Any]]


def read_named(pairs: Sequence[str], archives: Sequence[Path]) -> dict[str, Array]:
    """Arrays by input name, from `NAME=FILE.npy` pairs and from `.npz` files that hold several.

    Raises:
        UsageError: for a text that is no pair, or a name given twice.
        LoadError: for a file that is missing, damaged or of another kind.
    """
    found: dict[str, Array] = {}
    for archive in archives:
        _add(found, read_arrays(archive))
    for pair in pairs:
        name, mark, file = pair.partition("=")
        if not (name and mark and file):
            raise UsageError(f"'{pair}' is not NAME=FILE", todo="name the input, such as --input x=x.npy")
        _add(found, {name: _read_npy(Path(file))})
    return found


def _add(found: dict[str, Array], more: Mapping[str, Array]) -> None:
    for name, array in more.items():
        if name in found:
            raise UsageError(f"input '{name}' is given twice")
        found[name] = array


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an `.npz` file; pickled objects are refused.

    Raises:
        LoadError: for a file that is missing, damaged or of another kind.
    """
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise LoadError(f"'{path}' holds one array without a name", todo="use an .npz file, or --input NAME=FILE")
    try:
        with loaded:
            found = {name: loaded[name] for name in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise LoadError(f"'{path}' is damaged", why=str(error)) from error
    foreign = [name for name, array in found.items() if not isinstance(array, np.ndarray)]
    if foreign:
        raise LoadError(f"'{path}' is no .npz file: '{foreign[0]}' in it is no array")
    return found


def _read_npy(path: Path) -> Array:
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        return loaded
    loaded.close()
    raise LoadError(f"'{path}' holds several arrays", todo=f"give it with --inputs {path}")


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise LoadError(f"there is no file '{path}'") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise LoadError(f"'{path}' is no .npy or .npz file of plain numbers", why=str(error)) from error


def bind(arrays: Mapping[str, Array], signature: Signature, *, where: str | None = None) -> list[Array]:
    """The arrays in the order of the tensor inputs.

    Raises:
        InputError: naming every input that is missing, unknown, or of the wrong dtype or shape.
    """
    specs = signature.tensor_inputs
    known = [spec.name for spec in specs]
    problems = [f"there is no input '{name}'" for name in arrays if name not in known]
    problems += [f"input '{name}' is missing" for name in known if name not in arrays]
    given = [spec for spec in specs if spec.name in arrays]
    try:
        shapes = [(arrays[spec.name].dtype.name, arrays[spec.name].shape) for spec in given]
        replace(signature, inputs=tuple(given)).check(shapes)
    except InputError as error:
        problems.append(error.what)
    if problems:
        takes = ", ".join(map(str, specs)) or "no tensors"
        raise InputError("; ".join(problems), where=where, todo=f"the model takes {takes}")
    return [arrays[name] for name in known]


def require_plain(signature: Signature) -> None:
    """Refuse dtypes that numpy does not have, such as bfloat16.

    Raises:
        UnsupportedError: naming the first such input or output.
    """
    for spec in (*signature.tensor_inputs, *signature.tensor_outputs):
        if not hasattr(np, spec.dtype):
            raise UnsupportedError(
                f"'{spec.name}' is {spec.dtype}, which numpy arrays and their files cannot hold",
                todo="call the model from Python with torch tensors",
            )


def sample_arrays(signature: Signature, sizes: Mapping[str, int], seed: int = 0) -> list[Array]:
    """Inputs that fit a signature: normal values for floating point, zeros for integers and booleans.

    Raises:
        UsageError: when a free size has no number.
    """
    missing = [name for name in signature.ranges if name not in sizes]
    if missing:
        raise UsageError(
            f"the size{'s' if len(missing) > 1 else ''} {', '.join(missing)} may be anything",
            todo=f"choose: {' '.join(f'--at {name}=8' for name in missing)}",
        )
    generator = np.random.default_rng(seed)
    arrays: list[Array] = []
    for spec in signature.tensor_inputs:
        shape = [dim if isinstance(dim, int) else size_of(dim, sizes) for dim in spec.dims]
        dtype = np.dtype(spec.dtype)
        normal = dtype.kind in "fc"
        arrays.append(generator.standard_normal(shape).astype(dtype) if normal else np.zeros(shape, dtype))
    return arrays


def read_batch(path: Path, signature: Signature) -> list[torch.Tensor]:
    """One batch of inputs from an `.npz` file, as torch tensors in the order of the signature.

    Raises:
        LoadError, InputError: as `read_arrays` and `bind`.
    """
    import torch

    return [torch.from_numpy(array) for array in bind(read_arrays(path), signature, where=str(path))]


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays whole or not at all. Unlike `numpy.savez` it takes any name, `file` too.

    Raises:
        UsageError: when the system cannot write there.
    """
    with write_whole(path) as scratch, zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
