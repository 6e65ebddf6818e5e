"""The settings of an evaluation: a protocol, and what `depthkit evaluate` is told."""

from dataclasses import dataclass, field, fields
from enum import Enum

from omegaconf import MISSING

from depthkit.errors import check

STANDARD_METRICS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3"]
"""Those that most papers print."""

METRIC_NAMES = [
    *STANDARD_METRICS,
    "delta_1_05",
    "delta_1_10",
    "silog_half",
    "rmse_log_scale_invariant",
    "scale_invariant_error",
    "boundary_f1",
    "boundary_recall",
    "edge_abs_rel",
    "ordinal_accuracy",
]
"""The keys of `metrics.METRICS`, here so that a wrong name is found before torch is imported."""


PAIR_METRICS = ["pair_accuracy", "whdr"]
"""Metrics of annotated pairs of points, which need no map of ground truth."""


POOLING_POWER = {
    **dict.fromkeys(["abs_rel", "sq_rel", "log10", "delta_1_05", "delta_1_10", "delta1", "delta2", "delta3"], 1),
    **dict.fromkeys(["scale_invariant_error", *PAIR_METRICS], 1),
    **dict.fromkeys(["rmse", "rmse_log", "silog", "silog_half", "rmse_log_scale_invariant"], 2),
}
"""Metrics that are means over pixels, or (2) roots of such means: those that a number over all pixels exists for."""


class GroundTruth(Enum):
    """What a prediction is compared with: a depth map, or pairs of points of which one is closer (fact `pairs`)."""

    depth = "depth"
    pairs = "pairs"


class DepthUnit(Enum):
    """What the depths of a protocol are measured in: metres, or the largest ground truth depth of the image."""

    metres = "metres"
    image_maximum = "image_maximum"


class Alignment(Enum):
    """What is fitted to the ground truth, per image, and in which space (`evaluation/protocols.py`).

    Least squares and robust (least absolute deviations) fit scale and shift, in disparity, depth or the logarithm of
    depth; the others fit a scale of depth alone, or nothing.
    """

    disparity_least_squares = "disparity_least_squares"
    depth_least_squares = "depth_least_squares"
    log_least_squares = "log_least_squares"
    disparity_robust = "disparity_robust"
    depth_robust = "depth_robust"
    scale_least_squares = "scale_least_squares"
    scale_median = "scale_median"
    none = "none"


class Floor(Enum):
    """What an aligned disparity is raised to before it is inverted; one near or below 0 would be a depth of 1e8 m."""

    cap = "cap"  # 1 / max_depth (MiDaS)
    image_maximum = "image_maximum"  # 1 / the largest ground truth depth of the image (MoGe)
    none = "none"


class Clip(Enum):
    """When depths are clipped to [min_depth, max_depth]."""

    after_alignment = "after_alignment"
    before_alignment = "before_alignment"
    none = "none"


class Resize(Enum):
    """How a prediction is brought to the size of the ground truth; never the other way round."""

    bilinear = "bilinear"  # align_corners=False
    bilinear_corners = "bilinear_corners"  # align_corners=True
    nearest = "nearest"


class Aggregation(Enum):
    """A number per image and their mean, or one number over the pixels (or pairs) of all images."""

    images = "images"
    pixels = "pixels"


IN_DISPARITY = (Alignment.disparity_least_squares, Alignment.disparity_robust)
"""Alignments in which models that predict disparity can take part."""


