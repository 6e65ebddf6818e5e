"""ICP: synthetic motions, an independent implementation, and the gradient of the paper."""

import numpy as np
import pytest
import torch

from depthkit.icp import best_rigid_motion, icp, icp_loss, nearest, search_trees
from depthkit.warping import invert_motion, pose_matrix, pose_vector


def cloud(count: int, seed: int = 0, batch: int = 2) -> torch.Tensor:
    """A bumpy surface in front of the camera."""
    generator = torch.Generator().manual_seed(seed)
    xy = torch.rand(batch, count, 2, generator=generator) * 4 - 2
    z = 3 + torch.sin(2 * xy[..., :1]) * torch.cos(1.5 * xy[..., 1:]) + 0.3 * xy[..., :1]
    return torch.cat([xy, z], -1)


def moved(points: torch.Tensor, motion: torch.Tensor) -> torch.Tensor:
    return points @ motion[:, :3, :3].mT + motion[:, None, :3, 3]


def everywhere(points: torch.Tensor) -> torch.Tensor:
    return torch.ones(points.shape[:2], dtype=torch.bool)


MOTION = torch.tensor([[0.04, -0.03, 0.05, 0.02, -0.03, 0.01], [-0.05, 0.02, 0.02, -0.01, 0.02, -0.03]])


