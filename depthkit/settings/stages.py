"""What each stage does; one dataclass for one module of `stages/`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Literal

from omegaconf import MISSING

from depthkit.errors import check
from depthkit.settings.model import EgomotionConfig


class DepthLoss(Enum):
    """The supervised loss; formulas in `losses.py`."""

    affine_invariant = "affine_invariant"
    scale_shift_invariant = "scale_shift_invariant"


@dataclass(kw_only=True)
class StageConfig:
    target_kind: ClassVar[Literal["disparity", "depth"] | None] = "disparity"  # what it learns; None: no labels
    reads_clips: ClassVar[bool] = False  # whether its unlabeled samples are clips of videos (data.clip_frames)

    name: str = MISSING
    encoder_weights: str | None = None  # "timm" (downloads), a bundle folder, or null: random


@dataclass(kw_only=True)
class BundleStartConfig(StageConfig):
    decoder_weights: bool = False  # start from the decoder of the bundle `encoder_weights` too; False: a fresh one

    def __post_init__(self) -> None:
        from_bundle = self.encoder_weights not in (None, "timm")
        allowed = "false, or stage.encoder_weights the bundle of a depth model"
        check(not self.decoder_weights or from_bundle, "stage.decoder_weights", self.decoder_weights, allowed)


@dataclass(kw_only=True)
class PretrainConfig(StageConfig):
    """Masked image modelling of the encoder alone, without labels, for encoders that no published weights exist for."""

    target_kind = None

    name: str = "pretrain"
    mask_ratio: float = 0.6  # share of patches hidden

    def __post_init__(self) -> None:
        check(0 < self.mask_ratio < 1, "stage.mask_ratio", self.mask_ratio, "> 0 and < 1")
        allowed = "null with stage=pretrain: it starts from random weights"
        check(self.encoder_weights is None, "stage.encoder_weights", self.encoder_weights, allowed)


@dataclass(kw_only=True)
class SupervisedConfig(StageConfig):
    normals: bool = False  # learn surface normals of the labels beside depth, with a head that no bundle keeps


@dataclass(kw_only=True)
class TeacherConfig(SupervisedConfig):
    name: str = "teacher"
    loss: DepthLoss = DepthLoss.affine_invariant
    gradient_matching_weight: float = 0.0
    drop_fraction: float = 0.0  # largest residuals of an image that are dropped (MiDaS: 0.2)
    pareto: bool = False  # weigh the losses of the data sets such that a step raises none (MiDaS), not equally

    def __post_init__(self) -> None:
        weight = self.gradient_matching_weight
        check(weight >= 0, "stage.gradient_matching_weight", weight, ">= 0")
        check(0 <= self.drop_fraction < 1, "stage.drop_fraction", self.drop_fraction, "0 to < 1")
        check(not (self.pareto and self.normals), "stage.normals", self.normals, "false with stage.pareto=true")


class DepthErrorLoss(Enum):
    """The loss on depth in metres; formulas in `losses.py`."""

    silog = "silog"
    scale_invariant_log = "scale_invariant_log"


@dataclass(kw_only=True)
class MetricConfig(SupervisedConfig, BundleStartConfig):
    target_kind = "depth"

    name: str = "metric"
    loss: DepthErrorLoss = DepthErrorLoss.silog
    variance_focus: float = 0.5  # of the loss: 1 does not see a wrong scale, 0 counts it fully
    sample_variance: bool = False  # the loss divides its variance by n - 1, as ZoeDepth, instead of n
    loss_scale: float = 1.0  # factor on the loss, which gradient clipping does see
    pooled: bool = False  # one loss over the pixels of all images of a rank (as ZoeDepth and V2), not one for each
    domains: dict[str, str] = field(default_factory=dict)  # name in data.labeled -> model.heads; {}: that of its name
    domain_weight: float = 100.0  # of the cross entropy of the router, for a model with heads
    canonical_focal_px: float | None = None  # learn depth * this / focal length in pixels of the crop; null: depth

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.variance_focus <= 1, "stage.variance_focus", self.variance_focus, "0 to 1")
        check(self.domain_weight >= 0, "stage.domain_weight", self.domain_weight, ">= 0")
        focal = self.canonical_focal_px
        check(focal is None or focal > 0, "stage.canonical_focal_px", focal, "> 0 (pixels), or null")
        check(self.loss_scale > 0, "stage.loss_scale", self.loss_scale, "> 0")


@dataclass(kw_only=True)
class VideoConfig(BundleStartConfig):
    """Depth and ego-motion from video without labels. The defaults are those of vid2depth."""

    target_kind = None
    reads_clips = True

    name: str = "video"
    egomotion: EgomotionConfig = field(default_factory=EgomotionConfig)
    egomotion_weights: str | None = None  # folder `egomotion` of an earlier run; null: random
    reconstruction_weight: float = 0.85
    ssim_weight: float = 0.15
    smoothness_weight: float = 0.05  # halved from scale to scale
    icp_weight: float = 0.1  # halved from scale to scale; 0 spares the search for neighbours
    icp_points: int | None = None  # of a cloud, evenly spaced, that ICP sees; null: all
    num_scales: int = 4  # of disparity and images, each half the size of the one before
    minimum_reprojection: bool = False  # of a frame's neighbours count the better one, pixel by pixel (monodepth2)
    auto_mask: bool = False  # with it: only pixels that warping explains better than standing still
    normalize_disparity: bool = False  # the disparity of a clip is divided by its mean (DDVO)

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = ("reconstruction_weight", "ssim_weight", "smoothness_weight", "icp_weight")
        for name in weights:
            check(getattr(self, name) >= 0, f"stage.{name}", getattr(self, name), ">= 0")
        photometric = self.reconstruction_weight + self.ssim_weight
        check(photometric > 0, "stage.reconstruction_weight + stage.ssim_weight", photometric, "> 0")
        check(1 <= self.num_scales <= 4, "stage.num_scales", self.num_scales, "1 to 4")
        check(self.icp_points is None or self.icp_points > 3, "stage.icp_points", self.icp_points, "> 3, or null")
        allowed = "false without stage.minimum_reprojection=true"
        check(self.minimum_reprojection or not self.auto_mask, "stage.auto_mask", self.auto_mask, allowed)


@dataclass(kw_only=True)
class PseudoLabelConfig(StageConfig):
    name: str = "pseudo_label"
    bundle: str = MISSING  # folder of the teacher's bundle
    images: str = MISSING  # manifest of the images
    out: str = MISSING  # folder for label shards and their manifest
    short_side: int | None = None  # pixels; null = as the teacher was trained; aspect kept, multiples of the patch
    batch_size: int = 8  # images of one size per forward pass
    num_workers: int = 4  # loader processes per labelling process
    num_writers: int = 4  # threads per labelling process that encode and write labels
    flip: bool = False  # label the mirrored image too; of several views the mean is kept, with its uncertainty
    scales: list[float] = field(default_factory=lambda: [1.0])  # of short_side, at which images are seen; the first 1
    sky_model: str | None = None  # ONNX file of a segmentation network, for images without a sky mask
    sky_class: int = 2  # its class for sky; 2 is that of ADE20K
    compile: bool = False  # torch.compile the teacher: slow at first
    verify: bool = False  # check every finished label shard first, and label broken ones again
    claim_timeout: float = 120.0  # seconds without a sign of life after which a shard is taken from its process

    def __post_init__(self) -> None:
        check(self.short_side is None or self.short_side > 0, "stage.short_side", self.short_side, "> 0 or null")
        check(self.batch_size > 0, "stage.batch_size", self.batch_size, "> 0")
        check(self.num_writers > 0, "stage.num_writers", self.num_writers, "> 0")
        scales = "one of each, > 0, the first 1"
        is_valid = self.scales[:1] == [1] and min(self.scales) > 0 and len(set(self.scales)) == len(self.scales)
        check(is_valid, "stage.scales", self.scales, scales)
        check(self.sky_class >= 0, "stage.sky_class", self.sky_class, ">= 0")
        check(self.claim_timeout > 0, "stage.claim_timeout", self.claim_timeout, "> 0 (seconds)")


@dataclass(kw_only=True)
class StudentConfig(SupervisedConfig):
    name: str = "student"
    loss: DepthLoss = DepthLoss.affine_invariant
    gradient_matching_weight: float = 0.0
    labeled_weight: float = 1.0
    unlabeled_weight: float = 1.0
    feature_weight: float = 1.0
    tolerance_margin: float = 0.15  # locations with 1 - cos below it are left out (Depth-Anything issue 80)
    drop_fraction: float = 0.0  # largest residuals of a pseudo-labeled image that are dropped (V2: 0.1)

    def __post_init__(self) -> None:
        for name in ("gradient_matching_weight", "labeled_weight", "unlabeled_weight", "feature_weight"):
            check(getattr(self, name) >= 0, f"stage.{name}", getattr(self, name), ">= 0")
        weights = [self.labeled_weight, self.unlabeled_weight, self.feature_weight]
        check(sum(weights) > 0, "stage weights (labeled, unlabeled, feature)", weights, "not all 0")
        check(0 <= self.tolerance_margin <= 2, "stage.tolerance_margin", self.tolerance_margin, "0 to 2, on 1 - cos")
        check(0 <= self.drop_fraction < 1, "stage.drop_fraction", self.drop_fraction, "0 to < 1")
