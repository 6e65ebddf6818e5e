"""The metrics of depth maps, one function each; `METRICS` names them, `compute_metrics` computes several at once.

A metric is `(Pixels) -> (B,)`, one value per image, which the caller averages; `METRICS[name].function` takes
`(prediction, target, valid_mask)` instead. Shapes: B images, H/W pixels. Maps are (B, H, W) depths, the prediction
already aligned and clamped by the evaluator; masks are (B, H, W) bool, and the target is positive where valid. Computed
in float32. Pixels outside the mask, NaN included, change nothing; an image without a valid pixel gives NaN. The
logarithmic metrics are NaN or infinite for a prediction <= 0.

In the formulas p is the prediction, t the target, `e = ln p - ln t`, and `mean` is over the valid pixels. Edges and
order have modules of their own, `metrics_edges` and `metrics_pairs`; so have annotated pairs and video, which are no
pairs of maps (`metrics_pairs`, `metrics_video`).
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from depthkit.metrics_edges import boundary_f1, boundary_recall, edge_abs_rel
from depthkit.metrics_pairs import ordinal_accuracy
from depthkit.metrics_pixels import Pixels, shared


def abs_rel(pixels: Pixels) -> Tensor:
    """`mean |p - t| / t`."""
    return pixels.mean(_relative_error(pixels))


def sq_rel(pixels: Pixels) -> Tensor:
    """`mean (p - t)^2 / t`, in metres."""
    return pixels.mean(_absolute_error(pixels) * _relative_error(pixels))


def rmse(pixels: Pixels) -> Tensor:
    """`sqrt(mean (p - t)^2)`, in metres."""
    return pixels.mean(_absolute_error(pixels) ** 2).sqrt()


def rmse_log(pixels: Pixels) -> Tensor:
    """`sqrt(mean e^2)`."""
    return pixels.mean(_log_error(pixels) ** 2).sqrt()


def log10(pixels: Pixels) -> Tensor:
    """`mean |log10 p - log10 t|`."""
    return pixels.mean(_log_error(pixels).abs()) / math.log(10)


def scale_invariant_error(pixels: Pixels) -> Tensor:
    """`mean e^2 - (mean e)^2`, the variance of the log error: `D(y, y*)` of Eigen et al. 2014, equation 1 (without the
    1/2 of its other forms).
    """
    return _log_moments(pixels)[1]


def rmse_log_scale_invariant(pixels: Pixels) -> Tensor:
    """`sqrt(mean e^2 - (mean e)^2)`: the column "RMSE (log, scale inv.)" of Eigen et al. 2014."""
    return scale_invariant_error(pixels).sqrt()


def silog(pixels: Pixels) -> Tensor:
    """`100 * sqrt(mean e^2 - (mean e)^2)`: 100 times the standard deviation of the log error (AdaBins, ZoeDepth, the
    KITTI benchmark). Unchanged by `a * prediction`, a > 0.
    """
    return 100 * rmse_log_scale_invariant(pixels)


def silog_half(pixels: Pixels) -> Tensor:
    """`sqrt(mean e^2 - 0.5 * (mean e)^2)`: what Depth Anything V2's metric code calls silog. A wrong scale shows."""
    mean, variance = _log_moments(pixels)
    return (variance + mean**2 / 2).sqrt()


def delta_1_05(pixels: Pixels) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.05`; a pixel predicted <= 0 or NaN is not among them."""
    return pixels.share_below(_worse_quotient(pixels), 1.05)


def delta_1_10(pixels: Pixels) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.10`."""
    return pixels.share_below(_worse_quotient(pixels), 1.10)


def delta1(pixels: Pixels) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25`."""
    return pixels.share_below(_worse_quotient(pixels), 1.25)


def delta2(pixels: Pixels) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25^2`."""
    return pixels.share_below(_worse_quotient(pixels), 1.25**2)


def delta3(pixels: Pixels) -> Tensor:
    """Share of valid pixels with `max(p / t, t / p) < 1.25^3`."""
    return pixels.share_below(_worse_quotient(pixels), 1.25**3)


class Metric(NamedTuple):
    of_pixels: Callable[[Pixels], Tensor]
    is_lower_better: bool

    def function(self, prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
        """(B,)."""
        return self.of_pixels(Pixels(prediction, target, valid_mask))


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
    "delta_1_05": Metric(delta_1_05, is_lower_better=False),
    "delta_1_10": Metric(delta_1_10, is_lower_better=False),
    "silog_half": Metric(silog_half, is_lower_better=True),
    "rmse_log_scale_invariant": Metric(rmse_log_scale_invariant, is_lower_better=True),
    "scale_invariant_error": Metric(scale_invariant_error, is_lower_better=True),
    "boundary_f1": Metric(boundary_f1, is_lower_better=False),
    "boundary_recall": Metric(boundary_recall, is_lower_better=False),
    "edge_abs_rel": Metric(edge_abs_rel, is_lower_better=True),
    "ordinal_accuracy": Metric(ordinal_accuracy, is_lower_better=False),
}

IS_LOWER_BETTER = {name: metric.is_lower_better for name, metric in METRICS.items()} | {
    "pair_accuracy": False,
    "whdr": True,
}
"""Also for the metrics of annotated pairs."""


def compute_metrics(
    prediction: Tensor, target: Tensor, valid_mask: Tensor, names: Iterable[str] = tuple(METRICS)
) -> dict[str, Tensor]:
    """Each named metric, (B,) with one value per image. An unknown name is a ValueError.

    What several need (valid pixels, quotients, logarithms, boundaries) is computed once.
    """
    names = tuple(names)
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"unknown metrics {unknown}; choose from {list(METRICS)}")
    pixels = Pixels(prediction, target, valid_mask)
    return {name: METRICS[name].of_pixels(pixels) for name in names}


@shared
def _absolute_error(pixels: Pixels) -> Tensor:
    return (pixels.prediction - pixels.target).abs()


@shared
def _relative_error(pixels: Pixels) -> Tensor:
    return _absolute_error(pixels) / pixels.target


@shared
def _quotient(pixels: Pixels) -> Tensor:
    return pixels.prediction / pixels.target


@shared
def _log_error(pixels: Pixels) -> Tensor:
    return _quotient(pixels).log()


@shared
def _log_moments(pixels: Pixels) -> tuple[Tensor, Tensor]:
    """Mean and variance of the log error, each (B,)."""
    mean = pixels.mean(_log_error(pixels))
    return mean, pixels.mean((_log_error(pixels) - mean[:, None]) ** 2)


@shared
def _worse_quotient(pixels: Pixels) -> Tensor:
    """`max(p / t, t / p)`, (B, N); infinite for p <= 0, where both quotients are negative and would pass as small."""
    return torch.maximum(_quotient(pixels), pixels.target / pixels.prediction.clamp(min=0))
