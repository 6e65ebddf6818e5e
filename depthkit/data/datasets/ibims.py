"""iBims-1: 100 indoor images with laser depth, and masks of pixels that have no meaningful depth."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from depthkit.data.codecs import read_png16
from depthkit.data.datasets.layouts import pairs_by_pattern, read_numbers, required
from depthkit.data.pairs import Pair
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, png

MASKS = ("mask_invalid", "mask_transp")
"""0 = invalid, or seen through glass: left out, as in the authors' evaluation."""


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """The 100 core images."""
    for name in ("rgb", "depth", *MASKS):
        required(root / "ibims1_core_raw" / name, "of ibims1_core_raw.zip")

    def label_of(image: Path) -> Source:
        folder = image.parents[1]
        return Source(folder / "depth" / image.name, ".png", read_masked, tuple(folder / m / image.name for m in MASKS))

    return {"test": pairs_by_pattern(root, "ibims1_core_raw/rgb/*.png", label_of, facts_of=_facts)}


def read_masked(path: Path, *masks: Path) -> bytes:
    """The 16-bit depth PNG with 0 wherever one of the masks is 0."""
    depth = read_png16(path.read_bytes())
    for mask in masks:
        pixels = cv2.imdecode(np.frombuffer(mask.read_bytes(), np.uint8), cv2.IMREAD_GRAYSCALE)
        if pixels is None or pixels.shape != depth.shape:
            raise SampleError(f"{mask}: not a mask of the size of the depth map, {depth.shape}")
        depth = np.where(pixels > 0, depth, 0)
    return png(depth)


def _facts(image: Path) -> dict[str, list[float]]:
    """A calibration file holds a 3x3 matrix, or fx, fy, cx, cy, divided by commas."""
    path = image.parents[1] / "calib" / f"{image.stem}.txt"
    if not path.is_file():
        return {}
    numbers = read_numbers(path, (4, 9))
    return {"intrinsics_px": (numbers if numbers.size == 4 else numbers[[0, 4, 2, 5]]).tolist()}
