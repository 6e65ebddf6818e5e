"""The losses: one function each, `(prediction, target, valid_mask) -> (B,)`, one value per image; the caller averages.

Shapes: B images, H/W pixels, h/w patches, C channels. Maps are (B, H, W) disparities, for
`silog_loss` and `scale_invariant_log_loss` depths in metres; masks (B, H, W) bool.
All compute in float32 whatever autocast says. Pixels outside the mask, NaN included, change neither value nor gradient;
an empty mask gives 0 with zero gradient. NaN at a valid pixel gives NaN: a broken network must not look good.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from depthkit.alignment import fit_least_squares, masked_mean, normalize_median_mad, zero_invalid

SMALLEST_DEPTH = 1e-3
"""Metres; a predicted depth is raised to it before its logarithm is taken."""

MapLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(prediction, target, valid_mask) -> (B,)`."""


def affine_invariant_loss(
    prediction: Tensor, target: Tensor, valid_mask: Tensor, *, drop_fraction: float = 0.0
) -> Tensor:
    """Mean of `|p - t|`, where p and t are prediction and target normalised by median and mean absolute deviation.

    Unchanged by `a * prediction + b`, a > 0. With `drop_fraction` 0 it is zero exactly where the two are related so;
    otherwise it leaves out that share of each image's valid pixels, the largest residuals, and averages over the rest.
    Source: Depth Anything V1 section 3.1 (nothing dropped); V2 drops 0.1 on pseudo-labels, per map
    (DepthAnything/Depth-Anything-V2#108).
    """
    residual = _normalized_residual(prediction, target, valid_mask).abs()
    total, num_kept = _sum_of_smallest(residual, valid_mask, drop_fraction)
    return total / num_kept.clamp(min=1)


def scale_shift_invariant_loss(
    prediction: Tensor, target: Tensor, valid_mask: Tensor, *, trim_fraction: float = 0.2
) -> Tensor:
    """`1 / (2 M)` times the sum of the smallest `(1 - trim_fraction) * M` residuals `|p - t|`, M = valid pixels.

    p and t are normalised by median and mean absolute deviation, so it is unchanged by `a * prediction + b`, a > 0.
    Source: "ssitrim" of MiDaS (Ranftl et al. 2020), section 5; trimmed per image.
    """
    residual = _normalized_residual(prediction, target, valid_mask).abs()
    total, _ = _sum_of_smallest(residual, valid_mask, trim_fraction)
    return total / (2 * valid_mask.sum((1, 2)).clamp(min=1))


