"""Metrics of depth discontinuities, each `(Pixels) -> (B,)` (see `metrics.py`).

Two 4-neighbours stand on different surfaces when the quotient of their depths exceeds a ratio, which no scale changes.
Only pairs of which both pixels are valid count. Source of boundary F1 and recall: Depth Pro (Bochkovskii et al. 2024,
section 3.2) and apple/ml-depth-pro `eval/boundary_metrics.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from depthkit.alignment import positions
from depthkit.metrics_pixels import Pixels, shared

BOUNDARY_RATIOS = torch.linspace(1.05, 1.25, 10, dtype=torch.float64).float()
"""The thresholds of boundary F1 and recall; each weighs in proportion to itself."""

SMALLEST_DEPTH = 1e-6
"""A depth is raised to it before quotients are taken, as in the published code."""

EDGE_RATIO = 1.15
"""Quotient of the true depths of neighbours above which `edge_abs_rel` takes them for an edge: the middle of
`BOUNDARY_RATIOS`.
"""

EDGE_RADIUS_PX = 2
"""How far from an edge a pixel still counts for `edge_abs_rel`."""


def boundary_f1(pixels: Pixels) -> Tensor:
    """Depth Pro's scale-invariant boundary F1: the mean over `BOUNDARY_RATIOS`, weighted by the ratio.

    Per ratio, precision and recall of the occlusions (one neighbour nearer by more than the ratio) are means over four
    directions (the nearer neighbour is left, right, above, below), `F1 = 2 p r / (p + r)`. As published, a direction
    without an occlusion counts 0 and not nothing, so an image without boundaries scores 0 even when predicted
    perfectly. NaN where no two valid pixels are neighbours.
    """
    precision, recall = _precision_recall(pixels)
    both = precision + recall
    return _weighted(2 * precision * recall / torch.where(both == 0, 1.0, both))


def boundary_recall(pixels: Pixels) -> Tensor:
    """The recall of `boundary_f1` alone: blind to boundaries that the ground truth lacks, such as hair in front of a
    sparse scan.
    """
    return _weighted(_precision_recall(pixels)[1])


def edge_abs_rel(pixels: Pixels) -> Tensor:
    """`mean |p - t| / t` over the valid pixels at most `EDGE_RADIUS_PX` rows and columns from a depth discontinuity of
    the target (`EDGE_RATIO`). NaN where it has none. The band is our choice; no paper fixes one.
    """
    prediction, target, valid_mask = pixels.maps
    near = torch.zeros(valid_mask.shape, dtype=torch.bool, device=valid_mask.device)
    for pairs in _unequal_pairs(pixels):
        quotient = _quotients(target, pairs)
        places = pairs.places[(quotient > EDGE_RATIO) | (quotient < 1 / EDGE_RATIO)]
        near.view(-1).index_fill_(0, places, True).index_fill_(0, places + pairs.step, True)
    for dim in (1, 2):
        near = _dilate(near, dim)
    at_edges = Pixels(prediction, target, near & valid_mask)
    return at_edges.mean((at_edges.prediction - at_edges.target).abs() / at_edges.target)


def mask_boundary_recall(prediction: Tensor, foreground: Tensor) -> Tensor:
    """Depth Pro's boundary recall for ground truth that is a mask (matting, segmentation), (B,).

    `prediction` is (B, H, W) depth, `foreground` (B, H, W) bool (the published code takes alpha > 0.1). A pixel pair
    across the border of the mask is found when the inside is predicted nearer by more than the ratio, and the pair has
    the largest quotient of its run: the uninterrupted row or column of pairs above the ratio, the first of equals.
    Mean over four directions (0 for one without a border), weighted mean over `BOUNDARY_RATIOS`.
    """
    recalls = []
    depth = prediction.detach().float().clamp(min=SMALLEST_DEPTH)
    for depths, inside in ((depth, foreground), (depth.mT, foreground.mT)):
        for first, second in ((slice(None, -1), slice(1, None)), (slice(1, None), slice(None, -1))):
            is_border = inside[..., first] & ~inside[..., second]
            quotient = depths[..., second] / depths[..., first]
            found = torch.stack([(_peaks(quotient, ratio) & is_border).sum((1, 2)) for ratio in BOUNDARY_RATIOS])
            recalls.append(found / is_border.sum((1, 2)).clamp(min=1))
    return _weighted(torch.stack(recalls).mean(0).T)


def _weighted(values: Tensor) -> Tensor:
    """(B, ratios) -> (B,)."""
    ratios = BOUNDARY_RATIOS.to(values.device)
    return (values * ratios).sum(1) / ratios.sum()


class _Pairs(NamedTuple):
    """Valid neighbours along one dimension: `places` and `places + step` are their places in the flat (B, H, W)."""

    places: Tensor
    step: int
    num_valid: Tensor  # (B,) all pairs of valid neighbours, whether listed or not


@shared
def _unequal_pairs(pixels: Pixels) -> list[_Pairs]:
    """The pairs along rows and along columns of which the prediction or the target may exceed the smallest ratio."""
    prediction, target, valid_mask = pixels.maps
    pairs = []
    for dim in (1, 2):
        size = valid_mask.shape[dim] - 1
        is_pair = valid_mask.narrow(dim, 0, size) & valid_mask.narrow(dim, 1, size)
        jumps = [(m.narrow(dim, 0, size) / m.narrow(dim, 1, size)).sub_(1).abs_() for m in (prediction, target)]
        jump = torch.maximum(*jumps, out=jumps[0])
        # A little less than 1 - 1 / 1.05; NaN in one map must not hide a pair of the other. Comparing into floats first
        # takes a third of the time.
        is_equal = torch.le(jump, 0.047, out=jump).bool()
        found = positions(is_pair & ~is_equal)
        step = valid_mask.shape[2] if dim == 1 else 1
        places = found + found // max(size * step, 1) * step
        pairs.append(_Pairs(places, step, is_pair.view(torch.uint8).sum((1, 2), dtype=torch.int32)))
    return pairs


def _quotients(depth: Tensor, pairs: _Pairs) -> Tensor:
    """The depth of the first pixel of each pair by that of the second."""
    flat = depth.flatten()
    first, second = (flat.index_select(0, places) for places in (pairs.places, pairs.places + pairs.step))
    return first.clamp(min=SMALLEST_DEPTH) / second.clamp(min=SMALLEST_DEPTH)


def _dilate(mask: Tensor, dim: int) -> Tensor:
    wide = mask.clone()
    for step in range(1, min(EDGE_RADIUS_PX, mask.shape[dim] - 1) + 1):
        size = mask.shape[dim] - step
        wide.narrow(dim, step, size).logical_or_(mask.narrow(dim, 0, size))
        wide.narrow(dim, 0, size).logical_or_(mask.narrow(dim, step, size))
    return wide


@shared
def _precision_recall(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Precision and recall of occlusions, each (B, ratios), the mean over the four directions."""
    num = len(BOUNDARY_RATIOS)
    table = torch.stack([_level_table(pixels, pairs) for pairs in _unequal_pairs(pixels)], dim=1)
    directions = torch.cat([table, table.flip(2, 3)], dim=1).float()  # (B, 4, levels of prediction, of target)
    above = directions.flip(2, 3).cumsum(2).cumsum(3).flip(2, 3)  # pairs of at least these levels
    found = above.diagonal(dim1=2, dim2=3)[..., num + 1 :]
    predicted, true = above[..., num + 1 :, 0], above[..., 0, num + 1 :]
    down, across = (pairs.num_valid for pairs in _unequal_pairs(pixels))
    undefined = torch.where(down + across > 0, 0.0, torch.nan)[:, None]
    precision, recall = ((found / total.clamp(min=1)).mean(1) + undefined for total in (predicted, true))
    return precision, recall


