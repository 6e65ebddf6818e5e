"""Windows: where a crop lies, and that image and label are cut by one plan."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from depthkit.data.decode import decode_image
from depthkit.data.windows import (
    Window,
    crop_image,
    full_window,
    inference_size,
    jpeg_reduction,
    normalize,
    random_window,
    target_grid,
)

SIZES = [(480, 640), (640, 480), (33, 500), (375, 1242), (32, 32), (20, 31)]
CROPS = [(32, 32), (518, 518), (352, 704), (16, 48)]


@pytest.mark.parametrize("image_size", SIZES)
@pytest.mark.parametrize("crop_size", CROPS)
def test_a_window_takes_the_whole_of_one_side_and_the_aspect_of_the_crop(
    image_size: tuple[int, int], crop_size: tuple[int, int]
):
    window = random_window(image_size, crop_size, np.random.default_rng(0), flip_probability=0.5)
    assert window.size == crop_size
    assert window.height == image_size[0] or window.width == image_size[1]
    assert 0 <= window.top <= image_size[0] - window.height
    assert 0 <= window.left <= image_size[1] - window.width
    # The scale to the crop is the same for both sides, up to the rounding of the window to whole pixels.
    assert abs(window.height * crop_size[1] - window.width * crop_size[0]) <= 0.5 * max(crop_size) + 1e-6


def test_windows_reach_every_offset_and_flip_as_often_as_asked():
    generator = np.random.default_rng(0)
    windows = [random_window((32, 40), (32, 32), generator, flip_probability=0.25) for _ in range(2000)]
    offsets = np.bincount([window.left for window in windows], minlength=9)
    assert len(offsets) == 9
    assert offsets.min() > 150  # 222 expected
    assert abs(np.mean([window.flip for window in windows]) - 0.25) < 0.04
    assert not random_window((32, 40), (32, 32), generator, flip_probability=0).flip
    assert random_window((32, 40), (32, 32), generator, flip_probability=1).flip


def coordinates(size: tuple[int, int], of: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixel centres of a map of `size` lie in an image of size `of`, as two (H, W) maps in its pixels."""
    rows = (np.arange(size[0]) + 0.5) * of[0] / size[0]
    cols = (np.arange(size[1]) + 0.5) * of[1] / size[1]
    return tuple(np.meshgrid(rows, cols, indexing="ij"))


