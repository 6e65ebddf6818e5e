"""Surface normals of depth maps, and the loss on predicted ones.

Shapes: B images, H/W pixels. Camera frame: x right, y down, z forward; normals have length 1 and point to the camera.
All compute in float32 whatever autocast says.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.alignment import masked_mean
from depthkit.geometry import pixel_rays

MAX_BEND = 0.05
"""Of `normals_from_depth`. A plane has none; 0.05 is a step of 5 % between neighbours, where the surface ends."""


def normals_from_depth(
    depth: Tensor, valid_mask: Tensor, intrinsics_px: Tensor, *, max_bend: float = MAX_BEND
) -> tuple[Tensor, Tensor]:
    """Normals (B, 3, H, W) of planar depth (B, H, W), any unit, and the mask (B, H, W) of the pixels that have one.

    `n = dP/dv x dP/du / |.|`, central differences of the points P = depth * ray of `intrinsics_px` (B, 4): fx, fy, cx,
    cy in pixels of the map. A pixel has a normal where it and its four neighbours are valid and no edge lies among
    them: `|1/z1 + 1/z2 - 2/z| <= max_bend / z` along both axes, which holds on any plane, however steep it is seen,
    because inverse depth is linear there. Without a normal it is 0; NaN intrinsics give none to the whole image.
    """
    height, width = depth.shape[-2:]
    z = torch.where(valid_mask, depth.float(), 1.0)
    rows = torch.arange(height, device=z.device)[:, None] + 0.5
    cols = torch.arange(width, device=z.device) + 0.5
    is_known = intrinsics_px.isfinite().all(1)
    fx, fy, cx, cy = torch.where(is_known[:, None], intrinsics_px.float(), 1.0).view(-1, 4, 1, 1).unbind(1)
    x, y = pixel_rays(rows, cols, (fx, fy, cx, cy))  # type: ignore[arg-type]
    points = torch.stack([x * z, y * z, z], 1)
    along_u = points[:, :, 1:-1, 2:] - points[:, :, 1:-1, :-2]
    along_v = points[:, :, 2:, 1:-1] - points[:, :, :-2, 1:-1]
    normals = F.normalize(torch.linalg.cross(along_v, along_u, dim=1), dim=1)

    inverse, mask = 1 / z, valid_mask & is_known[:, None, None]
    has_normal = mask[:, 1:-1, 1:-1]
    for axis in (1, 2):
        pair = [(_inner(inverse, axis, step), _inner(mask, axis, step)) for step in (-1, 1)]
        bend = (pair[0][0] + pair[1][0]) / inverse[:, 1:-1, 1:-1] - 2
        has_normal = has_normal & pair[0][1] & pair[1][1] & (bend.abs() <= max_bend)
    normals = torch.where(has_normal[:, None], normals, 0.0)
    return F.pad(normals, (1, 1, 1, 1)), F.pad(has_normal, (1, 1, 1, 1))


def _inner(values: Tensor, axis: int, step: int) -> Tensor:
    """The map (B, H - 2, W - 2) of the neighbours `step` pixels along an axis of all pixels but those at the border."""
    return values.roll(-step, axis)[:, 1:-1, 1:-1]


def normal_loss(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean of `1 - cos(prediction, target)` over the mask (B, H, W), for two (B, 3, H, W) maps; result (B,).

    The length of the prediction does not matter. An empty mask gives 0 with zero gradient.
    """
    prediction = torch.where(valid_mask[:, None], prediction.float(), 1.0)
    return masked_mean(1 - F.cosine_similarity(prediction, target.float(), dim=1), valid_mask)
