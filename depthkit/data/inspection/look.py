"""Looking at one shard, in a worker process: is it the one of the manifest, and what do some of its samples hold?"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from depthkit.data.cache import ShardCache
from depthkit.data.decode import decode_image, decode_target, image_size, read_facts, target_size
from depthkit.data.inspection.duplicates import perceptual_hash
from depthkit.data.inspection.planes import Votes, plane_votes
from depthkit.data.keys import key_hashes
from depthkit.data.manifest import Manifest, TargetSpec
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import root_of
from depthkit.data.shards import RawSample, ShardReader, image_member, verify_shard

ASPECT_TOLERANCE = 0.02
PSEUDO_ASPECT_TOLERANCE = 0.25  # teachers see images at a multiple of their patch
LONELY = 1.25  # times the value at the end: how far the next one must be for a gap
HASH_SIDE = 128  # pixels of the shorter side that a hash needs, so JPEGs are decoded that small


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set to look at: its manifest, where that lies, and for pseudo-labels the data set of the images.

    Remote shards are read from `cache`.
    """

    manifest: Manifest
    path: Path | str
    cache: ShardCache
    images: "DataSet | None" = None

    def reader(self) -> ShardReader:
        """One that also reads samples whose label is missing."""
        return ShardReader(replace(self.manifest, target=None), root_of(self.path), self.cache)

    def key(self, shard: int, sample: int) -> str:
        """Read from the shard's index; the place where that, a moment ago still there, cannot be read."""
        try:
            return self.reader().keys(shard)[sample]
        except (OSError, ValueError):
            return f"sample {sample} of {self.manifest.shards[shard].path}"

    def only_shard(self, number: int) -> "DataSet":
        """The same with one shard alone, to send to another process: a manifest may list a hundred thousand."""
        manifest = replace(self.manifest, shards=(self.manifest.shards[number],))
        return replace(self, manifest=manifest, images=self.images and self.images.only_shard(number))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Look at the samples `chosen` of the one shard of `data`, at the flat surfaces of those in `with_planes` too; keep
    `num_pixels` of each label; with `hash_all`, hash every image. `shard` is its number in the whole data set."""

    data: DataSet
    shard: int
    chosen: tuple[int, ...]
    with_planes: frozenset[int]
    num_pixels: int
    hash_all: bool


class Pattern(NamedTuple):
    """Share of the measured pixels with another within two pixels beside them, and above or below them."""

    beside: float
    above: float


@dataclass(kw_only=True)
class Look:
    """What one sample holds. `values` are depths in metres, or disparities where the labels have no unit; `end` is the
    share of pixels that hold the farthest of all values, when that stands alone, and what it is."""

    shard: int
    sample: int
    key: str
    image_size: tuple[int, int] | None = None
    label_size: tuple[int, int] | None = None
    valid_share: float | None = None
    sky_share: float | None = None
    values: np.ndarray | None = None
    pattern: Pattern | None = None
    end: tuple[float, float] | None = None
    votes: Votes = field(default_factory=dict)
    problem: str | None = None
    is_rejected: bool = False


@dataclass(kw_only=True)
class ShardReport:
    """What came of a task. `hashes` (n,) uint64 are those of the images of the samples `hashed` (n,), `key_hashes`
    those of the keys of all samples."""

    task: Task
    problems: list[str] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    hashed: list[int] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


class Label(NamedTuple):
    """Decoded as disparity: `disparity` (H, W), where it was measured, and where it is sky."""

    disparity: np.ndarray
    measured: np.ndarray
    sky: np.ndarray


def look_at_shard(task: Task) -> ShardReport:
    """Never raises: whatever a broken shard or sample raises is a problem of that shard or sample."""
    cv2.setNumThreads(1)
    report = ShardReport(task=task)
    (shard,) = task.data.manifest.shards
    try:
        verify_shard(root_of(task.data.path), shard, task.data.cache)
        reader = task.data.reader()
        keys = reader.keys(0)  # opening a shard compares the number of samples
        report.key_hashes = key_hashes(keys)
    except Exception as error:
        report.problems.append(reason(error))
        return report
    for sample in task.chosen:
        look = Look(shard=task.shard, sample=sample, key=keys[sample])
        report.looks.append(look)
        try:
            _look_at(look, task, reader, report)
        except Exception as error:
            look.problem = reason(error)
    if task.hash_all:
        report.problems += _hash_all(task, reader, keys, report)
    return report


def reason(error: Exception) -> str:
    """Our own errors speak for themselves; of others the type is part of the message."""
    return str(error) if isinstance(error, OSError | SampleError) else f"{type(error).__name__}: {error}"


def _look_at(look: Look, task: Task, reader: ShardReader, report: ShardReport) -> None:
    raw = reader.read(0, look.sample)
    target, images = task.data.manifest.target, task.data.images
    if task.data.manifest.labels_of is None:
        image = decode_image(image_member(raw.members))
        look.image_size = image.shape[0], image.shape[1]
        _add_hash(report, look.sample, image, wanted=not task.hash_all)
    elif images is not None:
        look.image_size = image_size(image_member(paired_image(images, 0, look).members))
    if target is None:
        return
    facts = checked_facts(raw)
    look.is_rejected = "rejected" in facts and target.extension not in raw.members
    if look.is_rejected:
        return
    label = read_label(raw, target)
    look.label_size = label.measured.shape[0], label.measured.shape[1]
    _describe(look, label, target, task.num_pixels)
    if look.sample in task.with_planes:
        intrinsics_px = None if "camera" in facts else facts.get("intrinsics_px")
        look.votes = plane_votes(label.disparity, label.measured, target.quantity, intrinsics_px)
    tolerance = PSEUDO_ASPECT_TOLERANCE if task.data.manifest.labels_of else ASPECT_TOLERANCE
    if look.image_size and target.aligned:
        check_view(look.label_size, look.image_size, tolerance, may_be_larger=task.data.manifest.labels_of is not None)


def paired_image(images: DataSet, shard: int, look: Look) -> RawSample:
    """The image that a pseudo-label is of; SampleError when its place holds another."""
    raw = images.reader().read(shard, look.sample)
    if raw.key != look.key:
        raise SampleError(f"the image at this place of {images.manifest.name} is {raw.key!r}; label the shard again")
    return raw


def checked_facts(raw: RawSample) -> dict[str, Any]:
    facts = read_facts(raw.members)
    intrinsics = facts.get("intrinsics_px", [1, 1, 0, 0])
    if not isinstance(intrinsics, list) or [type(n) in (int, float) for n in intrinsics] != [True] * 4:
        raise SampleError(f"KEY.json: intrinsics_px is {intrinsics!r}, not [fx, fy, cx, cy]")
    return facts


def read_label(raw: RawSample, target: TargetSpec) -> Label:
    """Decode a label with everything that its quantity needs; SampleError says what is missing."""
    facts = checked_facts(raw)
    if target.extension not in raw.members:
        raise SampleError(f"no member {target.extension!r}, only {', '.join(raw.members)}")
    if target.quantity == "stereo_disparity_px" and target.metric:
        missing = {"intrinsics_px", "baseline_m"} - facts.keys()
        if missing:
            raise SampleError(
                f"metric stereo disparity needs the facts {sorted(missing)}; or set target.metric to false"
            )
    sky = raw.members.get("sky.png")
    data = raw.members[target.extension]
    target_size(data, target.codec)
    disparity, valid_mask = decode_target(data, target, facts, "disparity", sky=sky)
    if target.quantity == "disparity":
        return Label(disparity, valid_mask, np.zeros_like(valid_mask))
    return Label(disparity, valid_mask & (disparity > 0), valid_mask & (disparity == 0))


def check_view(
    label_size: tuple[int, int], image_size: tuple[int, int], tolerance: float, *, may_be_larger: bool
) -> None:
    """SampleError unless the label can show what the image shows."""
    (height, width), (image_height, image_width) = label_size, image_size
    is_larger = (height > image_height or width > image_width) and not may_be_larger
    if is_larger or abs(height * image_width / (width * image_height) - 1) > tolerance:
        what = "is larger than" if is_larger else "has another aspect than"
        raise SampleError(
            f"the label ({width}x{height} pixels) {what} the image ({image_width}x{image_height}): not one view"
        )


def _describe(look: Look, label: Label, target: TargetSpec, num_pixels: int) -> None:
    look.valid_share = float(label.measured.mean())
    look.sky_share = float(label.sky.mean())
    values = label.disparity[label.measured]
    if label.sky.all():
        return
    if values.size == 0:
        raise SampleError("no valid pixel: nothing is measured apart from sky")
    look.pattern = pattern(label.measured)
    in_units = 1 / values if target.metric else values
    look.values = in_units[:: max(1, values.size // num_pixels)]
    if values.size > 1 and values.min() == values.max():
        raise SampleError(f"constant: all {values.size} measured pixels hold {in_units[0]:.4g}")
    look.end = _lonely_end(values)


def pattern(measured: np.ndarray) -> Pattern:
    mask = measured.astype(np.float32)

    def share(size: tuple[int, int]) -> float:
        counts = cv2.filter2D(mask, -1, np.ones(size, np.float32), borderType=cv2.BORDER_CONSTANT)
        return float((counts[measured] > 1.5).mean())  # one is the pixel itself

    return Pattern(beside=share((1, 5)), above=share((5, 1)))


def _lonely_end(values: np.ndarray) -> tuple[float, float] | None:
    """Share and value of the smallest disparity when there is a wide gap above it: no scene ends like that."""
    end = values.min()
    others = values[values > end]
    return (1 - others.size / values.size, float(end)) if end > 0 and others.min() > LONELY * end else None


def _add_hash(report: ShardReport, sample: int, image: np.ndarray, *, wanted: bool) -> None:
    value = perceptual_hash(image) if wanted else None
    if value is not None:
        report.hashes.append(value)
        report.hashed.append(sample)


def _hash_all(task: Task, reader: ShardReader, keys: list[str], report: ShardReport) -> Iterator[str]:
    path = task.data.manifest.shards[0].path
    looked_at = set(task.chosen)
    for sample, key in enumerate(keys):
        try:
            data = image_member(reader.read(0, sample).members)
            short_side = min(image_size(data))
            reduce = next(n for n in (8, 4, 2, 1) if short_side >= n * HASH_SIDE or n == 1)
            _add_hash(report, sample, decode_image(data, reduce=reduce), wanted=True)
        except Exception as error:
            if sample not in looked_at:
                yield f"{path}, {key}: {reason(error)}"
