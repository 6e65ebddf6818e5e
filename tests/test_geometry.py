"""Conversions: values by hand, round trips, and a wall seen by a pinhole camera."""

import numpy as np
import pytest
import torch

from depthkit.geometry import pixel_rays, ray_distance_to_depth, reciprocal, stereo_disparity_to_depth

INTRINSICS_PX = (50.0, 40.0, 16.0, 12.0)  # of a 24 x 32 image
CONTAINERS = [np.array, torch.tensor]


@pytest.fixture(params=CONTAINERS, ids=["numpy", "torch"])
def make(request):
    return request.param


def pixel_centres(height, width, make):
    rows, cols = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    return make(rows), make(cols)


def test_reciprocal(make):
    depth = make([0.5, 2.0, 8.0])
    assert reciprocal(depth).tolist() == [2.0, 0.5, 0.125]
    np.testing.assert_allclose(reciprocal(reciprocal(depth)), depth)


def test_pixel_rays_by_hand(make):
    x, y = pixel_rays(make([12.0, 32.0]), make([16.0, 41.0]), INTRINSICS_PX)
    assert x.tolist() == [0.0, 0.5]  # the principal point, then 25 px to its right at fx = 50
    assert y.tolist() == [0.0, 0.5]  # and 20 px below it at fy = 40


def test_rays_are_symmetric_about_a_central_principal_point(make):
    x, y = pixel_rays(*pixel_centres(24, 32, make), INTRINSICS_PX)
    np.testing.assert_allclose(x, -np.flip(np.asarray(x), 1))
    np.testing.assert_allclose(y, -np.flip(np.asarray(y), 0))


def test_ray_distance_by_hand(make):
    """The ray (2/3, 2/3, 1/3) * 9 ends at depth 3; in the (x, y, 1) form it is (2, 2, 1)."""
    assert ray_distance_to_depth(make([9.0]), make([2.0]), make([2.0])).tolist() == [3.0]


def test_fronto_parallel_wall_has_one_depth(make):
    """Distances to a wall at z = 2.5 m grow towards the corners; the depth is 2.5 m everywhere."""
    fx, fy, cx, cy = INTRINSICS_PX
    distance = np.zeros((24, 32))
    for row, col in np.ndindex(24, 32):
        point = 2.5 * np.array([(col + 0.5 - cx) / fx, (row + 0.5 - cy) / fy, 1])
        distance[row, col] = np.sqrt(point @ point)
    assert distance[0, 0] > 1.04 * distance[12, 16]
    depth = ray_distance_to_depth(make(distance), *pixel_rays(*pixel_centres(24, 32, make), INTRINSICS_PX))
    np.testing.assert_allclose(depth, np.full((24, 32), 2.5))


def test_stereo_disparity_by_hand(make):
    disparity = make([25.0, 50.0])
    assert stereo_disparity_to_depth(disparity, focal_px=500.0, baseline_m=0.5).tolist() == [10.0, 5.0]
    depth = stereo_disparity_to_depth(disparity, focal_px=500.0, baseline_m=0.5, doffs_px=75.0)
    assert depth.tolist() == [2.5, 2.0]


def test_stereo_disparity_round_trip(make):
    """A point straight ahead of the left camera lies at its cx there, and at the right cx - focal * baseline / z."""
    depth = make([0.7, 3.0, 60.0])
    left_cx, right_cx = 500.0, 531.0
    disparity = left_cx - (right_cx - 1000 * 0.2 / depth)
    back = stereo_disparity_to_depth(disparity, focal_px=1000.0, baseline_m=0.2, doffs_px=right_cx - left_cx)
    np.testing.assert_allclose(back, depth, rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_precision_is_kept(dtype):
    values = np.ones(3, dtype)
    x, y = pixel_rays(values, values, INTRINSICS_PX)
    depth = ray_distance_to_depth(reciprocal(values), x, y)
    assert stereo_disparity_to_depth(depth, focal_px=500.0, baseline_m=0.1).dtype == dtype