def scale_shift_invariant_mse(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`1 / (2 M)` times the sum of `(scale * prediction + shift - t)^2`, t = target scaled to [0, 1] per image.

    Scale and shift are the least-squares ones, and the gradient passes through them. The magnitude of the scale is
    used: least squares alone would call an inverted prediction perfect, while a scale held at 0 would leave it without
    a gradient. Unchanged by `a * prediction + b`, a > 0. Source: "ssimse" of MiDaS (Ranftl et al. 2020), section 5.
    """
    prediction = zero_invalid(prediction, valid_mask)
    target = _scale_to_unit_range(target, valid_mask)
    scale, _ = fit_least_squares(prediction, target, valid_mask)
    residual = scale.abs()[:, None, None] * prediction - target
    residual = residual - masked_mean(residual, valid_mask)[:, None, None]
    return masked_mean(residual**2, valid_mask) / 2


def scale_invariant_log_loss(
    prediction: Tensor,
    target: Tensor,
    valid_mask: Tensor,
    *,
    variance_focus: float = 0.5,
    sample_variance: bool = False,
) -> Tensor:
    """`var d + (1 - variance_focus) * (mean d)^2`, d = ln target - ln prediction; maps are depths in metres.

    At `variance_focus` 1 it does not see a wrong scale, at 0 it is the mean squared error of the logarithm. The
    variance is over the n valid pixels of an image, with `sample_variance` divided by n - 1. A prediction is raised to
    `SMALLEST_DEPTH` first. Source: Eigen et al. 2014, equation 4, where lambda (0.5) is `variance_focus`.
    """
    ones = torch.ones_like(target, dtype=torch.float32)
    target = torch.where(valid_mask, target.float(), ones)
    prediction = torch.where(valid_mask, prediction.float().clamp(min=SMALLEST_DEPTH), ones)
    difference = target.log() - prediction.log()
    mean = masked_mean(difference, valid_mask)
    # A mean of squares, not a difference of large numbers.
    variance = masked_mean((difference - mean[:, None, None]) ** 2, valid_mask)
    if sample_variance:
        num_valid = valid_mask.sum((1, 2))
        variance = variance * num_valid / (num_valid - 1).clamp(min=1)
    return variance + (1 - variance_focus) * mean**2


def silog_loss(
    prediction: Tensor,
    target: Tensor,
    valid_mask: Tensor,
    *,
    variance_focus: float = 0.5,
    sample_variance: bool = False,
) -> Tensor:
    """The root of `scale_invariant_log_loss`: `sqrt(mean d^2 - variance_focus * (mean d)^2)`.

    Sources: Depth Anything V2 metric_depth/util/loss.py (0.5); ZoeDepth loss.py (0.85, `sample_variance`, times 10).
    """
    square = scale_invariant_log_loss(
        prediction, target, valid_mask, variance_focus=variance_focus, sample_variance=sample_variance
    )
    is_zero = square <= 0  # where the root has no gradient
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, square).sqrt())


def gradient_matching_loss(prediction: Tensor, target: Tensor, valid_mask: Tensor, *, num_scales: int = 4) -> Tensor:
    """Sum over scales of `(|dx R| + |dy R|) / M`, R = p - t of the median/MAD-normalised maps.

    Scale k takes every 2^k-th pixel from the top left and counts its M valid ones; a difference counts where both of
    its pixels are valid. Unchanged by `a * prediction + b`, a > 0. Mirrored maps give the same value where height - 1
    and width - 1 are multiples of the largest stride, else nearly so. Source: MiDaS (Ranftl et al. 2020), section 5.
    """
    residual = _normalized_residual(prediction, target, valid_mask)
    loss = residual.new_zeros(len(residual))
    for stride in (2**k for k in range(num_scales)):
        loss = loss + _mean_absolute_gradient(residual[:, ::stride, ::stride], valid_mask[:, ::stride, ::stride])
    return loss


def feature_alignment_loss(
    student_features: Tensor, frozen_features: Tensor, *, tolerance_margin: float = 0.15
) -> Tensor:
    """Mean over the h * w locations of `1 - cos(student, frozen)`, for two (B, C, h, w) maps; result (B,).

    A location with `1 - cos < tolerance_margin` is close enough: it contributes 0 to value and gradient. No gradient
    reaches `frozen_features`. The paper does not say whether the mean is over all locations or over the remaining
    ones; it is over all. Source: Depth Anything V1 section 3.3; LiheYoung/Depth-Anything#80 fixes the meaning of the
    margin, 0.15 on `1 - cos`.
    """
    similarity = functional.cosine_similarity(student_features.float(), frozen_features.detach().float(), dim=1)
    distance = 1 - similarity
    return torch.where(distance < tolerance_margin, 0.0, distance).mean((1, 2))


def cutmix_loss(loss: MapLoss, prediction: Tensor, target: Tensor, valid_mask: Tensor, region: Tensor) -> Tensor:
    """`a * loss(inside region) + (1 - a) * loss(outside)`, a = the region's share of the image's pixels.

    `region` (B, H, W) bool is True where image and target were pasted from the partner: the two sides come from two
    teacher maps, each with a scale and shift of its own. An empty or full region gives `loss` of the whole image.
    Source: Depth Anything V1 section 3.2.
    """
    share = region.float().mean((1, 2))
    inside = loss(prediction, target, valid_mask & region)
    outside = loss(prediction, target, valid_mask & ~region)
    return share * inside + (1 - share) * outside


def _normalized_residual(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    return normalize_median_mad(prediction, valid_mask) - normalize_median_mad(target, valid_mask)


def _sum_of_smallest(residual: Tensor, valid_mask: Tensor, drop_fraction: float) -> tuple[Tensor, Tensor]:
    """Sum of each image's valid residuals without the largest `floor(drop_fraction * M)`, and how many it has."""
    if not 0 <= drop_fraction < 1:
        raise ValueError(f"the share of pixels to drop must be at least 0 and less than 1, got {drop_fraction}")
    num_valid = valid_mask.sum((1, 2))
    if drop_fraction == 0:
        return zero_invalid(residual, valid_mask).sum((1, 2)), num_valid
    num_kept = num_valid - (num_valid * drop_fraction).floor().long()
    ordered = torch.where(valid_mask, residual, torch.inf).flatten(1).sort(dim=1, stable=True).values
    is_kept = torch.arange(ordered.shape[1], device=ordered.device) < num_kept[:, None]
    return torch.where(is_kept, ordered, 0.0).sum(1), num_kept


def _scale_to_unit_range(values: Tensor, valid_mask: Tensor) -> Tensor:
    """`(x - min) / (max - min)` over valid pixels; 0 outside the mask and for a constant map."""
    lowest = torch.where(valid_mask, values.float(), torch.inf).amin((1, 2), keepdim=True)
    highest = torch.where(valid_mask, values.float(), -torch.inf).amax((1, 2), keepdim=True)
    extent = highest - lowest
    return zero_invalid((values.float() - lowest) / torch.where(extent > 0, extent, 1.0), valid_mask)


def _mean_absolute_gradient(values: Tensor, valid_mask: Tensor) -> Tensor:
    """`(|dx| + |dy|)` between valid neighbours, summed, over the number of valid pixels."""
    along_x = zero_invalid(values.diff(dim=2).abs(), valid_mask[:, :, 1:] & valid_mask[:, :, :-1])
    along_y = zero_invalid(values.diff(dim=1).abs(), valid_mask[:, 1:] & valid_mask[:, :-1])
    return (along_x.sum((1, 2)) + along_y.sum((1, 2))) / valid_mask.sum((1, 2)).clamp(min=1)