@dataclass(kw_only=True)
class ProtocolConfig:
    """One way to turn a prediction and ground truth into numbers. The steps are applied in the order of the fields.

    A field that would change nothing beside the others must keep its default: it would be the same protocol with
    another id.
    """

    name: str = MISSING
    datasets: list[str] | None = None  # manifests by name whose ground truth this is defined on; null: any
    ground_truth: GroundTruth = GroundTruth.depth
    window: list[int] | None = None  # height, width in pixels: the bottom centre that image and truth are cut to first
    unit: DepthUnit = DepthUnit.metres
    min_depth: float = 1e-3  # ground truth outside (min_depth, max_depth] is not evaluated; in `unit`
    max_depth: float | None = MISSING  # the cap; null: none
    crop: list[float] | None = None  # evaluated box: top, bottom, left, right as shares; in pixels if any exceeds 1
    max_jump: float | None = None  # pixels whose 3 x 3 neighbours span more than this share of their depth are left out
    flip: bool = False  # mean of the predictions for the image and its mirror image
    resize: Resize = Resize.bilinear
    alignment: Alignment = MISSING
    floor: Floor = Floor.cap  # where disparity is fitted
    clip: Clip = Clip.after_alignment
    metrics: list[str] = field(default_factory=lambda: list(STANDARD_METRICS))
    aggregation: Aggregation = Aggregation.images

    def __post_init__(self) -> None:
        # An integer would be the same protocol with another id.
        self.min_depth = float(self.min_depth)
        self.max_depth = None if self.max_depth is None else float(self.max_depth)
        self.max_jump = None if self.max_jump is None else float(self.max_jump)
        check(self.min_depth >= 0, "protocol.min_depth", self.min_depth, ">= 0")
        limits = f"> min_depth={self.min_depth}, or null"
        check(self.max_depth is None or self.max_depth > self.min_depth, "protocol.max_depth", self.max_depth, limits)
        check(self.max_jump is None or self.max_jump > 0, "protocol.max_jump", self.max_jump, "> 0, or null")
        check(len(self.metrics) > 0, "protocol.metrics", self.metrics, "at least one")
        known = PAIR_METRICS if self.ground_truth is GroundTruth.pairs else METRIC_NAMES
        check(set(self.metrics) <= set(known), "protocol.metrics", self.metrics, f"among {known}")
        if self.window is not None:
            window_is_size = len(self.window) == 2 and min(self.window) > 0
            check(window_is_size, "protocol.window", self.window, "[height, width] in pixels")
        if self.crop is not None:
            self.crop = [float(share) for share in self.crop]
            box = "[top, bottom, left, right], each pair 0 <= first < second"
            check(len(self.crop) == 4, "protocol.crop", self.crop, box)
            top, bottom, left, right = self.crop
            check(0 <= top < bottom and 0 <= left < right, "protocol.crop", self.crop, box)
        self._check_together()

    def _check_together(self) -> None:
        """Fields that exclude each other, or that would do nothing beside the others."""
        fits_disparity, alignment = self.alignment in IN_DISPARITY, self.alignment.value
        if self.ground_truth is GroundTruth.pairs:
            usual = {each.name: each.default for each in fields(self)} | {
                "max_depth": None,
                "alignment": Alignment.none,
            }
            for name in usual.keys() - {"name", "datasets", "ground_truth", "flip", "metrics", "aggregation"}:
                allowed = f"{usual[name]!r} with ground_truth=pairs, which have no map"
                check(getattr(self, name) == usual[name], f"protocol.{name}", getattr(self, name), allowed)
        if self.unit is DepthUnit.image_maximum:
            cap_is_share = self.max_depth is not None and self.max_depth <= 1
            check(cap_is_share, "protocol.max_depth", self.max_depth, "at most 1 with unit=image_maximum")
            allowed = "one that fits a scale with unit=image_maximum"
            check(self.alignment is not Alignment.none, "protocol.alignment", alignment, allowed)
            allowed = "another with unit=image_maximum, of which a prediction knows nothing before it is aligned"
            check(self.clip is not Clip.before_alignment, "protocol.clip", self.clip.value, allowed)
        allowed = f"cap with alignment={alignment}, which inverts no disparity"
        check(fits_disparity or self.floor is Floor.cap, "protocol.floor", self.floor.value, allowed)
        has_floor = self.max_depth is not None or self.floor is not Floor.cap
        check(
            not fits_disparity or has_floor, "protocol.floor", self.floor.value, "image_maximum or none without a cap"
        )
        is_same = self.clip is Clip.before_alignment and self.alignment is Alignment.none
        check(not is_same, "protocol.clip", self.clip.value, "after_alignment or none with alignment=none")
        if self.aggregation is Aggregation.pixels:
            allowed = f"among {list(POOLING_POWER)} with aggregation=pixels"
            check(set(self.metrics) <= POOLING_POWER.keys(), "protocol.metrics", self.metrics, allowed)


def kind_refusal(protocol: ProtocolConfig, kind: str, unit: str = "metres") -> str | None:
    """Why models that predict `kind` (`types.Kind`) cannot be evaluated with `protocol`; None if they can.

    `unit` "relative" is depth up to scale.
    """
    if protocol.ground_truth is GroundTruth.pairs:
        return None
    if kind == "depth":
        if protocol.alignment is Alignment.none and unit == "relative":
            return (
                f"protocol {protocol.name} compares metres, and the unit of the predictions is relative: use one "
                "that fits a scale, such as sfmlearner"
            )
        return None
    if protocol.alignment not in IN_DISPARITY:
        return (
            f"protocol {protocol.name} (alignment={protocol.alignment.value}) compares depth, and the model predicts "
            f"{kind}, which cannot be inverted before its shift is known: use an affine_disparity protocol for it"
        )
    if protocol.clip is Clip.before_alignment:
        return (
            f"protocol {protocol.name} clips a prediction to depths before it is aligned, and the model predicts "
            f"{kind}, which is none yet: use protocol.clip=after_alignment for it"
        )
    return None


@dataclass(kw_only=True)
class EvaluateConfig:
    """`depthkit evaluate model=A,B dataset=MANIFEST,... protocol=NAME out=DIR`."""

    models: list[str] = MISSING  # whatever `depthkit.load` takes, or a folder of predictions with a predictions.json
    datasets: list[str] = MISSING  # manifests with ground truth
    protocol: ProtocolConfig = MISSING
    out: str = "runs/evaluate"
    num_pictures: int = 8  # images shown in the report
    device: str = "auto"
    devices: int = 1  # processes, each with a GPU of its own where there are several; 1 under torchrun or srun
    num_workers: int = 4  # threads of each process that read and score while it predicts
    training: list[str] = field(default_factory=list)  # further manifests that the models were trained on
    allow_leakage: bool = False  # evaluate models on their training images all the same

    def __post_init__(self) -> None:
        for name in ("num_pictures", "devices", "num_workers"):
            check(getattr(self, name) > 0, name, getattr(self, name), "> 0")