def _level_table(pixels: Pixels, pairs: _Pairs) -> Tensor:
    """How many pairs have which level in the prediction and in the target, (B, levels, levels).

    The level is the number of ratios that the pair exceeds, negative where the second pixel is the farther one; level 0
    is in the middle, and holds NaN.
    """
    prediction, target, valid_mask = pixels.maps
    ratios = BOUNDARY_RATIOS.to(target.device)
    # A quotient of exactly 1 / ratio exceeds the ratio as little as one of exactly the ratio.
    borders = torch.cat([(1 / ratios.flip(0)).nextafter(torch.zeros_like(ratios)), ratios])
    level, true_level = (
        torch.bucketize(_quotients(depth, pairs).nan_to_num_(nan=1.0), borders) for depth in (prediction, target)
    )
    num_levels = len(borders) + 1
    cell = (pairs.places // valid_mask[0].numel() * num_levels + level) * num_levels + true_level
    return torch.bincount(cell, minlength=len(valid_mask) * num_levels**2).view(-1, num_levels, num_levels)


def _peaks(quotient: Tensor, ratio: Tensor) -> Tensor:
    """(B, H, W) bool: the first largest value of each run of values above `ratio` along a row."""
    is_above = quotient > ratio
    starts = is_above.clone()
    starts[..., 1:] &= ~is_above[..., :-1]
    run = starts.flatten().cumsum(0)
    values = torch.where(is_above, quotient, 0.0).flatten()
    largest = torch.zeros(len(values) + 1, device=values.device).scatter_reduce(0, run, values, "amax")
    is_largest = is_above & (values == largest[run]).view_as(is_above)
    place = torch.arange(len(values), device=values.device)
    first = torch.full_like(largest, len(values), dtype=torch.int64)
    first = first.scatter_reduce(0, run, torch.where(is_largest.flatten(), place, len(values)), "amin")
    return is_largest & (place == first[run]).view_as(is_above)
