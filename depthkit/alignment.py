"""Bringing maps onto a common scale: normalisation of a map by itself, scale and shift estimation against a target.

Shapes: B images, H/W pixels. Maps are (B, H, W), masks (B, H, W) bool with True = use this pixel, statistics (B,).
Everything is float32, per image, and blind to what lies outside the mask, NaN and infinity included.
"""

import numpy as np
import torch
from torch import Tensor

SMALLEST_SPREAD = 1e-6
"""Spread below which a map counts as constant. Relative to the map's level, where float32 resolves about 1e-7."""

SMALLEST_PREDICTION = 1e-6
"""A predicted depth is raised to it before its logarithm is taken."""

ROBUST_STEPS = 50
"""Each shrinks the pull of outliers by about the ratio of their number to that of the others."""


def zero_invalid(values: Tensor, valid_mask: Tensor) -> Tensor:
    """`values` as float32 with 0 outside the mask, so that nothing from there enters a sum or a gradient."""
    return torch.where(valid_mask, values.float(), 0.0)


def masked_mean(values: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean over the valid pixels of each image, (B,); 0 for an empty mask."""
    assert values.shape == valid_mask.shape, f"{tuple(values.shape)} values, {tuple(valid_mask.shape)} mask"
    return zero_invalid(values, valid_mask).sum((1, 2)) / valid_mask.sum((1, 2)).clamp(min=1)


def valid_pixels(valid_mask: Tensor, *maps: Tensor, fill: float = 0.0) -> tuple[Tensor | None, list[Tensor]]:
    """Weights and maps, (B, N) float32 each, without what lies outside the mask: what a sum over pixels needs.

    One image on a CPU is reduced to its valid pixels, which for a LiDAR's fifth of the pixels leaves a fifth of the
    work; the weights are then None. A batch, an image without a valid pixel and anything on a GPU, which would have to
    wait for their number, or with a gradient keep their size, with `fill` at invalid pixels and weight 0 there.
    """
    for values in maps:
        assert values.shape == valid_mask.shape, f"{tuple(values.shape)} values, {tuple(valid_mask.shape)} mask"
    flat = [values.flatten(1).float() for values in maps]
    is_single = len(valid_mask) == 1 and valid_mask.device.type == "cpu"
    if is_single and not any(values.requires_grad for values in flat):
        places = positions(valid_mask)
        if len(places) == valid_mask.numel():
            return None, flat
        if len(places) > 0:
            return None, [values[0].index_select(0, places)[None] for values in flat]
    flat_mask = valid_mask.flatten(1)
    return flat_mask.float(), [torch.where(flat_mask, values, fill) for values in flat]


def positions(mask: Tensor) -> Tensor:
    """Flat indices of the True elements, (N,)."""
    if mask.device.type == "cpu":  # NumPy finds them in a fifth of torch's time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)


def masked_median(values: Tensor, valid_mask: Tensor) -> Tensor:
    """Lower median over the valid pixels of each image, (B,); 0 for an empty mask. Differentiable in `values`."""
    assert values.shape == valid_mask.shape, f"{tuple(values.shape)} values, {tuple(valid_mask.shape)} mask"
    num_valid = valid_mask.sum((1, 2))
    # A sort, because `median` and `kthvalue` refuse to run on CUDA under torch.use_deterministic_algorithms.
    ordered = torch.where(valid_mask, values.float(), torch.inf).flatten(1).sort(dim=1, stable=True).values
    middle = ((num_valid - 1) // 2).clamp(min=0)
    return torch.where(num_valid > 0, ordered.gather(1, middle[:, None]).squeeze(1), 0.0)


def normalize_median_mad(values: Tensor, valid_mask: Tensor, eps: float = SMALLEST_SPREAD) -> Tensor:
    """`(x - median) / mean|x - median|` over the valid pixels of each image; 0 at invalid pixels.

    Unchanged by `a * x + b`, a > 0. A map whose mean absolute deviation is at most `eps * max(1, |median|)` counts as
    constant: it becomes 0 everywhere with zero gradient, where the quotient would have an unbounded one.
    Source: MiDaS (Ranftl et al. 2020), Depth Anything V1 section 3.1.
    """
    median = masked_median(values, valid_mask)
    deviation = zero_invalid(values.float() - median[:, None, None], valid_mask)
    spread = masked_mean(deviation.abs(), valid_mask)
    is_constant = spread <= eps * median.abs().clamp(min=1.0)
    normalized = deviation / spread.clamp(min=eps)[:, None, None]
    return torch.where(is_constant[:, None, None], 0.0, normalized)


def fit_least_squares(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`scale, shift`, each (B,), that minimise the sum of `(scale * prediction + shift - target)^2` over valid pixels.

    Closed form `scale = cov(prediction, target) / var(prediction)` on centred values, which float32 carries where the
    textbook determinant cancels. A constant prediction (also a single pixel) gives scale 0 and the mean of the target.
    The scale is negative where the prediction falls as the target rises. Differentiable.
    """
    weights, (predicted, true) = valid_pixels(valid_mask, prediction, target)
    return _fit(predicted, true, weights)


def _fit(prediction: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """`fit_least_squares` of (B, N) pixels; `weights` says what each one counts, None that all count alike."""
    prediction_mean, target_mean = _weighted_mean(prediction, weights), _weighted_mean(target, weights)
    prediction_offset, target_offset = prediction - prediction_mean[:, None], target - target_mean[:, None]
    variance = _weighted_mean(prediction_offset**2, weights)
    covariance = _weighted_mean(prediction_offset * target_offset, weights)
    is_constant = variance <= (SMALLEST_SPREAD * prediction_mean) ** 2
    scale = torch.where(is_constant, 0.0, covariance / torch.where(is_constant, 1.0, variance))
    return scale, target_mean - scale * prediction_mean


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """(B, N) -> (B,); 0 where the weights are."""
    if weights is None:
        return values.mean(1)
    total = weights.sum(1)
    return (values * weights).sum(1) / torch.where(total > 0, total, 1.0)


def align_least_squares(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`scale * prediction + shift` with `fit_least_squares`; pixels outside the mask are mapped too."""
    scale, shift = fit_least_squares(prediction, target, valid_mask)
    return scale[:, None, None] * prediction.float() + shift[:, None, None]


def align_log_least_squares(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`exp(scale * ln(prediction) + shift)` with the least squares fit to `ln(target)`, both positive.

    A prediction below `SMALLEST_PREDICTION` counts as that.
    """
    logarithm = prediction.float().clamp(min=SMALLEST_PREDICTION).log()
    return align_least_squares(logarithm, torch.where(valid_mask, target.float(), 1.0).log(), valid_mask).exp()


def fit_least_absolute(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`scale, shift`, each (B,), that minimise the sum of `|scale * prediction + shift - target|` over valid pixels.

    Outliers of the target pull it less than least squares, and what most pixels agree on is found. Iteratively
    reweighted least squares, `ROBUST_STEPS` steps from the least squares fit with weights
    `1 / max(|residual|, 1e-6 * mean |target - mean target|)`: no random draw and no threshold, unlike RANSAC. A
    constant prediction gives scale 0 and a median of the target.
    """
    assert prediction.shape == target.shape, f"{tuple(prediction.shape)} prediction, {tuple(target.shape)} target"
    prediction, target = zero_invalid(prediction, valid_mask), zero_invalid(target, valid_mask)
    weights, (predicted, true) = valid_pixels(valid_mask, prediction, target)
    scale, shift = _fit(predicted, true, weights)
    spread = _weighted_mean((true - _weighted_mean(true, weights)[:, None]).abs(), weights)[:, None]
    smallest = (SMALLEST_SPREAD * spread).clamp(min=torch.finfo(torch.float32).tiny)
    for _ in range(ROBUST_STEPS):
        residual = scale[:, None] * predicted + shift[:, None] - true
        pull = smallest / residual.abs().maximum(smallest)
        scale, shift = _fit(predicted, true, pull if weights is None else pull * weights)
    return scale, shift


def align_least_absolute(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`scale * prediction + shift` with `fit_least_absolute`; pixels outside the mask are mapped too."""
    scale, shift = fit_least_absolute(prediction, target, valid_mask)
    return scale[:, None, None] * prediction.float() + shift[:, None, None]


def align_scale_least_squares(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`scale * prediction`, `scale = sum(prediction * target) / sum(prediction^2)` over valid pixels (least squares).

    A prediction that is 0 everywhere stays 0.
    """
    level = zero_invalid(prediction, valid_mask).abs().amax((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = prediction.float() / level[:, None, None]  # its square neither overflows nor vanishes
    squares = masked_mean(scaled**2, valid_mask)
    products = masked_mean(scaled * target, valid_mask)
    return (products / torch.where(squares > 0, squares, 1.0))[:, None, None] * scaled


def fit_median_scale(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`median(target) / median(prediction)` over valid pixels, (B,): the scale of a depth known up to scale alone.

    Of an even number of pixels the median is the mean of the middle two, as NumPy's. A prediction with median <= 0
    cannot be scaled and gives 0. Source: Zhou et al. 2017 (SfMLearner), section 4.1.
    """
    num_valid = valid_mask.sum((1, 2))[:, None]
    middle = torch.cat([(num_valid - 1).clamp(min=0) // 2, num_valid // 2], dim=1)
    maps = valid_pixels(valid_mask, prediction, target, fill=torch.inf)[1]
    predicted, true = (values.sort(dim=1, stable=True).values.gather(1, middle).mean(1) for values in maps)
    can_scale = (predicted > 0) & (num_valid[:, 0] > 0)
    return torch.where(can_scale, true / torch.where(can_scale, predicted, 1.0), 0.0)


def align_median_scale(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`scale * prediction` with `fit_median_scale`; pixels outside the mask are scaled too."""
    return fit_median_scale(prediction, target, valid_mask)[:, None, None] * prediction.float()
