"""The stored forms of depth labels: from bytes to the array of stored numbers, nothing converted or masked.

Each codec has two readers: the size from the header alone, and the numbers. Both raise SampleError that says what was
found and what was expected.
"""

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from tokenize import TokenError

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from depthkit.data.manifest import Codec
from depthkit.data.png16 import decode_png16
from depthkit.data.quarantine import SampleError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGB and alpha"}
PGM_HEADER = re.compile(rb"P5" + rb"(?:\s|#[^\n]*\n)+(\d+)" * 3 + rb"\s")
PFM_HEADER = re.compile(rb"Pf\s+(\d+)\s+(\d+)\s+(-?)[\d.eE+-]+\s")
EXR_ATTRIBUTE = re.compile(rb"([^\0]{1,255})\0([^\0]{1,255})\0(.{4})", re.DOTALL)
"""Name, type, and the number of bytes that follow, low byte first."""
MAX_PIXELS_PER_BYTE = 1032
"""Of an OpenEXR file: the most that its kinds of compression make of one byte."""
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_png16(data: bytes) -> np.ndarray:
    """(H, W) uint16 from a one-channel 16-bit PNG."""
    return _read_png(data, bit_depth=16)


def read_png8(data: bytes) -> np.ndarray:
    """(H, W) uint8 from a one-channel 8-bit PNG."""
    return _read_png(data, bit_depth=8)


def read_png16_sunrgbd(data: bytes) -> np.ndarray:
    """(H, W) uint16 millimetres from the 16-bit PNG of SUN RGB-D, whose bits are rotated left by three."""
    stored = read_png16(data)
    return (stored >> 3) | (stored << 13)


def read_pgm16(data: bytes) -> np.ndarray:
    """(H, W) uint16 from a binary PGM with two bytes a value, high byte first as the format has it."""
    return _read_pgm(data, byte_order=">")


def read_pgm16_nyu_raw(data: bytes) -> np.ndarray:
    """(H, W) float32 metres from a raw NYU Depth v2 frame: `351.3 / (1092.5 - d)`, 0 outside (0, 10] m.

    `d` is the Kinect disparity, written low byte first although PGM says otherwise. Constants as Open3D uses them.
    """
    metres = 351.3 / (1092.5 - _read_pgm(data, byte_order="<").astype(np.float32))
    return np.where((metres > 0) & (metres <= 10), metres, np.float32(0))


def read_npy(data: bytes) -> np.ndarray:
    """(H, W) numbers of any real type from a NumPy file of shape (H, W) or (H, W, 1); never unpickles."""
    shape, fortran_order, dtype, start = _npy_header(data)
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - start != needed:
        raise SampleError(
            f"NumPy file {shape} {dtype} should hold {needed} bytes of numbers, found {len(data) - start}"
        )
    return np.frombuffer(data, dtype, offset=start).reshape(shape[:2], order="F" if fortran_order else "C")


def read_npz(data: bytes) -> np.ndarray:
    """(H, W) numbers of any real type from the first array of a NumPy archive; never unpickles."""
    return read_npy(_npz_member(data))


