"""Stored labels: every codec against bytes made by other means than its reader's, and damage that is named."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from depthkit.data.codecs import CODECS, SIZES
from depthkit.data.quarantine import SampleError

FLOATS = np.array([[0.5, 1.0, 2.5], [4.0, 8.0, 16.0]])
CODES = np.array([[0, 1, 1000], [4095, 40000, 65535]], np.uint16)
RGB = np.zeros((48, 65, 3), np.uint8)


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def save(array: np.ndarray, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, image_format, **options)
    return file.getvalue()


def npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, array)
    return file.getvalue()


def exr(values: np.ndarray) -> bytes:
    """One float channel, uncompressed, by the layout of the OpenEXR file format."""
    height, width = values.shape
    window = struct.pack("<4i", 0, 0, width - 1, height - 1)
    attributes = {
        "channels": ("chlist", b"Y\0" + struct.pack("<4i", 2, 0, 1, 1) + b"\0"),
        "compression": ("compression", b"\0"),
        "dataWindow": ("box2i", window),
        "displayWindow": ("box2i", window),
        "lineOrder": ("lineOrder", b"\0"),
        "pixelAspectRatio": ("float", struct.pack("<f", 1)),
        "screenWindowCenter": ("v2f", struct.pack("<2f", 0, 0)),
        "screenWindowWidth": ("float", struct.pack("<f", 1)),
    }
    header = struct.pack("<2i", 20000630, 2)
    for name, (kind, data) in attributes.items():
        header += name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(data)) + data
    header += b"\0"
    lines = [struct.pack("<2i", y, 4 * width) + row.astype("<f4").tobytes() for y, row in enumerate(values)]
    start = len(header) + 8 * height
    return header + struct.pack(f"<{height}Q", *(start + y * len(lines[0]) for y in range(height))) + b"".join(lines)


def bit_rotated(millimetres: np.ndarray) -> np.ndarray:
    """The SUN RGB-D form: the 16 bits turned left by three."""
    text = [f"{value:016b}" for value in millimetres.ravel()]
    return np.array([int(bits[3:] + bits[:3], 2) for bits in text], np.uint16).reshape(millimetres.shape)


def stored_forms() -> dict[str, tuple[bytes, np.ndarray]]:
    """Codec -> (file, the numbers it holds)."""
    floats = FLOATS.astype(np.float32)
    bytes8 = np.array([[0, 1, 2], [3, 128, 255]], np.uint8)
    kinect = np.array([[0, 600, 1000], [1090, 1093, 2047]])  # metres: .3216, .7132, 3.798, 140.5, < 0, < 0
    metres = np.array([[351.3 / 1092.5, 351.3 / 492.5, 351.3 / 92.5], [0, 0, 0]])
    return {
        "png16": (save(CODES, "PNG"), CODES),
        "png8": (save(bytes8, "PNG"), bytes8),
        "png16_sunrgbd": (save(bit_rotated(CODES), "PNG"), CODES),
        "pgm16": (b"P5\n# made by hand\n3 2\n65535\n" + struct.pack(">6H", *CODES.ravel()), CODES),
        "pgm16_nyu_raw": (b"P5 3 2 65535\n" + struct.pack("<6H", *kinect.ravel()), metres),
        "npy": (npy(floats[..., None]), floats),
        "npz": (npz(floats), floats),
        "exr": (exr(floats), floats),
        "pfm": (b"Pf\n3 2\n-0.25\n" + struct.pack("<6f", *floats[::-1].ravel()), floats),
        "tiff32f": (save(floats, "TIFF"), floats),
    }


@pytest.mark.parametrize("codec", list(CODECS))
def test_codec_reads_what_was_stored(codec: str) -> None:
    data, expected = stored_forms()[codec]
    np.testing.assert_allclose(CODECS[codec](data), expected, rtol=1e-6 if codec == "pgm16_nyu_raw" else 0)
    assert SIZES[codec](data) == expected.shape


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("keep", [0, 5, -1], ids=["empty", "header cut", "last byte lost"])
def test_cut_label_is_an_error(codec: str, keep: int) -> None:
    data, _ = stored_forms()[codec]
    with pytest.raises(SampleError):
        CODECS[codec](data[:keep])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("codec", list(CODECS))
def test_damaged_headers_raise_nothing_but_sample_error(codec: str) -> None:
    data, _ = stored_forms()[codec]
    rng = np.random.default_rng(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 120), 3):
            damaged[place] = rng.integers(256)
        try:
            assert len(SIZES[codec](bytes(damaged))) == CODECS[codec](bytes(damaged)).ndim == 2
        except SampleError:
            num_refused += 1
    assert num_refused > 30


@pytest.mark.parametrize(
    "array", [FLOATS, FLOATS.astype(">f4"), FLOATS.astype(np.float16), np.asfortranarray(FLOATS), CODES]
)
def test_npy_of_any_real_type(array: np.ndarray) -> None:
    np.testing.assert_array_equal(CODECS["npy"](npy(array)), array)


def test_pfm_high_byte_first() -> None:
    data = b"Pf 3 2 1.0\n" + struct.pack(">6f", *FLOATS[::-1].ravel())
    np.testing.assert_array_equal(CODECS["pfm"](data), FLOATS)


@pytest.mark.parametrize(
    ("codec", "data", "reason"),
    [
        ("png16", save(CODES.astype(np.uint8), "PNG"), "8-bit grey PNG where the manifest says png16"),
        ("png8", save(CODES, "PNG"), "16-bit grey PNG where the manifest says png8"),
        ("png16", save(RGB, "PNG"), "8-bit RGB PNG where the manifest says png16"),
        ("png8", save(RGB, "PNG"), "8-bit RGB PNG where the manifest says png8"),
        ("png8", Image.Image.tobytes(Image.new("L", (9, 9))), "expected a PNG"),
        ("png16", save(RGB, "JPEG"), r"expected a PNG, found a file that begins with b'\\xff\\xd8"),
        ("pgm16", b"P5 3 2 255\n" + bytes(6), "8-bit PGM"),
        ("pgm16", b"P6 3 2 65535\n" + bytes(36), "P5"),
        ("pgm16", b"P5 3 2 65535\n" + bytes(11), "needs 12 bytes of numbers, found 11"),
        ("pfm", b"PF 3 2 -1\n" + bytes(72), "one-channel PFM"),
        ("npy", npy(RGB), r"\(H, W\) or \(H, W, 1\), found uint8 of shape \(48, 65, 3\)"),
        ("npy", npy(FLOATS.astype(complex)), "complex128"),
        ("npy", npy(FLOATS.astype(object), allow_pickle=True), "object"),
        ("npy", npy(FLOATS)[:-8], "should hold 48 bytes of numbers, found 40"),
        ("npy", b"PK\x03\x04", "not a NumPy file"),
        ("tiff32f", save(CODES, "TIFF"), "32-bit float TIFF, found uint16"),
        ("tiff32f", b"II*\x00", "not a readable TIFF"),
    ],
)
def test_wrong_codec_says_what_was_found(codec: str, data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        CODECS[codec](data)


def test_damaged_png_label() -> None:
    data = bytearray(save(np.arange(10000, dtype=np.uint16).reshape(100, 100), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(SampleError, match="cut off or damaged"):
        CODECS["png16"](bytes(data))
