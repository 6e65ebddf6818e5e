"""Our own settings: dataclasses that Hydra composes against, and the checks between them.

YAML in `conf/` chooses values; the fields, types, units and defaults live here and in `settings/`. Hydra refuses an
unknown key or a wrong type while composing, the `__post_init__` of the dataclasses checks ranges, and `checks.validate`
judges what two fields say together. All of it happens before any data is opened.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from depthkit.errors import ConfigError, check
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.settings.data import AugmentConfig, CameraAugmentConfig, DataConfig, DatasetConfig, WorldConfig
from depthkit.settings.model import (
    DispNetConfig,
    DPTConfig,
    EgomotionConfig,
    Eigen2014Config,
    MetricBinsConfig,
    ModelConfig,
)
from depthkit.settings.optim import Algorithm, OptimConfig, Schedule
from depthkit.settings.stages import (
    BundleStartConfig,
    DepthErrorLoss,
    DepthLoss,
    MetricConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StageConfig,
    StudentConfig,
    SupervisedConfig,
    TeacherConfig,
    VideoConfig,
)
from depthkit.settings.transfer import TransferConfig, TransferMode

__all__ = [
    "CONF_DIR",
    "PACKAGE",
    "TRAINER_CHOICES",
    "Algorithm",
    "AugmentConfig",
    "BundleStartConfig",
    "CameraAugmentConfig",
    "ConfigError",
    "DPTConfig",
    "DataConfig",
    "DatasetConfig",
    "DemoConfig",
    "DepthErrorLoss",
    "DepthLoss",
    "DispNetConfig",
    "EgomotionConfig",
    "Eigen2014Config",
    "MetricBinsConfig",
    "MetricConfig",
    "ModelConfig",
    "OptimConfig",
    "PathsConfig",
    "PretrainConfig",
    "ProtocolConfig",
    "PseudoLabelConfig",
    "Schedule",
    "StageConfig",
    "StudentConfig",
    "SupervisedConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainerConfig",
    "TransferConfig",
    "TransferMode",
    "VideoConfig",
    "WorldConfig",
    "check",
]

PACKAGE = Path(__file__).parent
CONF_DIR = next(d for d in (PACKAGE / "conf", PACKAGE.parent / "conf") if d.is_dir())
"""The YAML files: inside the package in a wheel, beside it in a checkout."""


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
    transfer: TransferConfig = field(default_factory=TransferConfig)
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
