"""Our own settings: dataclasses that Hydra composes against, and the checks between them.

YAML in `conf/` chooses values; the fields, types, units and defaults live here. Hydra refuses an unknown key or a wrong
type while composing, the `__post_init__` of the dataclasses checks ranges, and `checks.validate` judges what two fields
say together. All of it happens before any data is opened.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

from omegaconf import MISSING

from depthkit.errors import ConfigError as ConfigError
from depthkit.errors import check as check
from depthkit.evaluation.settings import ProtocolConfig

PACKAGE = Path(__file__).parent
CONF_DIR = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())
"""The YAML files: inside the package in a wheel, beside it in a checkout."""


# --- model -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class ModelConfig:
    """What a bundle needs to rebuild the network; no training choice in it."""

    encoder: str = MISSING  # timm name: a vision transformer, or a network with stages (ResNet, ConvNeXt, Swin)
    encoder_args: dict[str, Any] = field(default_factory=dict)  # passed to timm: img_size, embed_dim, depth, ...
    conv_stem: bool = False  # stride-2 convolutions instead of the linear patch embedding
    tap_layers: list[int] = MISSING  # the four blocks (or stages) that the decoder reads, 0-based
    features: int = MISSING  # decoder width
    out_channels: list[int] = MISSING  # decoder widths per tap, before they become `features`
    max_depth: float | None = None  # metres: sigmoid x this, predicts depth; null: disparity, >= 0

    def __post_init__(self) -> None:
        check(self.max_depth is None or self.max_depth > 0, "model.max_depth", self.max_depth, "> 0 (metres) or null")
        check(len(self.tap_layers) == 4, "model.tap_layers", self.tap_layers, "four block indices")
        check(list(self.tap_layers) == sorted(set(self.tap_layers)), "model.tap_layers", self.tap_layers, "increasing")
        check(len(self.out_channels) == 4, "model.out_channels", self.out_channels, "four widths")
        check(self.features > 1 and self.features % 2 == 0, "model.features", self.features, "an even number > 1")


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class WorldConfig:
    """A procedural data set, rendered when its manifest is not there yet (`data/procedural.py`)."""

    domain: str = MISSING  # source | target
    split: str = MISSING  # train | val | test: different scenes
    num_images: int = MISSING
    size: list[int] = field(default_factory=lambda: [96, 128])  # height, width in pixels
    seed: int = 0
    labeled: bool = True  # False: images alone

    def __post_init__(self) -> None:
        check(self.domain in ("source", "target"), "world.domain", self.domain, "source or target")
        check(self.num_images > 0, "world.num_images", self.num_images, "> 0")


@dataclass(kw_only=True)
class DatasetConfig:
    """How to use one data set; what it is stands in its manifest."""

    manifest: str = MISSING  # path or URL of the manifest; shards are found beside it
    labels: str | None = None  # path or URL of a pseudo-label manifest for these images
    selection: str | None = None  # path of a file by `depthkit select`: train on its samples alone
    weight: float = 1.0  # samples per sweep relative to the data set's own size; 1 = plain concatenation
    depth_range: list[float] | None = None  # metres; pixels outside are not supervised
    world: WorldConfig | None = None  # render the data set when the manifest is missing

    def __post_init__(self) -> None:
        check(self.weight > 0, "dataset.weight", self.weight, "> 0 (drop a data set with '~data.labeled.NAME')")
        if self.depth_range is not None:
            low, high = self.depth_range
            check(0 <= low < high, "dataset.depth_range", self.depth_range, "[low, high] in metres, 0 <= low < high")


@dataclass(kw_only=True)
class AugmentConfig:
    """Perturbations. Labeled images are only flipped; the strong ones are for unlabeled images of the student."""

    horizontal_flip: float = 0.5  # probability, labeled and unlabeled
    color_jitter: float = 0.0  # probability
    brightness: float = 0.5  # jitter factor drawn from 1 +- this
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25  # shift in turns, +- this
    grayscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels, uniform
    cutmix: float = 0.0  # probability per image
    cutmix_area: list[float] = field(default_factory=lambda: [0.02, 0.4])  # share of the image, uniform
    cutmix_aspect: float = 0.3  # box height / width from this to its inverse

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "color_jitter", "grayscale", "blur", "cutmix"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"data.augment.{name}", value, "a probability, 0 to 1")
        check(0 <= self.hue <= 0.5, "data.augment.hue", self.hue, "0 to 0.5 turns")
        low, high = self.cutmix_area
        check(0 < low <= high <= 1, "data.augment.cutmix_area", self.cutmix_area, "[low, high], 0 < low <= high <= 1")
        check(0 < self.cutmix_aspect <= 1, "data.augment.cutmix_aspect", self.cutmix_aspect, "0 < aspect <= 1")


@dataclass(kw_only=True)
class DataConfig:
    labeled: dict[str, DatasetConfig] = field(default_factory=dict)
    unlabeled: dict[str, DatasetConfig] = field(default_factory=dict)
    val: dict[str, DatasetConfig] = field(default_factory=dict)
    crop_size: list[int] = field(default_factory=lambda: [518, 518])  # height, width of a training crop
    batch_size: int = 1  # images per optimizer micro-step over all ranks, labeled and unlabeled together
    unlabeled_per_labeled: int = 2
    shuffle_block: int = 4096  # samples of a lane that are shuffled together: bounds the shards open at a time
    num_workers: int = 4  # loader processes per rank
    quarantine_budget: float = 0.01  # share of broken samples that ends the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check(len(self.crop_size) == 2, "data.crop_size", self.crop_size, "[height, width]")
        check(self.batch_size > 0, "data.batch_size", self.batch_size, "> 0")
        check(self.unlabeled_per_labeled > 0, "data.unlabeled_per_labeled", self.unlabeled_per_labeled, "> 0")
        check(self.shuffle_block > 0, "data.shuffle_block", self.shuffle_block, "> 0")
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, ">= 0")
        check(0 <= self.quarantine_budget < 1, "data.quarantine_budget", self.quarantine_budget, "a share, 0 to < 1")
        if self.labeled and self.unlabeled:
            part = 1 + self.unlabeled_per_labeled
            check(
                self.batch_size % part == 0,
                "data.batch_size",
                self.batch_size,
                f"a multiple of {part}, so that labeled:unlabeled is exactly 1:{self.unlabeled_per_labeled}",
            )

    def images_per_step(self) -> dict[str, int]:
        """Images of each stream in a batch over all ranks; a stream without data sets has 0."""
        if self.labeled and self.unlabeled:
            labeled = self.batch_size // (1 + self.unlabeled_per_labeled)
            return {"labeled": labeled, "unlabeled": self.batch_size - labeled}
        return {
            "labeled": self.batch_size if self.labeled else 0,
            "unlabeled": self.batch_size if self.unlabeled else 0,
        }


# --- optimizer -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with two groups and a schedule in optimizer steps."""

    encoder_lr: float = 5e-6
    decoder_lr_multiplier: float = 10.0  # decoder rate = encoder rate x this
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    warmup_steps: int = 0
    final_lr_fraction: float = 0.0  # rate at the last step relative to the peak
    schedule_power: float = 1.0  # of the way between the two: 1 is linear, 0.9 the "poly" of DPT's successors
    ema_decay: float | None = None  # per step, of an average of the weights; its half-life is ln 2 / (1 - decay) steps

    def __post_init__(self) -> None:
        check(self.encoder_lr >= 0, "optim.encoder_lr", self.encoder_lr, ">= 0")
        check(self.decoder_lr_multiplier > 0, "optim.decoder_lr_multiplier", self.decoder_lr_multiplier, "> 0")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, ">= 0")
        check(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, ">= 0")
        check(0 <= self.final_lr_fraction <= 1, "optim.final_lr_fraction", self.final_lr_fraction, "0 to 1")
        check(self.schedule_power > 0, "optim.schedule_power", self.schedule_power, "> 0")
        decay = self.ema_decay
        check(decay is None or 0 < decay < 1, "optim.ema_decay", decay, "> 0 and < 1, or null for no average")


