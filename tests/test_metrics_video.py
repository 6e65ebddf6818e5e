"""Video: consistency of depth under known motion, and the error of a path."""

import numpy as np
import pytest
import torch

from depthkit.metrics_video import ate, temporal_consistency

INTRINSICS = (20.0, 20.0, 8.0, 6.0)


def pose(x=0.0, y=0.0, z=0.0, yaw=0.0):
    """Camera to world."""
    matrix = np.eye(4)
    matrix[:3, :3] = [[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]]
    matrix[:3, 3] = x, y, z
    return matrix


def poses(*matrices):
    return torch.from_numpy(np.stack(matrices))


def consistency(depth, camera, valid_mask=None):
    valid_mask = torch.ones_like(depth, dtype=torch.bool) if valid_mask is None else valid_mask
    return temporal_consistency(depth, camera, INTRINSICS, valid_mask)


def test_a_still_camera_sees_the_relative_change():
    depth = torch.full((3, 12, 16), 2.0)
    depth[1] = 2.5
    errors = consistency(depth, poses(pose(), pose(), pose()))
    assert errors.tolist() == pytest.approx([(0.5 / 2.5 + 0.5 / 2) / 2] * 2)


def test_a_wall_that_the_camera_approaches_is_consistent_and_a_frozen_depth_is_not():
    wall = torch.tensor([5.0, 4.0, 3.0])[:, None, None].expand(3, 12, 16)
    camera = poses(pose(z=0), pose(z=1), pose(z=2))
    assert consistency(wall, camera).max() < 1e-6
    frozen = torch.full_like(wall, 5)
    assert consistency(frozen, camera).tolist() == pytest.approx([0.2] * 2)


def test_a_sideways_step_moves_pixels_by_their_depth():
    """5 m to the right by 1 m is 20 / 5 = 4 columns: a column pattern moved by them is consistent, and one left in
    place is not. The two columns that leave the view do not count.
    """
    near = torch.full((1, 12, 16), 5.0)
    camera = poses(pose(), pose(x=1))
    assert consistency(torch.cat([near, near]), camera).item() == pytest.approx(0, abs=1e-6)
    marked = near.clone()
    marked[..., 10] = 5.001
    assert consistency(torch.cat([marked, marked.roll(-4, 2)]), camera).item() < 1e-6
    assert consistency(torch.cat([marked, marked]), camera).item() > 1e-5


def reference(depth, camera, valid):
    """Loops over pixels in float64, one direction after the other."""

    def one_way(i, j):
        moved = np.full(depth[j].shape, np.inf)
        there = np.linalg.inv(camera[j]) @ camera[i]
        fx, fy, cx, cy = INTRINSICS
        for row, col in zip(*np.nonzero(valid[i]), strict=True):
            z = depth[i][row, col]
            x, y, z, _ = there @ [(col + 0.5 - cx) / fx * z, (row + 0.5 - cy) / fy * z, z, 1]
            to = int(np.floor(fy * y / z + cy)), int(np.floor(fx * x / z + cx))
            if z > 0 and 0 <= to[0] < moved.shape[0] and 0 <= to[1] < moved.shape[1]:
                moved[to] = min(moved[to], z)
        seen = np.isfinite(moved) & valid[j]
        return np.mean(np.abs(depth[j][seen] - moved[seen]) / depth[j][seen])

    return [(one_way(i, i + 1) + one_way(i + 1, i)) / 2 for i in range(len(depth) - 1)]


def test_equals_the_reference():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 6, (4, 12, 16)).astype(np.float32)
    valid = rng.random(depth.shape) < 0.8
    depth[~valid] = np.nan
    camera = np.stack([pose(*rng.normal(0, 0.3, 3), yaw=rng.normal(0, 0.1)) for _ in range(4)])
    camera[:, :3, 3] += 5000  # the world's origin is far away
    errors = consistency(torch.from_numpy(depth), torch.from_numpy(camera), torch.from_numpy(valid))
    np.testing.assert_allclose(errors, reference(depth.astype(np.float64), camera, valid), rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(consistency(*map(torch.from_numpy, (depth, camera, valid))), errors)


def test_nothing_in_common_is_nan():
    depth = torch.full((2, 12, 16), 2.0)
    assert consistency(depth, poses(pose(), pose(yaw=np.pi))).isnan().all()
    assert consistency(depth, poses(pose(), pose()), torch.zeros(2, 12, 16, dtype=torch.bool)).isnan().all()


def test_a_path_known_up_to_scale_is_perfect():
    true = poses(*(pose(x=0.1 * i, z=i + 0.3 * i**2, yaw=0.1 * i) for i in range(8)))
    scaled = true.clone()
    scaled[:, :3, 3] = scaled[:, :3, 3] * 7 + torch.tensor([3.0, 1.0, 2.0])
    assert ate(scaled, true).shape == (4,)
    assert ate(scaled, true, snippet=3).shape == (6,)
    assert ate(scaled, true).max() < 1e-9


def test_ate_by_hand():
    """Truth steps 1 and 1 m ahead, predicted 1 and 3: positions 1, 2 and 1, 4, scale 9 / 17, differences 8/17, 2/17."""
    true, predicted = (poses(*(pose(z=z) for z in path)) for path in ([0, 1, 2], [0, 1, 4]))
    expected = np.sqrt((9 / 17 - 1) ** 2 + (36 / 17 - 2) ** 2) / 3
    assert ate(predicted, true, snippet=3).tolist() == pytest.approx([expected])


def test_ate_equals_the_published_formula_with_rotations():
    rng = np.random.default_rng(0)
    true = np.stack([pose(*rng.normal(0, 1, 3), yaw=rng.normal()) for _ in range(9)])
    predicted = np.stack([pose(*rng.normal(0, 1, 3), yaw=rng.normal()) for _ in range(9)])
    expected = []
    for start in range(5):
        snippets = [(np.linalg.inv(p[start]) @ p[start : start + 5])[:, :3, 3] for p in (predicted, true)]
        scale = np.sum(snippets[1] * snippets[0]) / np.sum(snippets[0] ** 2)
        expected.append(np.sqrt(np.sum((snippets[0] * scale - snippets[1]) ** 2)) / 5)
    np.testing.assert_allclose(ate(torch.from_numpy(predicted), torch.from_numpy(true)), expected, rtol=1e-9)


def test_a_prediction_that_stands_still_misses_the_whole_way():
    true, still = poses(pose(), pose(z=1), pose(z=2)), poses(pose(), pose(), pose())
    assert ate(still, true, snippet=3).tolist() == pytest.approx([np.sqrt(5) / 3])


@pytest.mark.parametrize("snippet", [1, 4])
def test_a_snippet_that_does_not_fit_is_refused(snippet):
    three = poses(pose(), pose(), pose())
    with pytest.raises(ValueError, match=f"snippet={snippet}"):
        ate(three, three, snippet=snippet)
