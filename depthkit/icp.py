"""Iterative closest point: the rigid motion that brings one cloud onto another, batched.

Shapes: B pairs of clouds, N points of the source, M of the target; clouds (B, N, 3), masks (B, N) bool, motions
(B, 4, 4). All compute in float32 whatever autocast says.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from depthkit.warping import pose_matrix, pose_vector

MAX_ITERATIONS = 10
"""The default of PCL, whose ICP vid2depth calls."""

MOST_DISTANCES = 2**24
"""Distances that are in memory at a time."""

Search = Callable[[Tensor], Tensor]
"""Points (B, N, 3) -> of a cloud, the point nearest to each."""


class Registration(NamedTuple):
    """`motion` (B, 4, 4) brings the source onto the target; `residual` (B, N, 3) is what then still lacks, from each
    moved point to its nearest neighbour; 0 for points outside the source's mask."""

    motion: Tensor
    residual: Tensor


@torch.no_grad()
def icp(
    source: Tensor,
    target: Tensor,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> Registration:
    """Point-to-point ICP from no motion (Besl and McKay 1992), every point with its nearest neighbour, however far.

    An empty cloud on either side gives no motion and residual 0.
    """
    source, target = source.float(), target.float()
    source_mask = (
        torch.ones(source.shape[:2], dtype=torch.bool, device=source.device) if source_mask is None else source_mask
    )
    if target_mask is not None:
        source_mask = source_mask & target_mask.any(1, keepdim=True)
    source = torch.where(source_mask[..., None], source, 0.0)
    motion = torch.eye(4, device=source.device).repeat(len(source), 1, 1)
    moved = source
    search = neighbour_search(target, target_mask)
    for _ in range(max_iterations):
        step = best_rigid_motion(moved, search(moved), source_mask)
        motion = step @ motion
        moved = source @ motion[:, :3, :3].mT + motion[:, None, :3, 3]
    residual = search(moved) - moved
    return Registration(motion, torch.where(source_mask[..., None], residual, 0.0))


def neighbour_search(target: Tensor, target_mask: Tensor | None = None) -> Search:
    """How to find neighbours in `target`, prepared once for all iterations: trees on a CPU, elsewhere all distances."""
    if target.device.type == "cpu":
        return search_trees(target, target_mask)
    return lambda points: nearest(points, target, target_mask)


def search_trees(target: Tensor, target_mask: Tensor | None = None) -> Search:
    """SciPy's KD-trees, one for each cloud; they know no numbers that are not finite, and search these at 0."""
    clouds = list(target)
    if target_mask is not None:
        clouds = [cloud[mask] if mask.any() else cloud[:1] for cloud, mask in zip(target, target_mask, strict=True)]
    # Neither option changes what is found. The points of an image fill space evenly: balance costs more than it saves.
    trees = [KDTree(finite(cloud), balanced_tree=False, compact_nodes=False) for cloud in clouds]

    def search(points: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        places = (tree.query(one, workers=threads)[1] for tree, one in zip(trees, finite(points), strict=True))
        return torch.stack([cloud[torch.from_numpy(place)] for cloud, place in zip(clouds, places, strict=True)])

    return search


def finite(points: Tensor) -> np.ndarray:
    return points.nan_to_num(0.0, 0.0, 0.0).numpy()


def nearest(points: Tensor, target: Tensor, target_mask: Tensor | None = None) -> Tensor:
    """The point of `target` that is nearest to each of `points`, (B, N, 3), by all distances; the first of several."""
    if target_mask is not None:
        # Far away, not NaN: the smallest of a row with NaN would be NaN.
        target = torch.where(target_mask[..., None], target, 1e9)
    rows = max(1, MOST_DISTANCES // (target.shape[0] * target.shape[1]))
    # |p - q|^2 without |p|^2, which does not change the order; centred, because squares of large numbers cancel.
    centre = points.mean(1, keepdim=True)
    shifted = target - centre
    squares = shifted.square().sum(-1)[:, None]
    chunks = [(squares - 2 * (chunk - centre) @ shifted.mT).argmin(2) for chunk in torch.split(points, rows, dim=1)]
    places = torch.cat(chunks, 1)
    return target.gather(1, places[..., None].expand(-1, -1, 3))


def best_rigid_motion(source: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """(B, 4, 4): rotation R and translation t that minimise the sum of `|R p + t - q|^2` over pairs of valid points.

    Closed form by the singular values of the covariance, never a reflection (Arun et al. 1987, Umeyama 1991). No valid
    pair gives no motion.
    """
    weights = valid_mask.float()[..., None]
    count = weights.sum(1, keepdim=True).clamp(min=1)
    source_mean, target_mean = ((points * weights).sum(1, keepdim=True) / count for points in (source, target))
    covariance = ((source - source_mean) * weights).mT @ (target - target_mean)
    # float64: of a nearly flat cloud the smallest singular value is lost in float32, and a 3 x 3 matrix costs nothing.
    # Of what is not finite there is no motion, and no error: the residual makes the loss NaN, which training handles.
    u, _, vh = torch.linalg.svd(covariance.double().nan_to_num(0.0, 0.0, 0.0))
    sign = torch.linalg.det(u @ vh).sign()
    u = torch.cat([u[..., :2], u[..., 2:] * sign[:, None, None]], -1)
    rotation = (u @ vh).mT
    translation = target_mean[:, 0].double() - (rotation @ source_mean[:, 0, :, None].double())[..., 0]
    motion = torch.eye(4, device=source.device).repeat(len(source), 1, 1)
    motion[:, :3, :3], motion[:, :3, 3] = rotation.float(), translation.float()
    return torch.where(valid_mask.any(1)[:, None, None], motion, torch.eye(4, device=source.device))


class _RegisterClouds(torch.autograd.Function):
    """ICP after the predicted motion, with the gradient that vid2depth puts in the place of its derivative."""

    @staticmethod
    def forward(
        ctx: object, source: Tensor, motion: Tensor, target: Tensor, source_mask: Tensor | None,
        target_mask: Tensor | None, max_iterations: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        matrix = pose_matrix(motion)
        moved = source.float() @ matrix[:, :3, :3].mT + matrix[:, None, :3, 3]
        found = icp(moved, target, source_mask, target_mask, max_iterations=max_iterations)
        return pose_vector(found.motion), found.residual

    @staticmethod
    def backward(ctx: object, grad_motion: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
        return -grad_residual, -grad_motion, None, None, None, None


def icp_loss(
    source: Tensor,
    motion: Tensor,
    target: Tensor,
    source_mask: Tensor | None = None,
    target_mask: Tensor | None = None,
    *,
    max_iterations: int = MAX_ITERATIONS,
) -> Tensor:
    """`mean |T'| + mean |r|`, (B,): how far ICP must still move the cloud `source` after the predicted motion.

    `motion` (B, 6) moves `source` (B, N, 3) towards `target` (B, M, 3); ICP from there finds the motion T', as a vector
    (B, 6), and the residual r. Instead of differentiating ICP the gradient says that both predictions should have gone
    the rest of the way: that of `motion` is minus that of T', that of `source` minus that of r, and `target` gets none.
    Source: vid2depth section 3.3 (`L_3D = |T' - I|_1 + |r|_1`) and `ops/icp_grad.py`, means as in the code.
    """
    rest, residual = _RegisterClouds.apply(source, motion, target, source_mask, target_mask, max_iterations)
    return rest.abs().mean(1) + residual.abs().mean((1, 2))
