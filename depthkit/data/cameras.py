"""What the facts of a sample say about its camera, and how the window that is cut out of the image changes it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from depthkit.data.decode import number_fact, read_facts
from depthkit.data.quarantine import SampleError
from depthkit.data.windows import Window


def image_facts(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The facts of a sample, none where its JSON is not ours: tars of others hold what they like."""
    try:
        return read_facts(members)
    except SampleError:
        return {}


def image_intrinsics(facts: Mapping[str, Any], image_size: tuple[int, int]) -> np.ndarray:
    """fx, fy, cx, cy (4,) float64 in pixels of the image; NaN where they are not stated, or the camera is no pinhole.

    Facts hold them in pixels of the label, whose (height, width) they name as `label_size` where the image has another.
    """
    try:
        stated = np.array(number_fact(facts, "intrinsics_px"))
        label_size = np.array(facts.get("label_size", image_size), float)
    except (SampleError, TypeError, ValueError):
        return np.full(4, np.nan)
    if facts.get("camera", "pinhole") != "pinhole" or label_size.shape != (2,) or not (label_size > 0).all():
        return np.full(4, np.nan)
    return stated * np.tile(np.array(image_size)[::-1] / label_size[::-1], 2)


def window_intrinsics(intrinsics_px: np.ndarray, window: Window) -> np.ndarray:
    """fx, fy, cx, cy (4,) float32 in pixels of what `window` cuts out of an image that `intrinsics_px` belong to.

    Shifted by the corner, scaled with the resize, mirrored: cx of a flipped crop is its width minus cx.
    """
    fx, fy, cx, cy = intrinsics_px
    scale_y, scale_x = window.size[0] / window.height, window.size[1] / window.width
    cx, cy = (cx - window.left) * scale_x, (cy - window.top) * scale_y
    return np.array([fx * scale_x, fy * scale_y, window.size[1] - cx if window.flip else cx, cy], np.float32)


def image_pose(facts: Mapping[str, Any]) -> np.ndarray:
    """Camera-to-world (4, 4) float64, the fact `camera_to_world` or `pose`; NaN where it is no rigid motion."""
    try:
        pose = np.array(facts.get("camera_to_world", facts.get("pose")), np.float64)
    except (TypeError, ValueError):
        return np.full((4, 4), np.nan)
    if pose.shape != (4, 4) or not np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3), atol=0.01):
        return np.full((4, 4), np.nan)
    return pose


def window_pose(pose: np.ndarray, window: Window) -> np.ndarray:
    """The pose (4, 4) of the camera that took what `window` shows: mirrored, in a mirrored world, if it is flipped."""
    mirror = np.diag([-1.0 if window.flip else 1.0, 1, 1, 1])
    return mirror @ pose @ mirror
