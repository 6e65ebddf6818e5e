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

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from depthkit.alignment import align_least_squares, zero_invalid
from depthkit.evaluation.settings import Alignment, DepthUnit, ProtocolConfig
from depthkit.geometry import reciprocal
from depthkit.metrics import compute_metrics
from depthkit.types import Kind

MIN_PIXELS = 10
"""An image with fewer evaluated pixels is not scored: a fit of two numbers to them says nothing about a model."""

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
    """The aligned and clamped prediction beside the ground truth, in the protocol's unit.

    `prediction` is a model's output of `kind` at any size: it is resized to the ground truth (bilinear,
    align_corners=False, as MiDaS does), never the ground truth to it. `depth` is planar z; its unit matters only to a
    protocol in metres. ValueError when the protocol is not defined for models of this kind.
    """
    depth, valid_mask = evaluated_pixels(depth, valid_mask, protocol)
    aligned = ALIGNMENTS[protocol.alignment](_resize(prediction, depth), depth, valid_mask, protocol, kind)
    return Comparison(aligned.clamp(protocol.min_depth, protocol.max_depth), depth, valid_mask)


def evaluated_pixels(depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig) -> tuple[Tensor, Tensor]:
    """Ground truth in the protocol's unit, 0 where invalid, and the mask of the pixels that count, for fit and metrics.

    They are the valid ones with depth in `(min_depth, max_depth]` inside the crop. Crop borders are rounded down to
    whole pixels, as in the published Garg and Eigen crops.
    """
    valid_mask = valid_mask & (depth > 0)  # False for NaN too
    depth = zero_invalid(depth, valid_mask)
    if protocol.unit is DepthUnit.image_maximum:
        maximum = depth.amax((1, 2), keepdim=True)
        depth = depth / torch.where(maximum > 0, maximum, 1.0)
    is_inside = valid_mask & (depth > protocol.min_depth) & (depth <= protocol.max_depth)
    return depth, is_inside & _crop_mask(depth, protocol.crop)


def _crop_mask(depth: Tensor, crop: list[float] | None) -> Tensor:
    """(H, W) bool."""
    height, width = depth.shape[-2:]
    shares = (0.0, 1.0, 0.0, 1.0) if crop is None else crop
    # 471 / 480 * 480 must give 471 whatever the last bit says.
    borders = zip(shares, (height, height, width, width), strict=True)
    top, bottom, left, right = (int(share * size + 1e-6) for share, size in borders)
    mask = torch.zeros(height, width, dtype=torch.bool, device=depth.device)
    mask[top:bottom, left:right] = True
    return mask


def _align_disparity(
    prediction: Tensor, depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig, kind: Kind
) -> Tensor:
    """Fit in disparity, clamp at `1 / max_depth`, invert (MiDaS, Ranftl et al. 2020, section 6; Depth Anything V1, V2).

    Without the clamp an aligned disparity near or below 0 turns into a depth of 1e8 m or a negative one. A model that
    predicts metres is inverted first.
    """
    disparity = reciprocal(prediction.clamp(min=SMALLEST_DEPTH)) if kind == "depth" else prediction
    target = reciprocal(torch.where(valid_mask, depth, 1.0))
    aligned = align_least_squares(disparity, target, valid_mask)
    return reciprocal(aligned.clamp(min=1 / protocol.max_depth))


def _align_depth(prediction: Tensor, depth: Tensor, valid_mask: Tensor, protocol: ProtocolConfig, kind: Kind) -> Tensor:
    """Fit in depth (Marigold, Ke et al. 2024, section 4.1). Refuses disparity: its shift is unknown, so it has no depth
    to fit; inverting it first puts a pole wherever the unknown shift happens to cancel the value.
    """
    if kind != "depth":
        raise ValueError(
            f"protocol {protocol.name} fits scale and shift in depth, and the model predicts {kind}, which cannot be "
            f"inverted before its shift is known: use an affine_disparity protocol for it"
        )
    return align_least_squares(prediction, depth, valid_mask)


ALIGNMENTS: dict[Alignment, Callable[[Tensor, Tensor, Tensor, ProtocolConfig, Kind], Tensor]] = {
    Alignment.disparity_least_squares: _align_disparity,
    Alignment.depth_least_squares: _align_depth,
}
"""`(prediction, depth, valid_mask, protocol, kind)` -> aligned depth, not yet clamped to the protocol's range."""


def _resize(prediction: Tensor, depth: Tensor) -> Tensor:
    if prediction.shape == depth.shape:
        return prediction.float()
    resized = interpolate(prediction.float()[:, None], depth.shape[-2:], mode="bilinear", align_corners=False)
    return resized[:, 0]