def ramp_image(size: tuple[int, int]) -> np.ndarray:
    """Red grows to the right and green downwards, both from 10 to 245."""
    rows, cols = coordinates(size, (1, 1))
    channels = [10 + 235 * cols, 10 + 235 * rows, np.full(size, 128.0)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


IMAGE_SIZE = (202, 334)  # not multiples of 8
WINDOWS = [
    Window(0, 0, 202, 202, (32, 32)),
    Window(0, 132, 202, 202, (24, 24), flip=True),
    Window(20, 50, 100, 200, (48, 96)),
    Window(51, 77, 40, 40, (64, 64), flip=True),
    Window(2, 100, 200, 100, (200, 100)),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("label_size", [IMAGE_SIZE, (101, 167), (67, 111)])
def test_label_pixels_lie_under_the_centres_of_the_crop(window: Window, label_size: tuple[int, int]):
    rows, cols = target_grid(window, IMAGE_SIZE, label_size)
    steps = np.arange(window.size[1])[:: -1 if window.flip else 1]
    centre_rows = window.top + (np.arange(window.size[0]) + 0.5) * window.height / window.size[0]
    centre_cols = window.left + (steps + 0.5) * window.width / window.size[1]
    label_rows, label_cols = coordinates(label_size, IMAGE_SIZE)
    assert np.abs(label_rows[rows, 0] - centre_rows).max() <= 0.5 * IMAGE_SIZE[0] / label_size[0] + 1e-6
    assert np.abs(label_cols[0, cols] - centre_cols).max() <= 0.5 * IMAGE_SIZE[1] / label_size[1] + 1e-6


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("label_size", [IMAGE_SIZE, (101, 167), (67, 111)])
@pytest.mark.parametrize("reduced", [False, True])
def test_image_and_label_are_cut_together(window: Window, label_size: tuple[int, int], reduced: bool):
    """The colours of the image say where each pixel comes from, and so do the numbers of the label."""
    done, jpeg = cv2.imencode(".jpg", ramp_image(IMAGE_SIZE)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
    assert done
    reduction = jpeg_reduction(window) if reduced else 1
    crop = crop_image(decode_image(jpeg.tobytes(), reduce=reduction), window, IMAGE_SIZE)
    assert crop.shape == (*window.size, 3)
    assert crop.flags.c_contiguous
    rows, cols = target_grid(window, IMAGE_SIZE, label_size)
    label_rows, label_cols = coordinates(label_size, IMAGE_SIZE)
    seen_cols = (crop[..., 0].astype(float) - 10) / 235 * IMAGE_SIZE[1]
    seen_rows = (crop[..., 1].astype(float) - 10) / 235 * IMAGE_SIZE[0]
    # Half a pixel of the label, half a pixel of the (reduced) image, and three grey levels of JPEG and rounding.
    for seen, label, length, label_length in (
        (seen_rows, label_rows, IMAGE_SIZE[0], label_size[0]),
        (seen_cols, label_cols, IMAGE_SIZE[1], label_size[1]),
    ):
        tolerance = 0.5 * length / label_length + 0.5 * reduction + 3 / 235 * length
        error = seen - label[rows][:, cols]
        assert np.abs(error).max() <= tolerance
        # No shift of the whole: half a pixel of the reduced image is the most that rounding its window can cause.
        assert abs(error.mean()) <= 0.5 * reduction + 0.6


def test_a_crop_of_its_own_size_is_the_image():
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    window = Window(3, 7, 32, 32, (32, 32))
    np.testing.assert_array_equal(crop_image(image, window, (40, 60)), image[3:35, 7:39])
    np.testing.assert_array_equal(crop_image(image, replace(window, flip=True), (40, 60)), image[3:35, 7:39][:, ::-1])


def test_shrinking_averages():
    """A checkerboard of single pixels becomes grey; without averaging it would stay black and white."""
    image = np.repeat((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    crop = crop_image(image, full_window((64, 64), (16, 16)), (64, 64))
    assert np.abs(crop.astype(int) - 128).max() <= 1


def lower_bound_size(height: int, width: int, target: int, multiple: int) -> tuple[int, int]:
    """The rule as the released transform states it: larger scale for both, nearest multiple, up if below the target."""
    scale = max(target / height, target / width)

    def constrain(side: float) -> int:
        nearest = int(np.round(side / multiple) * multiple)
        return nearest if nearest >= target else math.ceil(side / multiple) * multiple

    return constrain(scale * height), constrain(scale * width)


@pytest.mark.parametrize(("short_side", "multiple"), [(518, 14), (510, 14), (96, 8), (384, 32), (37, 14)])
def test_inference_size_is_the_released_rule(short_side: int, multiple: int):
    generator = np.random.default_rng(0)
    for height, width in [*SIZES, *generator.integers(20, 2000, (200, 2)).tolist()]:
        size = inference_size((height, width), short_side, multiple)
        assert size == lower_bound_size(height, width, short_side, multiple), (height, width)
        assert min(size) >= short_side
        assert size[0] % multiple == size[1] % multiple == 0


def test_inference_size_of_a_vga_image():
    assert inference_size((480, 640), 518, 14) == (518, 686)


@pytest.mark.parametrize(
    ("window_side", "reduction"),
    [(16, 1), (63, 1), (64, 2), (127, 2), (128, 4), (255, 4), (256, 8), (4000, 8)],
)
def test_a_jpeg_is_reduced_as_far_as_it_covers_the_crop(window_side: int, reduction: int):
    assert jpeg_reduction(Window(0, 0, window_side, 5000, (32, 32))) == reduction
    assert jpeg_reduction(Window(0, 0, 5000, window_side, (32, 32))) == reduction


def test_normalize_is_imagenets():
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (image / 255.0 - mean[:, None, None]) / std[:, None, None]
    result = normalize(torch.from_numpy(image))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