def read_exr(data: bytes) -> np.ndarray:
    """(H, W) float32 from an OpenEXR file: its only channel, or the first of several that all hold the depth."""
    _exr_size(data)
    stored = imdecode(data, cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise SampleError("not a readable OpenEXR file, or cut off")
    return (stored if stored.ndim == 2 else stored[..., 0]).astype(np.float32)


def read_pfm(data: bytes) -> np.ndarray:
    """(H, W) float32 from a one-channel PFM: rows bottom-up, a negative third header number means low byte first.

    The magnitude of that number is not applied: Middlebury files carry one, and their values are pixels without it.
    """
    header = _pfm_header(data)
    stored = _read_plane(data, header.end(), _text_size(header), "<f4" if header[3] else ">f4", "PFM")
    return stored[::-1].astype(np.float32)


def read_tiff32f(data: bytes) -> np.ndarray:
    """(H, W) float32 from a one-channel TIFF of 32-bit floats."""
    stored = imdecode(data, cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise SampleError("not a readable TIFF, or cut off")
    if stored.dtype != np.float32 or stored.ndim != 2:
        raise SampleError(f"expected a one-channel 32-bit float TIFF, found {stored.dtype} of shape {stored.shape}")
    return stored


def imdecode(data: bytes, flags: int) -> np.ndarray | None:
    """cv2.imdecode, which returns None for what it cannot decode, without its exceptions for empty and huge input."""
    if data.startswith(PNG_SIGNATURE) and not _png_chunks_fit(data):
        return None
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _png_chunks_fit(data: bytes) -> bool:
    """Whether every chunk lies inside the file: OpenCV allocates up to 4 GB when a damaged length asks for it."""
    start, kind = len(PNG_SIGNATURE), b""
    while start < len(data) and kind != b"IEND":
        kind = data[start + 4 : start + 8]
        start += 12 + int.from_bytes(data[start : start + 4])
    return kind == b"IEND" and start <= len(data)


def _read_png(data: bytes, bit_depth: int) -> np.ndarray:
    _, _, found_depth, colour_type = _png_header(data)
    if (found_depth, colour_type) != (bit_depth, 0):
        found = f"{found_depth}-bit {PNG_COLOUR_TYPES.get(colour_type, 'unknown')} PNG"
        raise SampleError(f"{found} where the manifest says png{bit_depth} ({bit_depth}-bit grey)")
    decoded = decode_png16(data) if bit_depth == 16 else data
    if isinstance(decoded, np.ndarray):
        return decoded
    stored = imdecode(decoded, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if stored is None:
        raise SampleError("PNG is cut off or damaged")
    return stored


def _png_header(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, bit depth and colour type."""
    if not data.startswith(PNG_SIGNATURE):
        raise SampleError(f"expected a PNG, found a file that begins with {data[:8]!r}")
    if len(data) < 33 or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        raise SampleError("PNG header is cut off or damaged")
    return struct.unpack(">IIBB", data[16:26])


def _png_size(data: bytes) -> tuple[int, int]:
    width, height, _, _ = _png_header(data)
    return height, width


def _read_pgm(data: bytes, byte_order: str) -> np.ndarray:
    header = _pgm_header(data)
    return _read_plane(data, header.end(), _text_size(header), byte_order + "u2", "PGM").astype(np.uint16)


def _pgm_header(data: bytes) -> re.Match[bytes]:
    header = PGM_HEADER.match(data)
    if header is None:
        raise SampleError(f"expected a binary PGM (P5), found a file that begins with {data[:8]!r}")
    if int(header[3]) < 256:
        raise SampleError(f"8-bit PGM (largest value {int(header[3])}) where the manifest says 16-bit")
    return header


def _pfm_header(data: bytes) -> re.Match[bytes]:
    header = PFM_HEADER.match(data)
    if header is None:
        raise SampleError(f"expected a one-channel PFM (Pf), found a file that begins with {data[:8]!r}")
    return header


def _text_size(header: re.Match[bytes]) -> tuple[int, int]:
    """PGM and PFM headers give width, then height, as decimal text."""
    return int(header[2]), int(header[1])


def _read_plane(data: bytes, start: int, size: tuple[int, int], dtype: str, name: str) -> np.ndarray:
    count = size[0] * size[1]
    needed = count * np.dtype(dtype).itemsize
    if len(data) - start < needed:
        raise SampleError(f"{name} of {size[0]}x{size[1]} needs {needed} bytes of numbers, found {len(data) - start}")
    return np.frombuffer(data, dtype, count, start).reshape(size)


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, type, and where the numbers start."""
    file = io.BytesIO(data)
    try:
        shape, fortran_order, dtype = NPY_HEADERS[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, SyntaxError, TokenError) as error:
        raise SampleError(f"not a NumPy file: {error}") from error
    if dtype.kind not in "fiu" or len(shape) not in (2, 3) or shape[2:] not in ((), (1,)) or min(shape) < 1:
        raise SampleError(f"expected numbers of shape (H, W) or (H, W, 1), found {dtype} of shape {shape}")
    return shape, fortran_order, dtype, file.tell()


def _npz_member(data: bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read(archive.namelist()[0])
    except (
        zipfile.BadZipFile,
        LookupError,
        zlib.error,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise SampleError(f"not a NumPy archive, or a damaged one: {error}") from error


def _exr_size(data: bytes) -> tuple[int, int]:
    """From the attribute `dataWindow` of the header: four 32-bit integers, left, top, right, bottom, all inclusive.

    OpenCV allocates whatever a damaged header asks for, so one that asks for more than the file can hold is refused.
    """
    window = _exr_attributes(data).get((b"dataWindow", b"box2i"), b"")
    if len(window) != 16:
        raise SampleError("OpenEXR header without a dataWindow")
    left, top, right, bottom = struct.unpack("<4i", window)
    height, width = bottom - top + 1, right - left + 1
    if height < 1 or width < 1 or height * width > MAX_PIXELS_PER_BYTE * len(data):
        raise SampleError(f"OpenEXR header says {height}x{width} pixels, the file holds {len(data)} bytes")
    return height, width


def _exr_attributes(data: bytes) -> dict[tuple[bytes, bytes], bytes]:
    """Values by (name, type): the list after magic number and version, which ends with a zero byte."""
    if not data.startswith(b"\x76\x2f\x31\x01"):
        raise SampleError(f"expected an OpenEXR file, found one that begins with {data[:8]!r}")
    attributes, start = {}, 8
    while data[start : start + 1] != b"\0":
        attribute = EXR_ATTRIBUTE.match(data, start)
        if attribute is None:
            raise SampleError("OpenEXR header is cut off or damaged")
        start = attribute.end() + int.from_bytes(attribute[3], "little")
        attributes[attribute[1], attribute[2]] = data[attribute.end() : start]
    return attributes


def _npy_size(data: bytes) -> tuple[int, int]:
    height, width = _npy_header(data)[0][:2]
    return height, width


def _tiff_size(data: bytes) -> tuple[int, int]:
    try:
        width, height = Image.open(io.BytesIO(data), formats=["TIFF"]).size
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise SampleError(f"not a readable TIFF: {error}") from error
    return height, width


CODECS: dict[Codec, Callable[[bytes], np.ndarray]] = {
    "png16": read_png16,
    "png8": read_png8,
    "pgm16": read_pgm16,
    "png16_sunrgbd": read_png16_sunrgbd,
    "pgm16_nyu_raw": read_pgm16_nyu_raw,
    "npy": read_npy,
    "npz": read_npz,
    "exr": read_exr,
    "pfm": read_pfm,
    "tiff32f": read_tiff32f,
}
SIZES: dict[Codec, Callable[[bytes], tuple[int, int]]] = {
    "png16": _png_size,
    "png8": _png_size,
    "pgm16": lambda data: _text_size(_pgm_header(data)),
    "png16_sunrgbd": _png_size,
    "pgm16_nyu_raw": lambda data: _text_size(_pgm_header(data)),
    "npy": _npy_size,
    "npz": lambda data: _npy_size(_npz_member(data)),
    "exr": _exr_size,
    "pfm": lambda data: _text_size(_pfm_header(data)),
    "tiff32f": _tiff_size,
}