# --- stages ----------------------------------------------------------------------------------------------------------


class DepthLoss(Enum):
    """The supervised loss; formulas in `losses.py`."""

    affine_invariant = "affine_invariant"
    scale_shift_invariant = "scale_shift_invariant"


@dataclass(kw_only=True)
class StageConfig:
    target_kind: ClassVar[Literal["disparity", "depth"] | None] = "disparity"  # what it learns; None: no labels

    name: str = MISSING
    encoder_weights: str | None = None  # "timm" (downloads), a bundle folder, or null: random


@dataclass(kw_only=True)
class PretrainConfig(StageConfig):
    """Masked image modelling of the encoder alone, without labels, for encoders that no published weights exist for."""

    target_kind = None

    name: str = "pretrain"
    mask_ratio: float = 0.6  # share of patches hidden

    def __post_init__(self) -> None:
        check(0 < self.mask_ratio < 1, "stage.mask_ratio", self.mask_ratio, "> 0 and < 1")


@dataclass(kw_only=True)
class TeacherConfig(StageConfig):
    name: str = "teacher"
    loss: DepthLoss = DepthLoss.affine_invariant
    gradient_matching_weight: float = 0.0

    def __post_init__(self) -> None:
        weight = self.gradient_matching_weight
        check(weight >= 0, "stage.gradient_matching_weight", weight, ">= 0")


