"""PNGs made by hand, with each filter on the rows that the test chooses: bit for bit what was stored, and what OpenCV
reads."""

import struct
import tracemalloc
import zlib
from itertools import pairwise

import cv2
import numpy as np
import pytest

from depthkit.data.codecs import CODECS, imdecode
from depthkit.data.png16 import decode_png16
from depthkit.data.quarantine import SampleError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
FAST, STRIPPED, REFUSED = "decoded", "given on without compression", "left to OpenCV"


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(size: tuple[int, int], depth: int = 16, colour: int = 0, interlace: int = 0) -> bytes:
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], depth, colour, 0, 0, interlace))


def filtered(pixels: np.ndarray, filters: list[int]) -> bytes:
    """The rows as chapter 9 of the specification filters them: each byte less what its neighbours predict."""
    rows = pixels.astype(">u2").view(np.uint8).astype(int)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    left, corner = (np.pad(plane, ((0, 0), (2, 0)))[:, :-2] for plane in (rows, above))
    distances = np.abs(np.stack([above - corner, left - corner, left + above - 2 * corner]))  # to left, above, corner
    paeth = np.choose(distances.argmin(0), [left, above, corner])
    predicted = [np.zeros_like(rows), left, above, (left + above) // 2, paeth]
    lines = [(rows[y] - predicted[kind % 5][y]) % 256 for y, kind in enumerate(filters)]
    return b"".join(bytes([kind, *line]) for kind, line in zip(filters, lines, strict=True))


def png(pixels: np.ndarray, filters: list[int], *, num_idat: int = 1, before: bytes = b"", after: bytes = b"") -> bytes:
    stream = zlib.compress(filtered(pixels, filters))
    cuts = np.linspace(0, len(stream), num_idat + 1).astype(int)
    parts = [chunk(b"IDAT", stream[start:end]) for start, end in pairwise(cuts)]
    return b"".join([header(pixels.shape), before, *parts, after, chunk(b"IEND")])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 65536, (height, width)).astype(np.uint16)


def way(data: bytes) -> str:
    decoded = decode_png16(data)
    return FAST if isinstance(decoded, np.ndarray) else REFUSED if decoded is data else STRIPPED


def check(data: bytes, expected: np.ndarray, wanted_way: str) -> None:
    stored = CODECS["png16"](data)
    assert stored.dtype == np.uint16
    assert stored.flags.c_contiguous
    assert stored.flags.writeable
    np.testing.assert_array_equal(stored, expected)
    np.testing.assert_array_equal(stored, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    assert way(data) == wanted_way


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 2), (5, 9), (37, 53)], ids=str)
@pytest.mark.parametrize("kind", range(5))
def test_one_filter(kind: int, size: tuple[int, int]) -> None:
    pixels = noise(*size)
    check(png(pixels, [kind] * size[0]), pixels, FAST if kind < 3 else STRIPPED)


@pytest.mark.parametrize("num_kinds", [3, 5])
def test_mixed_filters(num_kinds: int) -> None:
    pixels = noise(64, 31)
    for seed in range(20):
        filters = np.random.default_rng(seed).integers(0, num_kinds, 64).tolist()
        check(png(pixels, filters, num_idat=1 + seed % 4), pixels, FAST if max(filters) < 3 else STRIPPED)


def test_more_than_one_stored_block() -> None:
    for width in (32767, 32768, 70000):  # 65535, 65537 and 140001 bytes: a block holds 65535
        pixels = noise(1, width)
        check(png(pixels, [4]), pixels, STRIPPED)


@pytest.mark.parametrize("encoder", [[], [cv2.IMWRITE_PNG_COMPRESSION, 6]], ids=str)
def test_files_of_opencv(encoder: list[int]) -> None:
    smooth = (np.add.outer(np.arange(120) ** 2, np.arange(90) * 7) % 9000).astype(np.uint16)
    check(cv2.imencode(".png", smooth, encoder)[1].tobytes(), smooth, STRIPPED if encoder else FAST)


