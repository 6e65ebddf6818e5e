"""Metrics of video: depth that agrees from frame to frame, and the camera's path.

Poses are (T, 4, 4), camera to world; the camera looks along +z, x to the right, y down.
"""

import torch
from torch import Tensor

from depthkit.geometry import pixel_rays


def temporal_consistency(
    depth: Tensor, poses: Tensor, intrinsics_px: tuple[float, float, float, float], valid_mask: Tensor
) -> Tensor:
    """Relative disagreement of each frame's depth with its neighbour's, (T - 1,); lower is better.

    `depth` is (T, H, W), aligned to metres with one scale and shift for the whole video, `valid_mask` (T, H, W) bool
    says where it is to be trusted (static, in range), `intrinsics_px` is (fx, fy, cx, cy). Every pixel of a frame is
    moved into the next one by its depth and the poses, to the nearest pixel, and compared to the depth there:
    `mean |d - moved| / d` over the valid pixels that something lands on; the value is the mean of both directions in
    time. NaN where nothing lands.

    Source: temporal alignment error (TAE) of Video Depth Anything (Chen et al. 2025, section 4.1), 100 times the mean
    of these values over the video. Where several points land on one pixel this takes the nearest, which hides the
    others; the published code keeps any. A pair in which nothing lands counts 0 there.
    """
    forward = torch.linalg.solve(poses[1:].double(), poses[:-1].double())
    backward = torch.linalg.inv(forward)
    frames = list(zip(depth.float(), valid_mask, strict=True))
    errors = [
        _moved_error(*earlier, *later, there, intrinsics_px) + _moved_error(*later, *earlier, back, intrinsics_px)
        for earlier, later, there, back in zip(frames[:-1], frames[1:], forward, backward, strict=True)
    ]
    return torch.stack(errors) / 2


def _moved_error(
    depth: Tensor,
    valid_mask: Tensor,
    other: Tensor,
    other_mask: Tensor,
    pose: Tensor,
    intrinsics_px: tuple[float, float, float, float],
) -> Tensor:
    """`mean |other - moved| / other`, (); `pose` (4, 4) takes points of `depth`'s camera to `other`'s. Maps (H, W)."""
    height, width = depth.shape
    fx, fy, cx, cy = intrinsics_px
    rows, cols = valid_mask.nonzero(as_tuple=True)
    z = depth[rows, cols]
    x, y = pixel_rays(rows + 0.5, cols + 0.5, intrinsics_px)
    # Autocast leaves float64 as it is, and float32 products of matrices not.
    x, y, z = (pose[:3, :3] @ torch.stack([x * z, y * z, z]).double() + pose[:3, 3:]).float()
    row, col = (fy * y / z + cy).floor(), (fx * x / z + cx).floor()
    lands = (z > 0) & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    place = (row[lands] * width + col[lands]).long()
    moved = torch.full((height * width,), torch.inf, device=z.device).scatter_reduce(0, place, z[lands], "amin")
    compared = moved.isfinite() & other_mask.flatten()
    moved, other = moved[compared], other.flatten()[compared]
    return ((other - moved).abs() / other).mean()


def ate(poses: Tensor, true_poses: Tensor, snippet: int = 5) -> Tensor:
    """Absolute trajectory error of every run of `snippet` frames, (T - snippet + 1,), in the unit of `true_poses`.

    Positions are taken in the camera of the snippet's first frame, which is therefore at the origin in both; the
    prediction is scaled by `sum true * predicted / sum predicted^2`; the error is `sqrt(sum |difference|^2) / snippet`,
    with the number of frames outside the root as in the published code. A camera that never moves keeps scale 0.
    Computed in float64: a path of kilometres hides a snippet's centimetres.

    Source: Zhou et al. 2017 (SfMLearner, 5 frames), tinghuiz/SfMLearner `kitti_eval`; vid2depth (Mahjourian et al.
    2018) with 3 frames.
    """
    if not 2 <= snippet <= len(poses) or poses.shape != true_poses.shape:
        shapes = f"{tuple(poses.shape)} and {tuple(true_poses.shape)}"
        raise ValueError(f"poses {shapes}, snippet={snippet}: needs equal shapes (T, 4, 4) and 2 <= snippet <= T")
    path, true_path = (_snippets(values, snippet) for values in (poses, true_poses))
    size = (path**2).sum((1, 2))
    scale = (true_path * path).sum((1, 2)) / torch.where(size > 0, size, 1.0)
    difference = scale[:, None, None] * path - true_path
    return (difference**2).sum((1, 2)).sqrt() / snippet


def _snippets(poses: Tensor, snippet: int) -> Tensor:
    """Positions in the camera of each snippet's first frame, (snippets, snippet, 3)."""
    windows = poses.double().unfold(0, snippet, 1).movedim(-1, 1)
    return torch.linalg.solve(windows[:, :1], windows)[..., :3, 3]
