"""Which rectangle of an image becomes the network's input, and cutting it out.

The rectangle is chosen from the header's size, before any pixel is decoded, so that no pixel outside it is resized,
converted or perturbed, and image and label are cut by one plan.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Window:
    """A rectangle of the source image, in its pixels, that becomes an image of `size`; mirrored if `flip`.

    "Shorter side to the crop size, then a crop" takes the full shorter side, so the rectangle can be cut out first.
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    flip: bool = False


def random_window(
    image_size: tuple[int, int],
    crop_size: tuple[int, int],
    generator: np.random.Generator,
    *,
    flip_probability: float,
    zoom: float = 1.0,
) -> Window:
    """The window of "resize so that the image covers `crop_size`, and by `zoom` >= 1 on top, crop at random, flip"."""
    height, width = (max(1, round(side / zoom)) for side in covering_size(image_size, crop_size))
    top = int(generator.integers(image_size[0] - height + 1))
    left = int(generator.integers(image_size[1] - width + 1))
    return Window(top, left, height, width, crop_size, flip=bool(generator.random() < flip_probability))


def covering_size(image_size: tuple[int, int], crop_size: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) with the aspect of `crop_size` that fits into the image."""
    scale = max(crop_size[0] / image_size[0], crop_size[1] / image_size[1])
    return (
        min(image_size[0], max(1, round(crop_size[0] / scale))),
        min(image_size[1], max(1, round(crop_size[1] / scale))),
    )


def full_window(image_size: tuple[int, int], size: tuple[int, int]) -> Window:
    """The whole image, resized to `size`."""
    return Window(0, 0, *image_size, size)


def inference_size(image_size: tuple[int, int], short_side: int, multiple: int) -> tuple[int, int]:
    """(height, width) with the aspect kept, both at least `short_side`, each rounded to a multiple of the patch.

    The rule of the released models ("lower_bound", Depth-Anything util/transform.py): scale = max over both sides,
    round to the nearest multiple, up if that would fall below.
    """
    scale = max(short_side / image_size[0], short_side / image_size[1])
    floor = -(-short_side // multiple) * multiple
    height, width = (max(floor, round(side * scale / multiple) * multiple) for side in image_size)
    return height, width


def jpeg_reduction(window: Window) -> int:
    """The largest factor of 8, 4, 2, 1 by which a JPEG may be decoded smaller and still cover the window's size."""
    room = min(window.height / window.size[0], window.width / window.size[1])
    return next(factor for factor in (8, 4, 2, 1) if room >= factor or factor == 1)


def crop_image(image: np.ndarray, window: Window, image_size: tuple[int, int]) -> np.ndarray:
    """Cut `window` out of a decoded image and resize it: (H, W, 3) uint8.

    `image` may have been decoded at a reduced scale; `image_size` is the full size that the window refers to.
    """
    scale_y, scale_x = image.shape[0] / image_size[0], image.shape[1] / image_size[1]
    top, left = round(window.top * scale_y), round(window.left * scale_x)
    height, width = max(1, round(window.height * scale_y)), max(1, round(window.width * scale_x))
    crop = image[top : top + height, left : left + width]
    if crop.shape[:2] != window.size:
        crop = cv2.resize(crop, window.size[::-1], interpolation=resize_filter(crop.shape, window.size))
    return cv2.flip(crop, 1) if window.flip else np.ascontiguousarray(crop)


def resize_filter(source: tuple[int, ...], size: tuple[int, int]) -> int:
    """OpenCV's flag: cubic to enlarge, bilinear to shrink by less than 2, area averaging from there on.

    Below 2, bilinear too reads every source pixel, in a tenth of the time; at 2 the two are the same.
    """
    shrink = min(source[0] / size[0], source[1] / size[1])
    if shrink <= 1:
        return cv2.INTER_CUBIC
    return cv2.INTER_LINEAR if shrink < 2 else cv2.INTER_AREA


def target_grid(
    window: Window, image_size: tuple[int, int], target_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the label that lie under the pixel centres of the crop (nearest; labels are never blended).

    The label may be smaller than the image; both cover the same view.
    """
    rows = _nearest(window.top, window.height, window.size[0], image_size[0], target_size[0])
    cols = _nearest(window.left, window.width, window.size[1], image_size[1], target_size[1])
    return rows, cols[::-1] if window.flip else cols


def _nearest(start: int, length: int, num: int, image_length: int, target_length: int) -> np.ndarray:
    centres = start + (np.arange(num) + 0.5) * (length / num)
    return np.minimum((centres * (target_length / image_length)).astype(np.int64), target_length - 1)


def normalize(image: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> Tensor:
    """uint8 (B, 3, H, W) to float32 `(image / 255 - mean) / std`, by default as DINOv2 was trained."""
    means = image.new_tensor(mean, dtype=torch.float32).view(3, 1, 1)
    stds = image.new_tensor(std, dtype=torch.float32).view(3, 1, 1)
    # In place: on a CPU new memory for each step of the formula costs more than the arithmetic.
    return image.to(torch.float32, copy=True).div_(255).sub_(means).div_(stds)
