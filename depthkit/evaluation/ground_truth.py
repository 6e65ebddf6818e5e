"""Reading a data set for evaluation: whole images and their ground truth, both at their own size, and scoring one."""

from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from depthkit.data.cameras import image_facts, image_intrinsics
from depthkit.data.decode import decode_image, decode_target, read_facts
from depthkit.data.manifest import TargetSpec, load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import root_of
from depthkit.data.shards import ShardReader, image_member
from depthkit.evaluation.protocols import MIN_PIXELS, Comparison, compare, evaluated_pixels
from depthkit.evaluation.settings import DepthUnit, GroundTruth, ProtocolConfig
from depthkit.geometry import reciprocal
from depthkit.metrics import compute_metrics
from depthkit.types import Prediction, Rejection


class Case(NamedTuple):
    """One image, (H, W, 3) uint8 RGB, and its ground truth, (h, w): planar z, in metres if the data set is metric.

    `focal_px` is the horizontal focal length in pixels of the image, NaN where it is not known.
    """

    image: np.ndarray
    depth: np.ndarray
    valid_mask: np.ndarray
    focal_px: float = float("nan")


class EvaluationSet:
    """A labeled data set, read image by image, by any number of threads. `name` is NAME/SPLIT of its manifest."""

    def __init__(self, manifest: Path | str) -> None:
        self.manifest = load_manifest(manifest)
        self.reader = ShardReader(self.manifest, root_of(manifest))
        self.name = f"{self.manifest.name}/{self.manifest.split}"
        self._one_at_a_time = Lock()  # the reader closes tars that others may be reading

    def refusal(self, protocol: ProtocolConfig) -> str | None:
        """Why this data set cannot be evaluated with `protocol`; None if it can."""
        target = self.manifest.target
        if protocol.datasets is not None and self.manifest.name not in protocol.datasets:
            return (
                f"{protocol.name} is defined on {', '.join(protocol.datasets)}, and other ground truth gives other "
                "numbers: take a protocol for it, or say protocol.datasets=null to use this one all the same"
            )
        if protocol.ground_truth is GroundTruth.pairs:
            return None  # the samples' facts hold them, and say so where they do not
        if target is None:
            return "it has no ground truth"
        if not target.aligned:
            return "its labels are not registered to its images"
        if target.quantity == "disparity":
            return "its labels are disparity up to scale and shift, from which no depth follows"
        if target.quantity == "stereo_disparity_px" and not target.metric:
            return "its stereo disparity has no calibration, so its depth is unknown"
        if not target.metric and protocol.unit is DepthUnit.metres:
            return (
                f"the unit of its depth is unknown, so the range of {protocol.name} in metres does not apply; "
                "use protocol=affine_disparity_relative"
            )
        return None

    def missing_shards(self) -> list[str]:
        """Local tars that are not there."""
        locations = (self.reader.location(shard) for shard in range(len(self.manifest.shards)))
        return [str(location) for location in locations if isinstance(location, Path) and not location.is_file()]

    def keys(self, shard: int) -> list[str]:
        with self._one_at_a_time:
            return self.reader.keys(shard)

    def members(self, shard: int, index: int) -> dict[str, bytes]:
        """The files of a sample by extension; SampleError when they cannot be read."""
        with self._one_at_a_time:
            return self.reader.read(shard, index).members

    def read(self, shard: int, index: int) -> Case:
        """The image and the ground truth; SampleError when either is broken or they do not show the same view."""
        target = self.manifest.target
        assert target is not None, "refusal() says so before"
        members = self.members(shard, index)
        image = decode_image(image_member(members))
        depth, valid_mask = _depth(members, target)
        _check_aspect(image, depth)
        focal_px = float(image_intrinsics(image_facts(members), (image.shape[0], image.shape[1]))[0])
        return Case(image, depth, valid_mask, focal_px)

    def rejection(self, shard: int, key: str, reason: str) -> Rejection:
        return Rejection(dataset=self.name, shard=self.manifest.shards[shard].path, key=key, reason=reason)


def cut(case: Case, protocol: ProtocolConfig) -> Case:
    """The part of image and ground truth that the protocol's `window` keeps: rows at the bottom, columns in the middle.

    An odd number of spare columns leaves the larger part on the right, as KITTI's benchmark crop (352 x 1216) has it.
    SampleError where the two differ in size, as the window counts pixels, or are smaller than it.
    """
    if protocol.window is None:
        return case
    size, (height, width) = case.depth.shape, protocol.window
    if case.image.shape[:2] != size or size[0] < height or size[1] < width:
        rows, cols = case.image.shape[:2]
        raise SampleError(
            f"an image of {rows}x{cols} pixels and ground truth of {size[0]}x{size[1]} cannot both be cut to "
            f"protocol.window={protocol.window}"
        )
    top, left = size[0] - height, (size[1] - width) // 2
    window = slice(top, top + height), slice(left, left + width)
    image, depth, valid_mask = (part[window] for part in case[:3])
    return case._replace(image=image, depth=depth, valid_mask=valid_mask)


def check_enough_pixels(case: Case, protocol: ProtocolConfig) -> int:
    """The number of pixels inside the protocol's range and crop; SampleError if they are fewer than `MIN_PIXELS`."""
    num_pixels = int(evaluated_pixels(_tensor(case.depth), _tensor(case.valid_mask), protocol)[1].sum())
    if num_pixels < MIN_PIXELS:
        raise SampleError(f"only {num_pixels} pixels of ground truth inside the protocol's range, {MIN_PIXELS} needed")
    return num_pixels


def score_case(case: Case, prediction: Prediction, protocol: ProtocolConfig) -> dict[str, float]:
    """The protocol's metrics of one image that has enough pixels."""
    return metrics_of(compare_case(case, prediction, protocol), protocol)


def metrics_of(comparison: Comparison, protocol: ProtocolConfig) -> dict[str, float]:
    """The protocol's metrics of the one image of a comparison."""
    return {name: value.item() for name, value in compute_metrics(*comparison, names=protocol.metrics).items()}


def compare_case(case: Case, prediction: Prediction, protocol: ProtocolConfig) -> Comparison:
    """`protocols.compare` for one image, (1, H, W) each.

    Depth of unknown unit is divided by its median first: `protocols.SMALLEST_DEPTH` is in metres.
    """
    values = prediction.values
    if prediction.kind == "depth" and prediction.unit == "relative" and (median := np.median(values)) > 0:
        values = values / median
    maps = (_tensor(values), _tensor(case.depth), _tensor(case.valid_mask))
    return compare(*maps, protocol, prediction.kind)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))[None]


def _depth(members: dict[str, bytes], target: TargetSpec) -> tuple[np.ndarray, np.ndarray]:
    """Depth and mask. Depth of unknown unit is read as disparity, which decode gives for it, and inverted back."""
    data, facts = members[target.extension], read_facts(members)
    if target.metric:
        return decode_target(data, target, facts, "depth")
    disparity, valid_mask = decode_target(data, target, facts, "disparity")
    return np.where(valid_mask, reciprocal(np.where(valid_mask, disparity, 1)), 0), valid_mask


def _check_aspect(image: np.ndarray, depth: np.ndarray) -> None:
    (height, width), (rows, cols) = image.shape[:2], depth.shape
    if abs(rows * width / (cols * height) - 1) > 0.02:
        raise SampleError(f"label of {rows}x{cols} pixels for an image of {height}x{width}: not the same view")
