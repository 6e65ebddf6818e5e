"""Perturbations: photometric ones of single images (albumentations), CutMix on batches. They leave geometry alone."""

import os

import numpy as np
import torch
from torch import Tensor

from depthkit.config import AugmentConfig
from depthkit.types import Batch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network for a newer release otherwise
import albumentations as A


class PhotometricPerturbation:
    """Colour jitter, grayscale and Gaussian blur of an (H, W, 3) uint8 image, seeded per call."""

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
        # One seed each: with a common one the probabilities of all transforms would be the same draw.
        for transform, seed in zip(self.transforms, generator.integers(2**31, size=len(self.transforms)), strict=True):
            transform.set_random_seed(int(seed))
            image = transform(image=image)["image"]
        return image


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
