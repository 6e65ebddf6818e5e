"""Turning a prediction and ground truth into numbers, in one stated way.

Affine-invariant evaluation estimates scale and shift of each image's prediction against the ground truth, and the
space of that fit decides the result: the two published families, disparity (MiDaS, Depth Anything) and depth
(Marigold), are not comparable. `ProtocolConfig` lists the choices, `protocol_id` names them, `compare` applies them.

Shapes: B images, H/W ground truth pixels. Maps are (B, H, W).
"""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from enum import Enum
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from depthkit.alignment import (
    align_least_absolute,
    align_least_squares,
    align_log_least_squares,
    align_median_scale,
    align_scale_least_squares,
    masked_mean,
)
from depthkit.evaluation.settings import (
    IN_DISPARITY,
    POOLING_POWER,
    Aggregation,
    Alignment,
    Clip,
    DepthUnit,
    Floor,
    ProtocolConfig,
    Resize,
    kind_refusal,
)
from depthkit.geometry import reciprocal
from depthkit.metrics import compute_metrics
from depthkit.types import Kind

MIN_PIXELS = 10
"""An image with fewer evaluated pixels is not scored: a fit of two numbers to them says nothing about a model."""

RANKED_PIXELS = 4096
"""At most as many pixels of an image, evenly spread over the valid ones, enter `rank_correlation`."""

SMALLEST_DEPTH = 1e-3
"""Metres; a predicted depth is raised to it before it is inverted."""


class Comparison(NamedTuple):
    """What the metrics compare: depth maps in the protocol's unit, and the pixels that count. All (B, H, W)."""

    prediction: Tensor
    target: Tensor
    valid_mask: Tensor


def protocol_fields(protocol: ProtocolConfig) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return {name: value.value if isinstance(value, Enum) else value for name, value in asdict(protocol).items()}


def protocol_id(protocol: ProtocolConfig) -> str:
    """`NAME@HASH`: 8 hex digits of the sha256 over everything that changes a number.

    Two numbers of one metric are comparable when they carry the same hash. Name, data sets and choice of metrics do not
    enter, nor do settings at their default: one that is added later leaves the ids of older protocols as they were.
    """
    usual = {field.name: field.default for field in fields(protocol)}
    plain = protocol_fields(protocol)
    deciding = {
        name: plain[name]
        for name in plain.keys() - {"name", "datasets", "metrics"}
        if getattr(protocol, name) != usual[name]
    }
    text = json.dumps({**deciding, "min_pixels": MIN_PIXELS}, sort_keys=True, separators=(",", ":"))
    return f"{protocol.name}@{sha256(text.encode()).hexdigest()[:8]}"


def score(
    prediction: Tensor, depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig, kind: Kind = "disparity"
) -> dict[str, Tensor]:
    """The protocol's metrics, each (B,) with one value per image; NaN where fewer than `MIN_PIXELS` pixels count.

    Arguments as in `compare`.
    """
    comparison = compare(prediction, depth, valid_mask, protocol, kind)
    is_scored = comparison.valid_mask.sum((1, 2)) >= MIN_PIXELS
    values = compute_metrics(*comparison, names=protocol.metrics)
    return {name: torch.where(is_scored, value, torch.nan) for name, value in values.items()}


def compare(
    prediction: Tensor, depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig, kind: Kind = "disparity"
) -> Comparison:
    """The aligned and clipped prediction beside the ground truth, in the protocol's unit.

    `prediction` is a model's output of `kind` at any size: it is resized to the ground truth, never the ground truth to
    it. `depth` is planar z; its unit matters only to a protocol in metres. ValueError when the protocol is not defined
    for models of this kind. `window` and `flip` concern the image and are for the caller (`ground_truth.cut`).
    """
    if reason := kind_refusal(protocol, kind):
        raise ValueError(reason)
    depth, valid_mask = evaluated_pixels(depth, valid_mask, protocol)
    prediction = _resize(prediction, depth, protocol.resize)
    if protocol.clip is Clip.before_alignment:
        prediction = prediction.clamp(protocol.min_depth, protocol.max_depth)
    if protocol.alignment in IN_DISPARITY:
        aligned = _align_disparity(prediction, depth, valid_mask, protocol, kind)
    else:
        aligned = ALIGNMENTS[protocol.alignment](prediction, depth, valid_mask)
    if protocol.clip is Clip.after_alignment:
        aligned = aligned.clamp(protocol.min_depth, protocol.max_depth)
    return Comparison(aligned, depth, valid_mask)


