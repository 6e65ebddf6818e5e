"""Images: every format becomes RGB, cut ones are errors."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_decode import save

from depthkit.data.decode import decode_image, image_size
from depthkit.data.quarantine import SampleError


def make_image(height: int = 48, width: int = 65) -> np.ndarray:
    """Smooth, so that JPEG keeps it nearly."""
    row, col = np.mgrid[:height, :width]
    return np.stack([row * 255 / height, col * 255 / width, (row + col) * 255 / (height + width)], -1).astype(np.uint8)


# Images


@pytest.mark.parametrize(("image_format", "tolerance"), [("JPEG", 2), ("PNG", 0), ("WEBP", 2), ("PPM", 0)])
def test_image_is_rgb(image_format: str, tolerance: int) -> None:
    image = make_image()
    data = save(image, image_format, quality=95)
    decoded = decode_image(data)
    assert image_size(data) == decoded.shape[:2] == (48, 65)
    assert np.abs(decoded.astype(int) - image).mean() <= tolerance


@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_reduced_jpeg(reduce: int) -> None:
    data = save(make_image(), "JPEG", quality=95)
    reduced = decode_image(data, reduce=reduce)
    height, width = -(-48 // reduce), -(-65 // reduce)
    assert reduced.shape == (height, width, 3)
    padding = ((0, height * reduce - 48), (0, width * reduce - 65), (0, 0))
    blocks = np.pad(make_image(), padding, mode="edge").reshape(height, reduce, width, reduce, 3)
    assert np.abs(reduced - blocks.mean(axis=(1, 3))).max() < 6
    assert decode_image(save(make_image(), "PNG"), reduce=reduce).shape == (48, 65, 3)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(make_image(), image_format, exif=exif)
    file = Image.open(io.BytesIO(data))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> PIL's Transpose that undoes it
    upright = file if orientation == 1 else file.transpose(Image.Transpose(turn[orientation]))
    decoded = decode_image(data)
    assert image_size(data) == decoded.shape[:2] == ((48, 65) if orientation < 5 else (65, 48))
    assert np.abs(decoded.astype(int) - np.asarray(upright)).max() <= 8


def test_unusual_pixels_become_rgb() -> None:
    image = make_image()
    grey = image[..., 0]
    np.testing.assert_array_equal(decode_image(save(grey, "PNG")), np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(decode_image(save(np.dstack([image, grey]), "PNG")), image)
    deep = grey.astype(np.uint16) * 256 + 99
    np.testing.assert_array_equal(decode_image(save(deep, "PNG")), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("reduce", [1, 2, 4, 8])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("lost", [1, 2, 40, 600])
def test_cut_jpeg_is_an_error_and_not_grey(reduce: int, progressive: bool, lost: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    thumbnail = Image.Exif()
    thumbnail[0x927C] = save(image, "JPEG")
    data = save(image, "JPEG", progressive=progressive, exif=thumbnail)
    assert decode_image(data, reduce=reduce).any()
    for cut in (data[:-lost], data[:-lost] + bytes(lost)):
        with pytest.raises(SampleError, match=rf"damaged or cut off image \({len(cut)} bytes\)"):
            decode_image(cut, reduce=reduce)


def test_jpeg_with_fill_bytes_and_a_trailer_is_whole() -> None:
    data = save(make_image(), "JPEG")
    padded = data[:2] + b"\xff" * 3 + data[2:] + b"\xff\xda trailer of a camera" + bytes(100)
    np.testing.assert_array_equal(decode_image(padded), decode_image(data))


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "PPM"])
def test_cut_image_is_an_error(image_format: str) -> None:
    data = save(make_image(), image_format)
    for cut in (b"", data[:20], data[: len(data) // 2], data[:-1]):
        with pytest.raises(SampleError, match="damaged or cut off"):
            decode_image(cut)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html>", save(make_image(), "PNG")[:20]])
def test_unreadable_image_header(data: bytes) -> None:
    with pytest.raises(SampleError, match=rf"unreadable image header \({len(data)} bytes\)"):
        image_size(data)


# Real samples, decoded a second time by the rules of their README


def test_every_real_image(samples_dir: Path) -> None:
    rows = [json.loads(line) for line in (samples_dir / "index.jsonl").read_text().splitlines()]
    for row in rows:
        path = samples_dir / row["rgb"]
        expected = np.asarray(Image.open(path).convert("RGB"))
        decoded = decode_image(path.read_bytes())
        assert image_size(path.read_bytes()) == decoded.shape[:2] == expected.shape[:2]
        assert np.abs(decoded.astype(np.int16) - expected).max() <= (0 if path.suffix in (".png", ".ppm") else 8)
