"""Perturbations: photometric ones of single images (albumentations), another camera for image and target, and CutMix
on batches."""

import os
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from depthkit.config import AugmentConfig, CameraAugmentConfig
from depthkit.types import Batch, Kind, Sample

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer release otherwise
import albumentations as A


class PhotometricPerturbation:
    """Colour jitter, grayscale and Gaussian blur of an (H, W, 3) uint8 image, seeded per call; the same for all frames
    of a clip (T, H, W, 3)."""

    def __init__(self, config: AugmentConfig) -> None:
        self.transforms: list[A.ImageOnlyTransform] = []
        if config.color_jitter:
            around_one = {
                name: (max(0.0, 1 - getattr(config, name)), 1 + getattr(config, name))
                for name in ("brightness", "contrast", "saturation")
            }
            self.transforms.append(A.ColorJitter(**around_one, hue=(-config.hue, config.hue), p=config.color_jitter))
        if config.grayscale:
            self.transforms.append(A.ToGray(p=config.grayscale))
        if config.blur:
            low, high = config.blur_sigma
            self.transforms.append(A.GaussianBlur(blur_limit=0, sigma_limit=(low, high), p=config.blur))

    def __call__(self, image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        name = "image" if image.ndim == 3 else "images"
        # One seed each: with a common one the probabilities of all transforms would be the same draw.
        for transform, seed in zip(self.transforms, generator.integers(2**31, size=len(self.transforms)), strict=True):
            transform.set_random_seed(int(seed))
            image = transform(**{name: image})[name]
        return image


class Camera(NamedTuple):
    """How another camera, in another place, would have taken the picture."""

    zoom: float = 1.0  # the scene is nearer by this factor; the window shows that much less of the image
    degrees: float = 0.0  # counter-clockwise, about the middle of the crop
    colors: np.ndarray | None = None  # (256, 1, 3) uint8: old grey level -> new one, for each channel


def draw_camera(config: CameraAugmentConfig, generator: np.random.Generator) -> Camera:
    """A camera by chance; what is off draws no number.

    Colours: `255 * gain * brightness * (x / 255) ** gamma` with a gain for each channel, clipped. Sources: zoom,
    rotation and gains of Eigen et al. 2014, section 3.3; rotation, gamma, brightness and gains of ZoeDepth
    (zoedepth/data/data_mono.py).
    """
    zoom = generator.uniform(config.zoom[0], config.zoom[1]) if config.zoom != [1, 1] else 1.0
    degrees = generator.uniform(-config.rotation, config.rotation) if config.rotation else 0.0
    if not config.color or generator.random() >= config.color:
        return Camera(zoom, degrees)
    gamma, brightness, *gains = (
        generator.uniform(bounds[0], bounds[1])
        for bounds in (config.gamma, config.brightness, *[config.channel_gain] * 3)
    )
    levels = 255 * brightness * np.array(gains) * (np.arange(256)[:, None] / 255) ** gamma
    return Camera(zoom, degrees, np.rint(levels).clip(0, 255).astype(np.uint8)[:, None])


def take_again(sample: Sample, camera: Camera, kind: Kind | None) -> None:
    """What `camera` makes of a sample whose window was chosen with its zoom, in place.

    Depth is divided by the zoom and disparity multiplied, so that the focal length stays what it was: objects look as
    large as they would from there. Corners that a rotation turns in are mirrored in the image and not supervised. The
    world of a clip stays as it is, for the sake of its motion: the zoom is one of the lens.
    """
    if camera.zoom != 1 and sample.image.ndim == 3:
        sample.target *= np.float32(camera.zoom if kind == "disparity" else 1 / camera.zoom)
        sample.intrinsics_px[:2] /= camera.zoom
    if camera.degrees:
        rotate(sample, camera.degrees)
    if camera.colors is not None:
        rows = sample.image.reshape(-1, *sample.image.shape[-2:])
        sample.image = cv2.LUT(rows, camera.colors).reshape(sample.image.shape)


def rotate(sample: Sample, degrees: float) -> None:
    """Image (bilinear), target and mask (nearest) and principal point, about the middle, in place."""
    height, width = sample.target.shape
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1)
    sample.image = cv2.warpAffine(
        sample.image, turn, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    sample.target, mask = (
        cv2.warpAffine(values, turn, (width, height), flags=cv2.INTER_NEAREST)
        for values in (sample.target, sample.valid_mask.astype(np.uint8))
    )
    sample.valid_mask = mask.astype(bool)
    middle = np.array([width / 2, height / 2])
    sample.intrinsics_px[2:] = middle + turn[:, :2] @ (sample.intrinsics_px[2:] - middle)


def sample_cutmix_box(
    size: tuple[int, int], config: AugmentConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """A CutMix box (top, left, height, width), height 0 for none.

    Drawn as UniMatch does, which the authors point to (Depth-Anything issue 240): area share uniform in `cutmix_area`,
    drawn once; aspect uniform in `cutmix_aspect` to its inverse and place, redrawn until the box lies inside the image.
    """
    if generator.random() >= config.cutmix:
        return (0, 0, 0, 0)
    smallest, largest = config.cutmix_area
    area = generator.uniform(smallest, largest) * size[0] * size[1]
    while True:
        aspect = generator.uniform(config.cutmix_aspect, 1 / config.cutmix_aspect)
        height, width = int(np.sqrt(area * aspect)), int(np.sqrt(area / aspect))
        top, left = int(generator.integers(size[0])), int(generator.integers(size[1]))
        if 0 < height <= size[0] - top and 0 < width <= size[1] - left:
            return (top, left, height, width)


def box_region(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (B, 4) of (top, left, height, width) to a mask (B, H, W), True inside."""
    top, left, height, width = boxes.view(-1, 4, 1, 1).unbind(1)
    rows = torch.arange(size[0], device=boxes.device).view(1, -1, 1)
    cols = torch.arange(size[1], device=boxes.device).view(1, 1, -1)
    return (rows >= top) & (rows < top + height) & (cols >= left) & (cols < left + width)


def cutmix(batch: Batch) -> Tensor:
    """Paste `cutmix_box` of each image's partner into it, image and target alike, in place; return the region.

    Partners are neighbours by position (0 with 1, 2 with 3, ...), so that they fall on one rank at any world size.
    V1 equation u_ab = u_a M + u_b (1 - M); the region (B, H, W) is where the partner was pasted. The loss normalises
    the two regions apart (`losses.cutmix_loss`), so the two targets need no common scale.
    """
    region = box_region(batch["cutmix_box"], (batch["image"].shape[-2], batch["image"].shape[-1]))
    partner = torch.arange(len(region), device=region.device) ^ 1
    batch["image"] = torch.where(region[:, None], batch["image"][partner], batch["image"])
    batch["target"] = torch.where(region, batch["target"][partner], batch["target"])
    batch["valid_mask"] = torch.where(region, batch["valid_mask"][partner], batch["valid_mask"])
    return region
