"""Metrics of depth order, for pairs of points that people annotated and for pairs drawn from dense ground truth."""

import torch
from torch import Tensor

from depthkit.metrics_pixels import Pixels

NUM_ORDINAL_PAIRS = 50_000
"""Pairs per image of `ordinal_accuracy`."""

ORDINAL_RATIO = 1.03
"""Quotient of two true depths from which on one counts as farther in `ordinal_accuracy`."""


def are_ordered(nearness: Tensor, pairs: Tensor, closer: Tensor) -> Tensor:
    """Whether each pair is ordered rightly, (N,) bool: `nearness` is strictly larger at the closer point.

    `nearness` is (H, W), larger = nearer: a disparity, or minus a depth. `pairs` is (N, 4) int64: row and column of
    one point, row and column of the other; `closer` is (N,), 0 where the first point is closer, 1 where the second is.
    A tie or NaN counts as wrong. ValueError for points outside the map.
    """
    height, width = nearness.shape
    points = pairs.view(-1, 2, 2)
    is_inside = (points >= 0) & (points < torch.tensor([height, width], device=points.device))
    if not is_inside.all():
        outside = points[~is_inside.all(2)][0].tolist()
        raise ValueError(f"point (row, column) {outside} lies outside the map of {height} x {width} pixels")
    values = nearness[points[..., 0], points[..., 1]]
    closer = closer.long()[:, None]
    return (values.gather(1, closer) > values.gather(1, 1 - closer)).squeeze(1)


def pair_accuracy(nearness: Tensor, pairs: Tensor, closer: Tensor) -> Tensor:
    """Share of the pairs that are ordered rightly, (); arguments as in `are_ordered`. NaN without pairs.

    Source: DA-2K (Depth Anything V2, Yang et al. 2024, section 6), whose number is the share over the pairs of all
    images.
    """
    return are_ordered(nearness, pairs, closer).float().mean()


def whdr(nearness: Tensor, pairs: Tensor, closer: Tensor, weights: Tensor) -> Tensor:
    """Weighted human disagreement rate, `sum w [ordered wrongly] / sum w`, (); NaN without pairs.

    `weights` is (N,) >= 0, the annotators' confidence; DIW has 1 throughout. The rest as in `are_ordered`. Source: Chen
    et al. 2016, section 5 (the rate of Bell et al. 2014); as in DIW no pair is annotated as equally far.
    """
    is_wrong = ~are_ordered(nearness, pairs, closer)
    return (is_wrong * weights).sum() / weights.sum()


def ordinal_accuracy(pixels: Pixels) -> Tensor:
    """Share of pixel pairs that the prediction orders as the target does, (B,), among those whose target depths differ
    by a quotient of at least `ORDINAL_RATIO`; a tie is wrong. NaN where no pair differs.

    `NUM_ORDINAL_PAIRS` pairs of valid pixels, the same for every prediction: the two-dimensional low-discrepancy
    sequence of Roberts 2018 over (number of the first, number of the second) spreads them evenly. Number of pairs and
    ratio are our choice: papers draw theirs at random.
    """
    prediction, target = pixels.prediction, pixels.target
    step = torch.arange(1, NUM_ORDINAL_PAIRS + 1, device=target.device)
    # 2^32 over the plastic number and over its square, so that the sequence is the same on every device.
    ends = [pixels.numbered(step * factor & 0xFFFFFFFF) for factor in (3242174889, 2447445414)]
    (first, second), (true_first, true_second) = ([m.gather(1, end) for end in ends] for m in (prediction, target))
    is_clear = torch.maximum(true_first / true_second, true_second / true_first) >= ORDINAL_RATIO
    is_right = torch.where(true_first > true_second, first > second, first < second)
    return (is_right & is_clear).sum(1) / is_clear.sum(1)
