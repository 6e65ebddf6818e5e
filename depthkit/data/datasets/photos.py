"""Training sets of real images: DIML, HRWSI and MegaDepth."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from depthkit.data.codecs import imdecode, read_png8
from depthkit.data.datasets.layouts import pairs_by_pattern
from depthkit.data.pairs import Pair
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, npz, png, read_h5


def find_diml(root: Path) -> dict[str, Iterator[Pair]]:
    """The low resolution (LR) of both halves; HR holds the same views."""

    def label_of(image: Path) -> Path:
        if image.parent.name == "outleft":
            return image.parent.parent / "depthmap" / image.name
        return image.parent.parent / "depth_filled" / f"{image.stem.removesuffix('_c')}_depth_filled.png"

    def pairs(split: str) -> Iterator[Pair]:
        patterns = [f"indoor/{split}/LR/*/color/*_c.png", f"outdoor/{split}/LR/outleft/*.png"]
        return pairs_by_pattern(root, patterns, label_of)

    return {"train": pairs("train"), "test": pairs("test")}


def find_hrwsi(root: Path) -> dict[str, Iterator[Pair]]:
    def pairs(split: str) -> Iterator[Pair]:
        def place(folder: str, image: Path) -> Path:
            return root / split / folder / f"{image.stem}.png"

        def label_of(image: Path) -> Source:
            return Source(place("gts", image), ".png", read_checked, (place("valid_masks", image),))

        def sky_of(image: Path) -> Source:
            return Source(place("gts", image), ".png", read_farthest, (place("valid_masks", image),))

        return pairs_by_pattern(root, f"{split}/imgs/*.jpg", label_of, sky_of=sky_of)

    return {"train": pairs("train"), "val": pairs("val")}


def read_checked(path: Path, valid_mask: Path) -> bytes:
    """Disparity as 8-bit PNG, 0 where the authors' consistency check (`valid_mask` = 0) rejects it."""
    disparity, valid = _read_hrwsi(path, valid_mask)
    return png(np.where(valid, disparity, 0))


def read_farthest(path: Path, valid_mask: Path) -> bytes:
    """PNG, 255 where disparity is 0 and passes the check: the farthest of the image, which the label cannot say."""
    disparity, valid = _read_hrwsi(path, valid_mask)
    return png((valid & (disparity == 0)) * np.uint8(255))


def _read_hrwsi(path: Path, valid_mask: Path) -> tuple[np.ndarray, np.ndarray]:
    disparity, valid = read_png8(path.read_bytes()), imdecode(valid_mask.read_bytes(), cv2.IMREAD_GRAYSCALE)
    if valid is None or disparity.shape != valid.shape:
        raise SampleError(f"{valid_mask}: not a readable mask of {disparity.shape[1]}x{disparity.shape[0]}")
    return disparity, valid > 0


def find_megadepth(root: Path) -> dict[str, Iterator[Pair]]:
    def label_of(image: Path) -> Source:
        return Source(image.parent.parent / "depths" / f"{image.stem}.h5", ".npz", read_reconstructed)

    patterns = [f"**/dense*/imgs/*.{suffix}" for suffix in ("jpg", "JPG", "png")]
    return {"train": pairs_by_pattern(root, patterns, label_of)}


def read_reconstructed(path: Path) -> bytes:
    """Depth of MegaDepth as .npz; SampleError where its place is taken by ordinal labels: whole or negative."""
    depth = read_h5(path, "depth")
    if (depth < 0).any() or (depth == np.rint(depth)).all():
        raise SampleError(f"{path}: holds ordinal labels or nothing, not depth")
    return npz(depth)
