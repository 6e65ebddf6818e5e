"""Warping: hand-computed cases, identity, the world's exact depth and motion, borders, gradients."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from depthkit import warping
from depthkit.data.procedural import render_clip

INTRINSICS = torch.tensor([[10.0, 12.0, 3.0, 2.0]])


def random_vectors(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) * torch.tensor([1.0, 1, 1, 0.4, 0.4, 0.4])


def reference_matrix(vector: np.ndarray) -> np.ndarray:
    """Rx Ry Rz by three products, in float64."""
    x, y, z = vector[3:]
    turn_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    turn_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn_x @ turn_y @ turn_z
    matrix[:3, 3] = vector[:3]
    return matrix


def test_pose_matrix_is_the_product_of_three_turns():
    vectors = random_vectors(5)
    expected = np.stack([reference_matrix(vector.double().numpy()) for vector in vectors])
    np.testing.assert_allclose(warping.pose_matrix(vectors).numpy(), expected, atol=1e-6)


def test_a_turn_about_y_looks_to_the_right():
    quarter = warping.pose_matrix(torch.tensor([0.0, 0, 0, 0, math.pi / 2, 0]))
    torch.testing.assert_close(quarter[:3, :3] @ torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 0, 0]))


def test_vector_and_matrix_are_inverses():
    vectors = random_vectors(20)
    torch.testing.assert_close(warping.pose_vector(warping.pose_matrix(vectors)), vectors, atol=1e-5, rtol=0)


def test_inverse_motion():
    motions = warping.pose_matrix(random_vectors(4))
    torch.testing.assert_close(
        warping.invert_motion(motions) @ motions, torch.eye(4).expand(4, 4, 4), atol=1e-5, rtol=0
    )


def test_back_projection_by_hand():
    depth = torch.full((1, 4, 6), 2.0)
    points = warping.back_project(depth, INTRINSICS)
    # The centre of the pixel in row 1, column 5 is at (u, v) = (5.5, 1.5).
    torch.testing.assert_close(points[0, :, 1, 5], torch.tensor([2 * 2.5 / 10, 2 * -0.5 / 12, 2.0]))


def test_projection_undoes_back_projection():
    depth = torch.rand(1, 4, 6) + 0.5
    coordinates = warping.project(warping.back_project(depth, INTRINSICS), INTRINSICS)
    columns, rows = torch.meshgrid(torch.arange(6) + 0.5, torch.arange(4) + 0.5, indexing="xy")
    torch.testing.assert_close(coordinates[0], torch.stack([columns, rows], -1))


def test_what_is_behind_the_camera_is_not_seen():
    points = torch.tensor([0.1, 0.1, -2.0]).view(1, 3, 1, 1).expand(1, 3, 4, 6).clone().requires_grad_()
    coordinates = warping.project(points, INTRINSICS)
    _, valid = warping.sample_bilinear(torch.rand(1, 3, 4, 6), coordinates)
    assert not valid.any()
    coordinates.sum().backward()
    assert points.grad is not None
    assert (points.grad == 0).all()


@pytest.mark.parametrize("size", [(4, 6), (33, 17), (128, 416)])
def test_no_motion_gives_the_image_itself(size):
    image = torch.rand(2, 3, *size)
    motion = torch.eye(4).expand(2, 4, 4)
    warped, valid = warping.warp(image, 30 * torch.rand(2, *size) + 0.3, motion, INTRINSICS.expand(2, 4))
    torch.testing.assert_close(warped, image, atol=1e-4, rtol=0)
    assert valid.all()  # rounding at the border pixels' own centres takes none


def test_bilinear_values_by_hand():
    image = torch.tensor([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]).view(1, 1, 2, 3)
    places = torch.tensor([[0.5, 0.5], [1.0, 0.5], [1.75, 1.25], [2.5, 1.5]]).view(1, 1, 4, 2)
    values, valid = warping.sample_bilinear(image, places)
    torch.testing.assert_close(values.flatten(), torch.tensor([0.0, 0.5, 1.25 + 7.5, 12.0]))
    assert valid.all()


@pytest.mark.parametrize("place", [(0.45, 1.0), (2.55, 1.0), (1.0, 0.45), (1.0, 1.55), (1e30, 1.0), (math.inf, 1.0)])
def test_mask_needs_all_four_neighbours(place):
    values, valid = warping.sample_bilinear(torch.rand(1, 2, 2, 3), torch.tensor(place).view(1, 1, 1, 2))
    assert not valid.any()
    assert values.isfinite().all()


def test_a_step_to_the_right_by_hand():
    """At depth 2 and fx 10, a camera 0.4 m to the right sees everything 2 px farther left."""
    source = torch.rand(1, 3, 4, 6)
    motion = warping.pose_matrix(torch.tensor([[-0.4, 0, 0, 0, 0, 0]]))
    warped, valid = warping.warp(source, torch.full((1, 4, 6), 2.0), motion, INTRINSICS)
    torch.testing.assert_close(warped[0, :, :, 3:], source[0, :, :, 1:4], atol=1e-5, rtol=0)
    assert valid[0, 1:-1, 3:].all()
    assert not valid[0, :, :2].any()


def test_the_border_of_a_forward_step_is_unknown():
    """Moving forward, the target's border lies outside what the source, ahead of it, sees."""
    motion = warping.pose_matrix(torch.tensor([[0, 0, -0.5, 0, 0, 0]]))
    intrinsics = torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    _, valid = warping.warp(torch.rand(1, 3, 16, 16), torch.full((1, 16, 16), 2.0), motion, intrinsics)
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[2:-2, 2:-2] = True  # 1 / (1 - 0.25) times the distance from the centre, at most 7.5 px
    assert (valid[0] == expected).all()


