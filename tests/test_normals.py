import numpy as np
import pytest
import torch

from depthkit.normals import normal_loss, normals_from_depth

INTRINSICS = [20.0, 25.0, 6.5, 4.0]  # fx, fy, cx, cy


def rays(height, width, intrinsics=INTRINSICS):
    fx, fy, cx, cy = intrinsics
    rows, cols = np.mgrid[:height, :width] + 0.5
    return np.stack([(cols - cx) / fx, (rows - cy) / fy, np.ones((height, width))])


def plane_depth(normal, distance, height=9, width=13):
    """Depth of the plane `normal . P = -distance`, which lies before the camera and faces it."""
    return -distance / np.einsum("c,chw->hw", normal, rays(height, width))


def reference_normals(depth, intrinsics):
    """Point by point in float64: the normal of the two chords, turned to the camera."""
    height, width = depth.shape
    points = depth * rays(height, width, intrinsics)
    normals = np.zeros((3, height, width))
    for v in range(1, height - 1):
        for u in range(1, width - 1):
            cross = np.cross(points[:, v, u + 1] - points[:, v, u - 1], points[:, v + 1, u] - points[:, v - 1, u])
            normals[:, v, u] = -cross / np.linalg.norm(cross)
    return normals


def inner(height, width):
    mask = np.zeros((height, width), bool)
    mask[1:-1, 1:-1] = True
    return mask


@pytest.mark.parametrize("normal", [(0, 0, -1), (0.6, 0, -0.8), (0, -0.8, -0.6), (0.48, 0.6, -0.64)])
def test_the_normal_of_a_plane_is_its_own_at_every_inner_pixel(normal):
    depth = torch.tensor(plane_depth(np.array(normal, float), 3.0))[None]
    assert (depth > 0).all()
    found, mask = normals_from_depth(depth, depth > 0, torch.tensor([INTRINSICS]))
    assert np.array_equal(mask[0].numpy(), inner(9, 13))
    expected = np.where(inner(9, 13), np.array(normal, float)[:, None, None], 0)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-5)


def test_equals_the_reference_on_bumpy_depth_of_two_cameras():
    generator = np.random.default_rng(0)
    depth = 2 + 0.05 * generator.random((2, 8, 11))
    cameras = [INTRINSICS, [15.0, 12.0, 3.0, 5.5]]
    found, mask = normals_from_depth(
        torch.tensor(depth), torch.ones(2, 8, 11, dtype=torch.bool), torch.tensor(cameras), max_bend=1.0
    )
    assert mask.sum() == 2 * 6 * 9
    for index, camera in enumerate(cameras):
        np.testing.assert_allclose(found[index].numpy(), reference_normals(depth[index], camera), atol=1e-4)


def test_the_unit_of_depth_does_not_matter():
    depth = torch.tensor(plane_depth(np.array([0.6, 0, -0.8]), 3.0))[None]
    in_metres, in_millimetres = (
        normals_from_depth(depth * unit, depth > 0, torch.tensor([INTRINSICS]))[0] for unit in (1, 1000)
    )
    torch.testing.assert_close(in_metres, in_millimetres, atol=1e-5, rtol=0)


def test_no_normal_across_an_edge_beside_a_hole_or_without_a_camera():
    depth = torch.full((3, 6, 10), 2.0)
    depth[0, :, 5:] = 4.0
    depth[1, 2, 3] = torch.nan
    valid_mask = depth.isfinite()
    intrinsics = torch.tensor([INTRINSICS, INTRINSICS, [torch.nan, 25, 6, 4]])
    normals, mask = normals_from_depth(depth, valid_mask, intrinsics)

    edge = torch.tensor(inner(6, 10))
    edge[:, 4:6] = False
    assert torch.equal(mask[0], edge)
    hole = torch.tensor(inner(6, 10))
    for row, col in ((2, 3), (1, 3), (3, 3), (2, 2), (2, 4)):
        hole[row, col] = False
    assert torch.equal(mask[1], hole)
    assert not mask[2].any()
    assert normals.isfinite().all()
    assert torch.equal(normals.norm(dim=1) > 0.99, mask)


def test_a_steep_plane_is_no_edge():
    depth = torch.tensor(plane_depth(np.array([0.99, 0, -0.141]), 0.2, height=5, width=6))[None]
    assert (depth[0, 2].diff().abs() > 0.05 * depth[0, 2, 1:]).any()
    _, mask = normals_from_depth(depth, depth > 0, torch.tensor([INTRINSICS]))
    assert np.array_equal(mask[0].numpy(), inner(5, 6))


def test_the_loss_by_hand():
    target = torch.zeros(1, 3, 1, 4)
    target[:, 2] = -1
    prediction = torch.zeros(1, 3, 1, 4)
    prediction[0, 2, 0] = torch.tensor([-5.0, 1.0, 0.0, torch.nan])
    prediction[0, 0, 0, 2] = 1
    mask = torch.tensor([[[True, True, True, False]]])
    assert normal_loss(prediction, target, mask).tolist() == pytest.approx([(0 + 2 + 1) / 3])


def test_gradients_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(2, 3, 3, 4, generator=generator)
    target = torch.nn.functional.normalize(torch.randn(2, 3, 3, 4, generator=generator), dim=1)
    mask = torch.rand(2, 3, 4, generator=generator) > 0.4
    mask[1] = False
    prediction.requires_grad_()
    loss = normal_loss(prediction, target, mask)
    assert loss[1] == 0
    loss.sum().backward()
    gradient = prediction.grad
    assert gradient is not None
    assert not gradient[1].any()
    assert gradient[0].isfinite().all()

    step = 1e-2 * torch.randn(2, 3, 3, 4, generator=generator)
    ends = [normal_loss(prediction.detach() + sign * step, target, mask).sum() for sign in (0.5, -0.5)]
    assert float(ends[0] - ends[1]) == pytest.approx(float((gradient * step).sum()), rel=2e-2)
