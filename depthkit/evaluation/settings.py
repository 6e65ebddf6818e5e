"""The settings of an evaluation: a protocol, and what `depthkit evaluate` is told."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from depthkit.errors import check

STANDARD_METRICS = ["abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3"]
"""Those that most papers print."""

METRIC_NAMES = [*STANDARD_METRICS]
"""The keys of `metrics.METRICS`, here so that a wrong name is found before torch is imported."""


class DepthUnit(Enum):
    """What the depths of a protocol are measured in: metres, or the largest ground truth depth of the image."""

    metres = "metres"
    image_maximum = "image_maximum"


class Alignment(Enum):
    """What is fitted to the ground truth, per image, and in which space (`evaluation/protocols.py`)."""

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
    """A number per image and their mean, or one number over the pixels of all images."""

    images = "images"
    pixels = "pixels"


@dataclass(kw_only=True)
class ProtocolConfig:
    """One way to turn a prediction and ground truth into numbers. The steps are applied in the order of the fields."""

    name: str = MISSING
    datasets: list[str] | None = None  # manifests by name whose ground truth this is defined on; null: any
    window: list[int] | None = None  # height, width in pixels: the bottom centre that image and truth are cut to first
    unit: DepthUnit = DepthUnit.metres
    min_depth: float = 1e-3  # ground truth outside (min_depth, max_depth] is not evaluated; in `unit`
    max_depth: float = MISSING  # the cap
    crop: list[float] | None = None  # evaluated box: top, bottom, left, right as shares of height and width
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
        self.min_depth, self.max_depth = float(self.min_depth), float(self.max_depth)
        limits = f"0 < min_depth={self.min_depth} < max_depth"
        check(0 < self.min_depth < self.max_depth, "protocol.max_depth", self.max_depth, limits)
        check(set(self.metrics) <= set(METRIC_NAMES), "protocol.metrics", self.metrics, f"among {METRIC_NAMES}")
        check(len(self.metrics) > 0, "protocol.metrics", self.metrics, "at least one")
        check(self.max_jump is None or self.max_jump > 0, "protocol.max_jump", self.max_jump, "> 0, or null")
        if self.window is not None:
            window_is_size = len(self.window) == 2 and min(self.window) > 0
            check(window_is_size, "protocol.window", self.window, "[height, width] in pixels")
        if self.crop is not None:
            self.crop = [float(share) for share in self.crop]
            box = "[top, bottom, left, right], each pair 0 <= first < second <= 1"
            check(len(self.crop) == 4, "protocol.crop", self.crop, box)
            top, bottom, left, right = self.crop
            check(0 <= top < bottom <= 1 and 0 <= left < right <= 1, "protocol.crop", self.crop, box)


@dataclass(kw_only=True)
class EvaluateConfig:
    """`depthkit evaluate model=A,B dataset=MANIFEST,... protocol=NAME out=DIR`."""

    models: list[str] = MISSING  # whatever `depthkit.load` takes, or a folder of predictions with a predictions.json
    datasets: list[str] = MISSING  # manifests with ground truth
    protocol: ProtocolConfig = MISSING
    out: str = "runs/evaluate"
    num_pictures: int = 8  # images shown in the report
    device: str = "auto"

    def __post_init__(self) -> None:
        check(self.num_pictures > 0, "num_pictures", self.num_pictures, "> 0")