def test_exact_depth_and_motion_explain_the_next_frame():
    """Against renderings: warping with the truth leaves a fraction of the error, the reversed motion does not."""
    first, *_, last = render_clip(domain="source", split="val", index=5, seed=0, size=(96, 128), num_frames=5)
    target, source = (torch.from_numpy(frame.image).permute(2, 0, 1)[None] / 255.0 for frame in (first, last))
    depth = torch.from_numpy(np.where(first.depth > 0, first.depth, 1e3).astype(np.float32))[None]
    motion = torch.from_numpy(np.linalg.inv(last.camera_to_world) @ first.camera_to_world)[None]
    intrinsics = torch.tensor([first.intrinsics_px])

    def error(motion: torch.Tensor) -> float:
        warped, valid = warping.warp(source, depth, motion, intrinsics)
        return float((warped - target).abs().mean(1)[valid].mean())

    still = error(torch.eye(4)[None])
    assert error(motion) < 0.4 * still
    assert error(warping.invert_motion(motion)) > still


def test_gradients_of_depth_and_motion(monkeypatch):
    torch.manual_seed(0)
    # A smooth image: at a pixel's centre the slope of bilinear sampling jumps. float32 inside limits the precision.
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    source = torch.stack([rows / 8, columns / 8, rows * columns / 64])[None]
    intrinsics = torch.tensor([[8.0, 8.0, 4.0, 4.0]])
    depth = (2 + torch.rand(1, 8, 8)).double().requires_grad_()
    vector = torch.tensor([[0.05, -0.03, 0.1, 0.02, 0.01, -0.02]], dtype=torch.float64, requires_grad=True)

    def run(depth: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return warping.warp(source, depth, warping.pose_matrix(vector), intrinsics)[0][..., 2:-2, 2:-2].double()

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    source, intrinsics = source.double(), intrinsics.double()
    assert gradcheck(run, (depth, vector), eps=1e-6, atol=1e-5)


def test_half_precision_and_autocast_change_nothing():
    image, depth = torch.rand(1, 3, 8, 8), torch.rand(1, 8, 8) + 1
    motion = warping.pose_matrix(random_vectors(1) * 0.1)
    intrinsics = torch.tensor([[8.0, 8.0, 4.0, 4.0]])
    plain = warping.warp(image, depth, motion, intrinsics)
    with torch.autocast("cpu", torch.bfloat16):
        cast = warping.warp(image, depth, motion, intrinsics)
    assert (plain[0] == cast[0]).all()
    assert (plain[1] == cast[1]).all()
