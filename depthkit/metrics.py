"""The metrics: one function each, `(prediction, target, valid_mask) -> (B,)`, one value per image; the caller averages.

Shapes: B images, H/W pixels. Maps are (B, H, W) depths, the prediction already aligned and clamped by the evaluator;
masks are (B, H, W) bool, and the target is positive where valid. Computed in float32. Pixels outside the mask, NaN
included, change nothing; an image without a valid pixel gives NaN. The logarithmic metrics are NaN or infinite for a
prediction <= 0.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MapMetric = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(prediction, target, valid_mask) -> (B,)`."""


def abs_rel(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`mean |p - t| / t`."""
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    return _mean((prediction - target).abs() / target, valid_mask)


def sq_rel(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`mean (p - t)^2 / t`, in metres."""
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    return _mean((prediction - target) ** 2 / target, valid_mask)


def rmse(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`sqrt(mean (p - t)^2)`, in metres."""
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    return _mean((prediction - target) ** 2, valid_mask).sqrt()


def rmse_log(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`sqrt(mean (ln p - ln t)^2)`."""
    return _mean(_log_difference(prediction, target, valid_mask) ** 2, valid_mask).sqrt()


def log10(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`mean |log10 p - log10 t|`."""
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    return _mean((prediction.log10() - target.log10()).abs(), valid_mask)


def silog(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """`100 * sqrt(mean e^2 - (mean e)^2)`, e = ln p - ln t: 100 times the standard deviation of the log error.

    Unchanged by `a * prediction`, a > 0. This is the number of AdaBins and ZoeDepth; the metric of the same name in
    Depth Anything V2's metric code, `sqrt(mean e^2 - 0.5 * (mean e)^2)`, is another one.
    """
    difference = _log_difference(prediction, target, valid_mask)
    centred = difference - _mean(difference, valid_mask)[:, None, None]
    return 100 * _mean(centred**2, valid_mask).sqrt()


def delta1(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25`; a pixel predicted <= 0 or NaN is not among them."""
    return _share_within(1.25, prediction, target, valid_mask)


def delta2(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25^2`."""
    return _share_within(1.25**2, prediction, target, valid_mask)


def delta3(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25^3`."""
    return _share_within(1.25**3, prediction, target, valid_mask)


class Metric(NamedTuple):
    function: MapMetric
    is_lower_better: bool


METRICS: dict[str, Metric] = {
    "abs_rel": Metric(abs_rel, is_lower_better=True),
    "sq_rel": Metric(sq_rel, is_lower_better=True),
    "rmse": Metric(rmse, is_lower_better=True),
    "rmse_log": Metric(rmse_log, is_lower_better=True),
    "log10": Metric(log10, is_lower_better=True),
    "silog": Metric(silog, is_lower_better=True),
    "delta1": Metric(delta1, is_lower_better=False),
    "delta2": Metric(delta2, is_lower_better=False),
    "delta3": Metric(delta3, is_lower_better=False),
}


def compute_metrics(
    prediction: Tensor, target: Tensor, valid_mask: Tensor, names: Iterable[str] = tuple(METRICS)
) -> dict[str, Tensor]:
    """Each named metric, (B,) with one value per image. An unknown name is a ValueError."""
    names = tuple(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(METRICS)}")
    return {name: METRICS[name].function(prediction, target, valid_mask) for name in names}


def _fill_invalid(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 with 1 outside the mask, where quotients and logarithms are then finite."""
    return torch.where(valid_mask, prediction.float(), 1.0), torch.where(valid_mask, target.float(), 1.0)


def _mean(values: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean over the valid pixels of each image; 0 / 0 = NaN for an empty mask."""
    assert values.shape == valid_mask.shape, f"{tuple(values.shape)} values, {tuple(valid_mask.shape)} mask"
    return torch.where(valid_mask, values, 0.0).sum((1, 2)) / valid_mask.sum((1, 2))


def _log_difference(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    return prediction.log() - target.log()


def _share_within(factor: float, prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
    # Products, not quotients: two negative quotients would pass a test on their maximum.
    prediction, target = _fill_invalid(prediction, target, valid_mask)
    is_within = (prediction < factor * target) & (target < factor * prediction)
    return _mean(is_within.float(), valid_mask)