@dataclass(kw_only=True)
class MetricConfig(StageConfig):
    target_kind = "depth"

    name: str = "metric"
    decoder_weights: bool = False  # start from the decoder of the bundle `encoder_weights` too; False: a fresh one
    variance_focus: float = 0.5  # of the SILog loss

    def __post_init__(self) -> None:
        check(0 <= self.variance_focus <= 1, "stage.variance_focus", self.variance_focus, "0 to 1")
        from_bundle = self.encoder_weights not in (None, "timm")
        allowed = "false, or stage.encoder_weights the bundle of a depth model"
        check(not self.decoder_weights or from_bundle, "stage.decoder_weights", self.decoder_weights, allowed)


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
class StudentConfig(StageConfig):
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


# --- run -------------------------------------------------------------------------------------------------------------


TRAINER_CHOICES: dict[str, tuple[Any, ...]] = {
    "strategy": ("auto", "ddp", "deepspeed"),
    "zero_stage": (None, 1, 2, 3),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
}


@dataclass(kw_only=True)
class TrainerConfig:
    """Arguments of `lightning.Trainer`, and how the model runs on the devices; refused when misspelt."""

    _target_: str = "lightning.Trainer"
    accelerator: str = "cpu"
    devices: int = 1  # processes per node
    num_nodes: int = 1
    strategy: str = "auto"  # auto | ddp | deepspeed
    zero_stage: int | None = None  # 1 | 2 | 3, with strategy=deepspeed: optimizer state | + gradients | + weights split
    offload: bool = False  # with strategy=deepspeed: optimizer state in host memory, with zero_stage=3 weights too
    deepspeed_config: str | None = None  # path of a DeepSpeed JSON, in the place of zero_stage and offload
    activation_checkpointing: bool = False  # compute encoder blocks again in the backward pass: less memory
    compile: bool = False  # torch.compile the model: slow at first
    channels_last: bool = False  # memory format of the decoder
    precision: str = "32-true"  # 32-true | bf16-mixed | 16-mixed: of autocast; weights are float32
    max_steps: int = -1  # optimizer steps; -1 = from `sweeps`
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None  # norm
    val_check_interval: int | None = None  # optimizer steps; null = at the end alone
    limit_val_batches: int | None = None  # images per data set
    log_every_n_steps: int = 10
    enable_progress_bar: bool = True
    enable_model_summary: bool = False

    def __post_init__(self) -> None:
        for name, allowed in TRAINER_CHOICES.items():
            value = getattr(self, name)
            check(value in allowed, f"trainer.{name}", value, "one of " + ", ".join(map(str, allowed)))
        check(self.accumulate_grad_batches > 0, "trainer.accumulate_grad_batches", self.accumulate_grad_batches, "> 0")
        clip = self.gradient_clip_val
        check(clip is None or clip > 0, "trainer.gradient_clip_val", clip, "a norm > 0, or null")


@dataclass(kw_only=True)
class PathsConfig:
    data: str = "data"  # shards and manifests
    runs: str = "runs"
    cache: str = "data/cache"  # copies of remote shards, shared by all processes; best on a disk of the node
    cache_gb: float = 100.0  # 10^9 bytes that they may take; the least recently used give way

    def __post_init__(self) -> None:
        check(self.cache_gb > 0, "paths.cache_gb", self.cache_gb, "> 0 (10^9 bytes)")


@dataclass(kw_only=True)
class TrainConfig:
    stage: StageConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    protocol: ProtocolConfig = MISSING  # of the validation during training
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0
    sweeps: float | None = None  # passes over the labeled (teacher) or unlabeled (student) images, instead of max_steps
    run_name: str = MISSING
    run_dir: str = MISSING
    resume: str = "auto"  # auto: from run_dir's newest checkpoint if there is one | never | path of a checkpoint


@dataclass(kw_only=True)
class DemoConfig:
    """`depthkit demo seed=0 out=runs/demo`."""

    seed: int = 0
    out: str = "runs/demo"
    scale: float = 1.0  # images and steps relative to the full demo; below 1 only shows that everything runs
    overrides: list[str] = field(default_factory=list)  # for every training stage, such as trainer.accelerator=gpu
