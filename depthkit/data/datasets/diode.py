"""DIODE: laser scans seen by a computed camera, with a mask of the pixels that the laser measured."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from depthkit.data.codecs import read_npy
from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, npz

INTRINSICS = [886.81, 927.06, 512.0, 384.0]
"""fx, fy, cx, cy of the computed camera, `intrinsics.txt` of the devkit; fx and fy do differ."""


def _find(root: Path, kind: str) -> dict[str, Iterator[Pair]]:
    """The validation images of one kind."""
    required(root / "val" / kind, "of val.tar.gz")
    return {
        "val": pairs_by_pattern(
            root, f"val/{kind}/*/*/*.png", _label, facts_of=lambda image: {"intrinsics_px": INTRINSICS}
        )
    }


find_indoor = partial(_find, kind="indoors")
find_outdoor = partial(_find, kind="outdoor")


def _label(image: Path) -> Source:
    depth, mask = (image.with_name(f"{image.stem}_{name}.npy") for name in ("depth", "depth_mask"))
    return Source(depth, ".npz", read_masked, (mask,))


def read_masked(path: Path, mask: Path) -> bytes:
    """Depth (H, W, 1) with 0 where the mask (H, W) is 0."""
    depth, is_measured = read_npy(path.read_bytes()), read_npy(mask.read_bytes()) > 0
    if depth.shape != is_measured.shape:
        raise SampleError(f"{mask}: the mask is {is_measured.shape}, the depth map {depth.shape}")
    return npz(np.where(is_measured, depth, 0))
