"""Seeing one frame from another: back-projection, rigid motion, projection, bilinear sampling.

Shapes: B images, H/W pixels, C channels. Depth (B, H, W) is planar z; intrinsics (B, 4) are fx, fy, cx, cy in pixels of
the map they go with, pixel centres at +0.5. A motion (B, 4, 4) takes points from the target's camera to the source's;
camera axes are x right, y down, z forward. All compute in float32 whatever autocast says.
"""

import torch
from torch import Tensor
from torch.nn import functional

NEAREST_Z = 1e-3
"""Share of the map's median depth. A point that comes nearer to the camera's plane than this is not seen; it is what
bounds the projection and its gradient there."""


def pose_matrix(vector: Tensor) -> Tensor:
    """(..., 6) translation and angles (x, y, z; radians) to (..., 4, 4): rotation `Rx Ry Rz`, then translation.

    Source: vid2depth `project.py`, SfMLearner. Differentiable everywhere.
    """
    vector = vector.float()
    (cx, cy, cz), (sx, sy, sz) = vector[..., 3:].cos().unbind(-1), vector[..., 3:].sin().unbind(-1)
    zero, one = torch.zeros_like(cx), torch.ones_like(cx)
    tx, ty, tz = vector[..., :3].unbind(-1)
    rows = (
        (cy * cz, -cy * sz, sy, tx),
        (cx * sz + sx * sy * cz, cx * cz - sx * sy * sz, -sx * cy, ty),
        (sx * sz - cx * sy * cz, sx * cz + cx * sy * sz, cx * cy, tz),
        (zero, zero, zero, one),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def pose_vector(matrix: Tensor) -> Tensor:
    """The inverse of `pose_matrix`, (..., 4, 4) to (..., 6), for angles about y within +-90 degrees."""
    matrix = matrix.float()
    x = torch.atan2(-matrix[..., 1, 2], matrix[..., 2, 2])
    y = torch.asin(matrix[..., 0, 2].clamp(-1, 1))
    z = torch.atan2(-matrix[..., 0, 1], matrix[..., 0, 0])
    return torch.cat([matrix[..., :3, 3], torch.stack([x, y, z], -1)], -1)


def invert_motion(matrix: Tensor) -> Tensor:
    """The inverse of a rigid motion (..., 4, 4)."""
    rotation = matrix[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ matrix[..., :3, 3:]], -1)
    return torch.cat([top, matrix[..., 3:, :]], -2)


def scaled_intrinsics(intrinsics_px: Tensor, factor: float) -> Tensor:
    """Intrinsics (B, 4) of the same view at `factor` times the size: with centres at +0.5 all four numbers scale."""
    return intrinsics_px.float() * factor


def back_project(depth: Tensor, intrinsics_px: Tensor) -> Tensor:
    """Points (B, 3, H, W) in the camera: `z * ((u - cx) / fx, (v - cy) / fy, 1)` at pixel centres (u, v)."""
    depth = depth.float()
    height, width = depth.shape[-2:]
    fx, fy, cx, cy = (value[:, None] for value in intrinsics_px.float().unbind(1))
    x = (torch.arange(width, device=depth.device) + 0.5 - cx) / fx
    y = (torch.arange(height, device=depth.device) + 0.5 - cy) / fy
    return torch.stack([x[:, None, :] * depth, y[:, :, None] * depth, depth], 1)


def move(points: Tensor, motion: Tensor) -> Tensor:
    """`R points + t` for points (B, 3, H, W) and motions (B, 4, 4)."""
    motion = motion.float()
    # Sums, because autocast would run a product of matrices in half precision.
    turned = (motion[:, :3, :3, None, None] * points.float()[:, None]).sum(2)
    return turned + motion[:, :3, 3, None, None]


def project(points: Tensor, intrinsics_px: Tensor) -> Tensor:
    """Where points (B, 3, H, W) are seen: pixel coordinates (u, v), (B, H, W, 2).

    `u = fx x / z + cx`, `v = fy y / z + cy`; a point behind the camera, or nearer to its plane than `NEAREST_Z` of the
    median distance, has coordinates far outside and no gradient.
    """
    fx, fy, cx, cy = (value[:, None, None] for value in intrinsics_px.float().unbind(1))
    x, y, z = points.float().unbind(1)
    nearest = NEAREST_Z * z.detach().abs().flatten(1).median(1).values[:, None, None]
    is_in_front = z > nearest
    inverse = torch.where(is_in_front, z, 1.0).reciprocal()
    coordinates = torch.stack([fx * x * inverse + cx, fy * y * inverse + cy], -1)
    return torch.where(is_in_front[..., None], coordinates, FAR_OUTSIDE_PX)


FAR_OUTSIDE_PX = -1e4

ROUNDING_PX = 1e-2
"""How far the way out to a point and back may miss a pixel's centre in float32: without it a camera that stands still
would not see all of its own border."""


def sample_bilinear(image: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """`image` (B, C, H, W) at pixel coordinates (B, h, w, 2): values (B, C, h, w) and the principled mask (B, h, w).

    The mask is True where all four pixels that are blended lie inside the image (vid2depth section 3.2), up to
    `ROUNDING_PX`; outside, the values are those of the nearest border.
    """
    height, width = image.shape[-2:]
    axes = [*zip(coordinates.unbind(-1), (width, height), strict=True)]
    # Moved to the border first: a coordinate of 1e10 would overflow in the sampler.
    inside = torch.stack([position.clamp(0.5, side - 0.5) / side * 2 - 1 for position, side in axes], -1)
    values = functional.grid_sample(image.float(), inside, mode="bilinear", padding_mode="border", align_corners=False)
    low = 0.5 - ROUNDING_PX
    valid_mask = torch.stack([(position >= low) & (position <= side - low) for position, side in axes]).all(0)
    return values, valid_mask


def warp(source: Tensor, depth: Tensor, motion: Tensor, intrinsics_px: Tensor) -> tuple[Tensor, Tensor]:
    """The target's view put together from `source` (B, C, H, W), with the target's depth and motion target -> source.

    Returns (B, C, H, W) and where it is known, (B, H, W) bool. Gradients reach depth and motion through the sampling.
    """
    return sample_bilinear(source, project(move(back_project(depth, intrinsics_px), motion), intrinsics_px))