def evaluated_pixels(depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig) -> tuple[Tensor, Tensor]:
    """Ground truth in the protocol's unit, 0 where invalid, and the mask of the pixels that count, for fit and metrics.

    They are the valid ones with depth in `(min_depth, max_depth]`, inside the crop and, with `max_jump`, away from
    jumps in depth. Crop borders are rounded down to whole pixels, as in the published Garg and Eigen crops.
    """
    # In arithmetic, because `torch.where` takes ten times as long on a CPU.
    finite = depth.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    depth = finite.clamp(min=0) * valid_mask.view(torch.uint8)
    if protocol.unit is DepthUnit.image_maximum:
        maximum = depth.amax((1, 2), keepdim=True)
        depth = depth / torch.where(maximum > 0, maximum, 1.0)
    is_evaluated = (depth > protocol.min_depth) & _crop_mask(depth, protocol.crop)
    if protocol.max_depth is not None:
        is_evaluated &= depth <= protocol.max_depth
    if protocol.max_jump is not None:
        is_evaluated &= _jump(depth, depth > 0) <= protocol.max_jump * depth
    return depth, is_evaluated


def aggregate(
    protocol: ProtocolConfig, metric: str, values: npt.ArrayLike, num_pixels: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """One number from those of many images: `values`, `num_pixels` (..., images) -> (...).

    Over images, the mean. Over pixels, the number that all evaluated pixels give together: the mean weighted by their
    number, for metrics that end in a root the root of that mean of squares. The scale-invariant ones subtract the mean
    of each image, as in Eigen et al. 2014. `num_pixels` is the number of evaluated pixels (or pairs) of each image
    (`ground_truth.check_enough_pixels`). Images without the metric (NaN) are left out; NaN if all are.
    """
    values, weights = np.broadcast_arrays(np.asarray(values, np.float64), np.asarray(num_pixels, np.float64))
    weights = np.where(np.isnan(values), 0.0, weights if protocol.aggregation is Aggregation.pixels else 1.0)
    power = POOLING_POWER[metric] if protocol.aggregation is Aggregation.pixels else 1
    with np.errstate(invalid="ignore"):
        mean = (weights * np.where(weights > 0, values, 0.0) ** power).sum(-1) / weights.sum(-1)
    return np.asarray(mean ** (1 / power))


def rank_correlation(prediction: Tensor, depth: Tensor, valid_mask: Tensor, kind: Kind = "disparity") -> Tensor:
    """Spearman's correlation of predicted and true nearness, (B,), in [-1, 1]: below 0 the order is mostly reversed.

    Needs no alignment, so it tells depth that is passed off as disparity, or the reverse. Equal values share their mean
    rank; NaN for a constant map and for no valid pixel. Arguments as in `compare`.
    """
    prediction = _resize(prediction, depth, Resize.bilinear).flatten(1)
    valid_mask = (valid_mask & (depth > 0)).flatten(1)
    counts = valid_mask.cumsum(1)
    num_valid = counts[:, -1:]
    numbers = torch.arange(min(RANKED_PIXELS, counts.shape[1]), device=depth.device)
    numbers = numbers * num_valid.clamp(min=len(numbers)) // len(numbers) + 1  # the how-manieth valid pixels, from 1
    is_taken = numbers <= num_valid
    pixels = torch.searchsorted(counts, numbers).clamp(max=counts.shape[1] - 1)
    predicted, true = (
        _ranks(torch.where(is_taken, values.float().gather(1, pixels), torch.inf))[:, None]
        for values in (prediction if kind == "disparity" else -prediction, -depth.flatten(1))
    )
    is_taken = is_taken[:, None]
    offsets = [ranks - masked_mean(ranks, is_taken)[:, None, None] for ranks in (predicted, true)]
    covariance, *variances = (masked_mean(a * b, is_taken) for a, b in (offsets, offsets[:1] * 2, offsets[1:] * 2))
    return covariance / (variances[0] * variances[1]).sqrt()


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the rows of (B, N), up to a constant; equal values share the mean of theirs."""
    ordered = values.sort(dim=1).values
    below, up_to = (torch.searchsorted(ordered, values.contiguous(), side=side) for side in ("left", "right"))
    return (below + up_to).float() / 2


def _crop_mask(depth: Tensor, crop: list[float] | None) -> Tensor:
    """(H, W) bool."""
    height, width = depth.shape[-2:]
    shares = [0.0, 1.0, 0.0, 1.0] if crop is None else crop
    if max(shares) > 1:
        shares = [border / side for border, side in zip(shares, (height, height, width, width), strict=True)]
    # 471 / 480 * 480 must give 471 whatever the last bit says, and Garg's 0.99189189 * 370 = 366.9999993 stay 366.
    borders = zip(shares, (height, height, width, width), strict=True)
    top, bottom, left, right = (int(share * size + 1e-9) for share, size in borders)
    mask = torch.zeros(height, width, dtype=torch.bool, device=depth.device)
    mask[top:bottom, left:right] = True
    return mask


def _jump(depth: Tensor, valid_mask: Tensor) -> Tensor:
    """Largest minus smallest valid depth of the 3 x 3 pixels around each valid one, be they in the range or not."""
    farthest, minus_nearest = (
        max_pool2d(torch.where(valid_mask, values, -torch.inf)[:, None], 3, stride=1, padding=1)[:, 0]
        for values in (depth, -depth)
    )
    return farthest + minus_nearest


def _align_disparity(
    prediction: Tensor, depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig, kind: Kind
) -> Tensor:
    """Fit in disparity, raise to the floor, invert (MiDaS, Ranftl et al. 2020, section 6; Depth Anything V1, V2).

    Without a floor an aligned disparity near or below 0 turns into a depth of 1e8 m or a negative one. A model that
    predicts metres is inverted first.
    """
    disparity = reciprocal(prediction.clamp(min=SMALLEST_DEPTH)) if kind == "depth" else prediction
    target = reciprocal(depth)  # infinite where invalid
    aligned = ALIGNMENTS[protocol.alignment](disparity, target, valid_mask)
    if protocol.floor is Floor.cap:
        assert protocol.max_depth is not None, "ProtocolConfig refuses it"
        aligned = aligned.clamp(min=1 / protocol.max_depth)
    elif protocol.floor is Floor.image_maximum:
        aligned = aligned.maximum(torch.where(valid_mask, target, torch.inf).amin((1, 2), keepdim=True))
    return reciprocal(aligned)


ALIGNMENTS: dict[Alignment, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    Alignment.disparity_least_squares: align_least_squares,
    Alignment.depth_least_squares: align_least_squares,
    Alignment.log_least_squares: align_log_least_squares,
    Alignment.disparity_robust: align_least_absolute,
    Alignment.depth_robust: align_least_absolute,
    Alignment.scale_least_squares: align_scale_least_squares,
    Alignment.scale_median: align_median_scale,
    Alignment.none: lambda prediction, target, valid_mask: prediction,
}
"""`(prediction, target, valid_mask)` -> aligned prediction, of disparity for those that are `IN_DISPARITY`."""

INTERPOLATION: dict[Resize, dict[str, Any]] = {
    Resize.bilinear: {"mode": "bilinear", "align_corners": False},
    Resize.bilinear_corners: {"mode": "bilinear", "align_corners": True},
    Resize.nearest: {"mode": "nearest"},
}


def _resize(prediction: Tensor, depth: Tensor, resize: Resize) -> Tensor:
    if prediction.shape == depth.shape:
        return prediction.float()
    return interpolate(prediction.float()[:, None], depth.shape[-2:], **INTERPOLATION[resize])[:, 0]