def test_chunks_beside_the_pixels() -> None:
    pixels = noise(4, 6)
    gamma, text = chunk(b"gAMA", struct.pack(">I", 45455)), chunk(b"tEXt", b"Software\0by hand")
    shift = chunk(b"sBIT", b"\x0c")
    check(png(pixels, [1] * 4, before=gamma + shift + text, after=text) + b"behind the end", pixels, FAST)
    transparent = chunk(b"tRNS", struct.pack(">H", int(pixels[0, 0])))
    for other in (transparent, chunk(b"PLTE", bytes(3)), chunk(b"acTL", bytes(8)), chunk(b"ABCD")):
        assert way(png(pixels, [1] * 4, before=other)) == REFUSED


def test_other_kinds_are_left_to_opencv() -> None:
    pixels = noise(4, 6)
    body = chunk(b"IDAT", zlib.compress(filtered(pixels, [0] * 4))) + chunk(b"IEND")
    assert way(header((4, 6)) + body) == FAST
    for other in ({"depth": 8}, {"colour": 2}, {"colour": 4}, {"depth": 8, "colour": 3}, {"interlace": 1}):
        assert way(header((4, 6), **other) + body) == REFUSED
    passes = [pixels[:1, :1], pixels[:1, 4:5], pixels[:1, 2:3], pixels[2:3, ::2], pixels[::2, 1::2], pixels[1::2]]
    stream = b"".join(filtered(part, [0] * len(part)) for part in passes)
    interlaced = header((4, 6), interlace=1) + chunk(b"IDAT", zlib.compress(stream)) + chunk(b"IEND")
    check(interlaced, pixels, REFUSED)


def refused(data: bytes) -> bool:
    """Whether the codec refuses; it must agree with OpenCV alone."""
    assert way(data) != FAST
    alone = imdecode(data, cv2.IMREAD_UNCHANGED)
    try:
        stored = CODECS["png16"](data)
    except SampleError:
        assert alone is None
        return True
    np.testing.assert_array_equal(stored, alone)
    return False


@pytest.mark.parametrize("kind", [1, 4])
def test_no_flipped_bit_and_no_cut_is_decoded(kind: int) -> None:
    """Every chunk has a checksum: what OpenCV still reads of a damaged file, it reads by itself."""
    data = png(noise(9, 5), [kind] * 9, num_idat=2)
    assert all(refused(data[:end]) for end in range(33, len(data)))
    for place in range(8 * 33, 8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        assert decode_png16(bytes(flipped)) == bytes(flipped)
    middle = bytearray(data)
    middle[len(data) // 3] ^= 1
    assert refused(bytes(middle))


def damaged_streams() -> dict[str, bytes]:
    """Streams wrong in themselves, to be put into a chunk whose checksum is right."""
    raw = filtered(noise(9, 5), [1] * 9)
    stream = zlib.compress(raw)
    flipped = stream[:20] + bytes([stream[20] ^ 1]) + stream[21:]
    return {
        "wrong sum": stream[:-1] + bytes([stream[-1] ^ 1]),
        "no sum": stream[:-4],
        "cut": stream[:-20],
        "flipped": flipped,
        "row missing": zlib.compress(raw[:-11]),
        "row too much": zlib.compress(raw + raw[:11]),
        "no zlib": raw,
        "empty": b"",
    }


@pytest.mark.parametrize("name", damaged_streams())
def test_damaged_stream_is_left_to_opencv(name: str) -> None:
    data = header((9, 5)) + chunk(b"IDAT", damaged_streams()[name]) + chunk(b"IEND")
    assert way(data) == REFUSED
    refused(data)


def test_unknown_filter_is_refused() -> None:
    assert refused(png(noise(3, 4), [0, 7, 0]))


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_no_pixels(size: tuple[int, int]) -> None:
    assert refused(header(size) + chunk(b"IDAT", zlib.compress(bytes(size[0]))) + chunk(b"IEND"))


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (2**32 - 1, 2**32 - 1), (2**20, 2**20)])
def test_size_that_the_file_cannot_hold_costs_no_memory(size: tuple[int, int]) -> None:
    data = header(size) + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND")
    tracemalloc.start()
    try:
        assert way(data) == REFUSED
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    with pytest.raises(SampleError):
        CODECS["png16"](data)


def test_bomb_is_inflated_no_further_than_its_size() -> None:
    data = header((100, 100)) + chunk(b"IDAT", zlib.compress(bytes(50_000_000))) + chunk(b"IEND")
    tracemalloc.start()
    try:
        assert way(data) == REFUSED
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()