def reference_icp(source: np.ndarray, target: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """With scikit-learn's neighbours and SciPy's rotation fit, one pair of clouds, float64."""
    from scipy.spatial.transform import Rotation
    from sklearn.neighbors import NearestNeighbors

    neighbours = NearestNeighbors(n_neighbors=1).fit(target)
    current, motion = source.astype(np.float64), np.eye(4)
    for _ in range(iterations):
        pairs = target[neighbours.kneighbors(current, return_distance=False)[:, 0]].astype(np.float64)
        rotation, _ = Rotation.align_vectors(pairs - pairs.mean(0), current - current.mean(0))
        step = np.eye(4)
        step[:3, :3] = rotation.as_matrix()
        step[:3, 3] = pairs.mean(0) - step[:3, :3] @ current.mean(0)
        motion, current = step @ motion, current @ step[:3, :3].T + step[:3, 3]
    return motion, target[neighbours.kneighbors(current, return_distance=False)[:, 0]] - current


def test_nearest_is_that_of_all_distances():
    points, target = cloud(50, 0), cloud(70, 1)
    places = torch.cdist(points.double(), target.double()).argmin(2)
    torch.testing.assert_close(nearest(points, target), target[torch.arange(2)[:, None], places])


def test_trees_find_what_all_distances_find():
    points, target, valid = cloud(400, 0), cloud(500, 1), everywhere(cloud(500))
    valid[0, 100:] = False
    torch.testing.assert_close(search_trees(target, valid)(points), nearest(points, target, valid), rtol=0, atol=0)
    torch.testing.assert_close(search_trees(target)(points), nearest(points, target), rtol=0, atol=0)


@pytest.mark.parametrize("broken", ["source", "target", "motion"])
def test_what_is_not_finite_makes_the_loss_nan_and_no_error(broken):
    """So that training treats it as it treats every loss that is not finite."""
    inputs = {"source": cloud(50), "motion": torch.zeros(2, 6), "target": cloud(60)}
    inputs[broken][0] = torch.nan
    loss = icp_loss(inputs["source"], inputs["motion"], inputs["target"])
    assert torch.isfinite(loss[1])
    assert torch.isnan(loss[0])


def test_nearest_in_parts_is_the_same(monkeypatch):
    points, target = cloud(50, 0), cloud(70, 1)
    whole = nearest(points, target)
    monkeypatch.setattr("depthkit.icp.MOST_DISTANCES", 1000)
    torch.testing.assert_close(nearest(points, target), whole, rtol=0, atol=0)


def test_a_known_motion_is_found_exactly_from_pairs():
    points = cloud(30)
    motion = pose_matrix(torch.tensor([[1.0, 2, -1, 0.5, -0.4, 2.0], [0.0, 0, 0, 0, 0, 0]]))
    torch.testing.assert_close(
        best_rigid_motion(points, moved(points, motion), everywhere(points)), motion, atol=1e-5, rtol=0
    )


def test_a_flat_cloud_is_turned_and_not_mirrored():
    points = cloud(30)
    points[..., 2] = 2.0
    motion = pose_matrix(torch.tensor([[0.1, 0, 0.2, 0.3, 0.1, 0.2]] * 2))
    torch.testing.assert_close(
        best_rigid_motion(points, moved(points, motion), everywhere(points)), motion, atol=1e-4, rtol=0
    )


def test_the_mirror_image_is_approached_by_a_turn():
    points = cloud(30)
    motion = best_rigid_motion(points, points * torch.tensor([-1.0, 1, 1]), everywhere(points))
    torch.testing.assert_close(torch.linalg.det(motion[:, :3, :3]), torch.ones(2))


@pytest.mark.parametrize("count", [400, 1500])
def test_a_synthetic_motion_is_recovered(count):
    points = cloud(count)
    motion = pose_matrix(MOTION)
    found = icp(points, moved(points, motion), max_iterations=50)
    torch.testing.assert_close(found.motion, motion, atol=1e-3, rtol=0)
    assert found.residual.abs().max() < 1e-3


@pytest.mark.parametrize("iterations", [3, 10])
def test_same_as_an_independent_implementation(iterations):
    """Other points of the same surface: the answer is not exact, and both give the same one on the same way."""
    points, target = cloud(300, 0), moved(cloud(350, 1), pose_matrix(5 * MOTION))
    found = icp(points, target, max_iterations=iterations)
    for i in range(2):
        motion, residual = reference_icp(points[i].numpy(), target[i].numpy(), iterations)
        np.testing.assert_allclose(found.motion[i], motion, atol=1e-4)
        np.testing.assert_allclose(found.residual[i], residual, atol=1e-3)


def test_points_outside_the_masks_are_not_seen():
    points, target = cloud(300, 0), moved(cloud(300, 0), pose_matrix(MOTION))
    valid = everywhere(points)
    valid[:, 250:] = False
    found = icp(points[:, :250], target[:, :250])
    points[:, 250:], target[:, 250:] = torch.nan, torch.nan
    masked = icp(points, target, valid, valid)
    torch.testing.assert_close(masked.motion, found.motion, atol=1e-5, rtol=0)
    torch.testing.assert_close(masked.residual[:, :250], found.residual, atol=1e-5, rtol=0)
    assert (masked.residual[:, 250:] == 0).all()


@pytest.mark.parametrize("empty", ["source", "target"])
def test_an_empty_cloud_needs_no_motion(empty):
    points, valid = cloud(20), everywhere(cloud(20))
    nothing = torch.zeros_like(valid)
    found = icp(points, points + 1, nothing if empty == "source" else valid, nothing if empty == "target" else valid)
    torch.testing.assert_close(found.motion, torch.eye(4).expand(2, 4, 4))
    assert (found.residual == 0).all()


def test_loss_and_gradient_are_those_of_the_paper():
    """By hand: mean |T'| over 6 and mean |r| over 3 N; minus their gradients reach the motion and the source."""
    points = cloud(200, 0).requires_grad_()
    target = moved(cloud(230, 1), pose_matrix(MOTION)).requires_grad_()
    guess = (0.5 * MOTION).requires_grad_()
    loss = icp_loss(points, guess, target, everywhere(points), everywhere(target))
    found = icp(moved(points.detach(), pose_matrix(guess.detach())), target.detach())
    rest = pose_vector(found.motion)
    torch.testing.assert_close(loss, rest.abs().mean(1) + found.residual.abs().mean((1, 2)))
    loss.sum().backward()
    torch.testing.assert_close(guess.grad, -rest.sign() / 6)
    torch.testing.assert_close(points.grad, -found.residual.sign() / (3 * 200))
    assert target.grad is None


def test_the_gradient_leads_to_the_true_motion():
    points = cloud(300)
    motion = pose_matrix(MOTION)
    guess = torch.zeros(2, 6, requires_grad=True)
    optimizer = torch.optim.SGD([guess], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        target = moved(points, motion)
        icp_loss(points, guess, target, everywhere(points), everywhere(target)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(guess.detach(), MOTION, atol=6e-3, rtol=0)


def test_the_inverse_problem_has_the_inverse_motion():
    points = cloud(300)
    motion = pose_matrix(MOTION)
    there, back = icp(points, moved(points, motion)), icp(moved(points, motion), points)
    torch.testing.assert_close(invert_motion(there.motion), back.motion, atol=5e-3, rtol=0)
