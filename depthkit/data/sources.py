"""Where the bytes of an image or a label lie: a file, or a place inside a container that a data set ships.

Readers are functions of the container's path and further arguments, at the top level of a module so that worker
processes can be handed them. Arrays become `.npz`, pixels lossless PNG; everything else is copied byte for byte.
"""

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthkit.data.quarantine import SampleError


@dataclass(frozen=True)
class Source:
    """The bytes of one image or label: `reader(path, *arguments)`, or the file at `path` as it is.

    `suffix` is what a file of these bytes would be called. OSError or SampleError when they cannot be read.
    """

    path: Path
    suffix: str
    reader: Callable[..., bytes] = Path.read_bytes
    arguments: tuple[Any, ...] = ()

    def read(self) -> bytes:
        return self.reader(self.path, *self.arguments)

    def __str__(self) -> str:
        inside = ", ".join(str(argument) for argument in self.arguments)
        return f"{self.path} ({inside})" if inside else str(self.path)


def file(path: Path) -> Source:
    """A file as it is."""
    return Source(path, path.suffix.lower())


# --- containers ------------------------------------------------------------------------------------------------------


def tar_members(path: Path) -> Iterator[tuple[str, Source]]:
    """Name and source of every regular file in an uncompressed tar, in order; one pass over the headers."""
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                place = (member.offset_data, member.size)
                yield member.name, Source(path, Path(member.name).suffix.lower(), read_range, place)


def read_range(path: Path, offset: int, length: int) -> bytes:
    """`length` bytes from `offset` on."""
    with path.open("rb") as stream:
        data = os.pread(stream.fileno(), length, offset)
    if len(data) < length:
        raise SampleError(f"{path} ends {length - len(data)} bytes too early")
    return data


def zip_members(path: Path) -> Iterator[tuple[str, Source]]:
    """Name and source of every file in a zip."""
    for name in _open_zip(path).namelist():
        if not name.endswith("/"):
            yield name, Source(path, Path(name).suffix.lower(), read_zip_member, (name,))


def read_zip_member(path: Path, name: str) -> bytes:
    try:
        return _open_zip(path).read(name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SampleError(f"{path}: {name}: {error}") from error


@lru_cache(maxsize=4)
def _open_zip(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def lmdb_values(path: Path, suffix: str) -> Iterator[tuple[str, Source]]:
    """Key (as text) and source of every value of an LMDB folder."""
    with _open_lmdb(path).begin() as transaction:
        for key in transaction.cursor().iternext(values=False):
            yield key.decode("utf-8", "replace"), Source(path, suffix, read_lmdb_value, (key,))


def read_lmdb_value(path: Path, key: bytes) -> bytes:
    with _open_lmdb(path).begin() as transaction:
        value = transaction.get(key)
    if value is None:
        raise SampleError(f"{path}: no value for key {key!r}")
    return value


@lru_cache(maxsize=4)
def _open_lmdb(path: Path) -> Any:
    return optional("lmdb").open(str(path), readonly=True, lock=False, readahead=False)


def h5_array(path: Path, dataset: str, index: int | None = None, transpose: bool = False) -> bytes:
    """A dataset of an HDF5 file, or its entry `index`, as .npz; `transpose` exchanges rows and columns (MATLAB)."""
    array = read_h5(path, dataset, index)
    return npz(array.T if transpose else array)


def read_h5(path: Path, dataset: str, index: int | None = None) -> np.ndarray:
    """The numbers of a dataset of an HDF5 file, or of its entry `index`; SampleError names what is not there."""
    try:
        with optional("h5py").File(path, "r") as content:
            return np.asarray(content[dataset][() if index is None else index])
    except (KeyError, IndexError, ValueError) as error:
        raise SampleError(f"{path}: {dataset}: {error}") from error


def optional(package: str) -> Any:
    """A package that only some data sets need; ImportError names the extra that brings it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"this data set needs {package}: pip install 'depthkit[datasets]'") from error


# --- bytes -----------------------------------------------------------------------------------------------------------


def npz(array: np.ndarray) -> bytes:
    """One array as a compressed .npz."""
    stream = io.BytesIO()
    np.savez_compressed(stream, depth=array)
    return stream.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 RGB, or (H, W) uint8 or uint16, as PNG."""
    written, data = cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    assert written
    return data.tobytes()
