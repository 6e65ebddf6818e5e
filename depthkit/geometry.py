"""Conversions between the quantities that depth labels come in. Every conversion has its one home here.

All are elementwise formulas on valid (finite, positive) values and work on numpy arrays and torch tensors alike; the
caller masks. Pixel centres are at +0.5: column u of an image covers [u, u + 1).
"""

from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # processes that render or pack need numpy alone, and torch takes seconds to load
    from torch import Tensor

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, "Tensor")


def reciprocal(values: ArrayOrTensor) -> ArrayOrTensor:
    """Depth (m) to inverse depth (1/m) or back: `1 / values`, for values > 0."""
    return values**-1


def pixel_rays(
    rows: ArrayOrTensor, cols: ArrayOrTensor, intrinsics_px: tuple[float, float, float, float]
) -> tuple[ArrayOrTensor, ArrayOrTensor]:
    """Direction (x, y, 1) of the ray through each pixel coordinate: `x = (col - cx) / fx`, `y = (row - cy) / fy`.

    `rows`, `cols` are continuous pixel coordinates in the frame of `intrinsics_px = (fx, fy, cx, cy)`.
    """
    fx, fy, cx, cy = intrinsics_px
    return (cols - cx) / fx, (rows - cy) / fy


def ray_distance_to_depth(distance: ArrayOrTensor, x: ArrayOrTensor, y: ArrayOrTensor) -> ArrayOrTensor:
    """Distance along the viewing ray to planar depth: `z = distance / sqrt(x^2 + y^2 + 1)` (Hypersim)."""
    return distance / (x**2 + y**2 + 1) ** 0.5


def stereo_disparity_to_depth(
    stereo_disparity_px: ArrayOrTensor, *, focal_px: float, baseline_m: float, doffs_px: float = 0.0
) -> ArrayOrTensor:
    """Pixel offset of a rectified stereo pair to depth: `z = baseline * focal / (disparity + doffs)`.

    `doffs_px` is the difference of the two principal points (Middlebury 2014 `calib.txt`).
    """
    return baseline_m * focal_px / (stereo_disparity_px + doffs_px)
