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
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthkit.data.quarantine import SampleError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".tif", ".tiff"}
SIGNATURES = {
    b"\xff\xd8": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
    b"\x93NUMPY": ".npy",
    b"PK": ".npz",
    b"\x76\x2f\x31\x01": ".exr",
    b"Pf": ".pfm",
    b"P5": ".pgm",
    b"II*\0": ".tiff",
    b"MM\0*": ".tiff",
}
"""How files of these suffixes begin."""

VIDEO_JPEG_QUALITY = 95


@dataclass(frozen=True, slots=True)
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


def suffix_of(data: bytes) -> str:
    """The suffix that a file of these bytes should have, "" when it is none of `SIGNATURES`."""
    return next((suffix for signature, suffix in SIGNATURES.items() if data.startswith(signature)), "")


# --- images below a folder -------------------------------------------------------------------------------------------


def images_below(root: Path, skip: Callable[[str], bool] = lambda name: False) -> Iterator[tuple[str, Source]]:
    """Name and source of every image below a folder, inside tars and zips too, in the order of names.

    A name is the path below `root`, in which an archive counts as a folder. Found one folder or archive at a time, so
    memory does not grow with their number. Folders and archives for whose own name `skip` is true are left out, and so
    are hidden files and those images of an archive that lie unpacked beside it or in a folder of its name. An archive
    that cannot be read gives one source that says so when it is read; so does a compressed tar, unless it is unpacked.
    """
    with os.scandir(root) as found:
        entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    for name, is_folder in entries:
        path, suffix = root / name, os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path each costs far more)
        if is_folder and not skip(name) and not _leads_upwards(path):
            yield from ((f"{name}/{inner}", source) for inner, source in images_below(path, skip))
        elif suffix in IMAGE_SUFFIXES and not is_folder:
            yield name, Source(path, suffix)
        elif suffix in ARCHIVES and not is_folder and not skip(name.partition(".")[0]):
            yield from ((f"{name.removesuffix(suffix)}/{inner}", source) for inner, source in _images_in(path, suffix))


def _leads_upwards(folder: Path) -> bool:
    """Whether a folder is a link to one that holds it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def _images_in(archive: Path, suffix: str) -> Iterator[tuple[str, Source]]:
    """Images of an archive but for those that lie unpacked: an interrupted unpacking leaves the first ones."""
    places = [folder for folder in (archive.parent, archive.with_suffix("").with_suffix("")) if folder.is_dir()]

    def is_unpacked(image: tuple[str, Source]) -> bool:
        return any((place / image[0]).exists() for place in places)

    images = (
        (name.removeprefix("./"), source)
        for name, source in ARCHIVES[suffix](archive)
        if source.suffix in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")  # noqa: PTH119 (as above)
    )
    try:
        yield from dropwhile(is_unpacked, images)
    except (tarfile.ReadError, zipfile.BadZipFile) as error:
        reason = f"not a whole archive ({error}); fetch it again, or unpack what it holds"
        yield "unreadable", Source(archive, ".png", refuse, (reason,))


def _compressed_members(path: Path) -> Iterator[tuple[str, Source]]:
    """The first image of a compressed tar, as a source that says why the images cannot be read from it."""
    reason = "the images of a compressed tar cannot be read one by one; unpack it (tar -xf) beside itself"
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in islice(tar, 20):
                suffix = Path(member.name).suffix.lower()
                if member.isfile() and suffix in IMAGE_SUFFIXES:
                    yield member.name, Source(path, suffix, refuse, (reason,))
                    return
    except (tarfile.ReadError, EOFError):
        return  # something else that is compressed: a table, a list


def refuse(path: Path, reason: str) -> bytes:
    """The reader of what cannot be read."""
    raise SampleError(f"{path}: {reason}")


# --- containers ------------------------------------------------------------------------------------------------------


def tar_members(path: Path) -> Iterator[tuple[str, Source]]:
    """Name and source of every regular file in an uncompressed tar, in order; one pass over the headers."""
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            if member.isfile():
                place = (member.offset_data, member.size)
                yield member.name, Source(path, os.path.splitext(member.name)[1].lower(), read_range, place)  # noqa: PTH122
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header


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


def read_parquet_value(path: Path, column: str, group: int, row: int) -> bytes:
    """Bytes of a cell of a row group; an image of Hugging Face `datasets` is {"bytes", "path"}, of which one is set."""
    value = _parquet_column(path, column, group)[row].as_py()
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None or not value["path"] else path.parent / value["path"]
    if value is None:
        raise SampleError(f"{path}: column {column!r}, row {row} of row group {group}: no image there")
    return value.read_bytes() if isinstance(value, Path) else value


@lru_cache(maxsize=4)
def _parquet_column(path: Path, column: str, group: int) -> Any:
    with optional("pyarrow.parquet").ParquetFile(path) as file:
        return file.read_row_group(group, [column]).column(0)


def read_video_frame(path: Path, index: int) -> bytes:
    """A frame of a video as JPEG of quality 95. Fast when the frames of one video are read in order."""
    video = _open_video(path)
    if video.get(cv2.CAP_PROP_POS_FRAMES) > index:
        video.set(cv2.CAP_PROP_POS_FRAMES, 0)
    while video.get(cv2.CAP_PROP_POS_FRAMES) < index and video.grab():
        pass
    is_read, frame = video.read()
    if not is_read:
        raise SampleError(f"{path}: frame {index} cannot be decoded; the video is damaged or ends before it")
    return cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, VIDEO_JPEG_QUALITY])[1].tobytes()


def num_video_frames(path: Path) -> int:
    """How many frames the header of a video promises; 0 when it cannot be opened."""
    return max(0, int(_open_video(path).get(cv2.CAP_PROP_FRAME_COUNT)))


@lru_cache(maxsize=1)
def _open_video(path: Path) -> Any:
    return cv2.VideoCapture(str(path))


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


ARCHIVES: dict[str, Callable[[Path], Iterator[tuple[str, Source]]]] = {
    ".tar": tar_members,
    ".zip": zip_members,
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz"), _compressed_members),
}
"""How the members of an archive are found, by suffix."""
