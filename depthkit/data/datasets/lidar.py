"""Depth maps from laser points: each pixel takes the nearest point that falls into it."""

import numpy as np


def nearest_points(rows: np.ndarray, cols: np.ndarray, depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 with 0 where no point falls, from N points at integer `rows`, `cols` with positive `depth`.

    Points outside the image or without positive depth are left out.
    """
    is_inside = (rows >= 0) & (rows < size[0]) & (cols >= 0) & (cols < size[1]) & (depth > 0)
    rows, cols, depth = rows[is_inside], cols[is_inside], depth[is_inside]
    order = np.argsort(-depth, kind="stable")  # of two numbers for one place, the last one stays
    image = np.zeros(size, np.float32)
    image[rows[order], cols[order]] = depth[order]
    return image
