"""Hydra composes `conf/` against the dataclasses of `config.py`."""

from dataclasses import fields, is_dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from depthkit.config import (
    ConfigError,
    DataConfig,
    DatasetConfig,
    DemoConfig,
    DispNetConfig,
    DPTConfig,
    Eigen2014Config,
    MetricBinsConfig,
    MetricConfig,
    OptimConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TrainerConfig,
    TransferConfig,
    VideoConfig,
)
from depthkit.doctor.settings import DoctorConfig
from depthkit.evaluation.settings import EvaluateConfig, ProtocolConfig
from depthkit.planning.settings import ClusterConfig, PlanConfig
from depthkit.sweeps.settings import SearchConfig

SCHEMAS: dict[tuple[str | None, str], type] = {
    (None, "base_train"): TrainConfig,
    (None, "base_evaluate"): EvaluateConfig,
    (None, "base_demo"): DemoConfig,
    (None, "base_plan"): PlanConfig,
    (None, "base_doctor"): DoctorConfig,
    ("cluster", "base_cluster"): ClusterConfig,
    ("model", "base_dpt"): DPTConfig,
    ("model", "base_eigen2014"): Eigen2014Config,
    ("model", "base_metric_bins"): MetricBinsConfig,
    ("model", "base_dispnet"): DispNetConfig,
    ("data", "base_data"): DataConfig,
    ("dataset", "base_dataset"): DatasetConfig,
    ("optim", "base_optim"): OptimConfig,
    ("trainer", "base_trainer"): TrainerConfig,
    ("transfer", "base_transfer"): TransferConfig,
    ("protocol", "base_protocol"): ProtocolConfig,
    ("stage", "base_pretrain"): PretrainConfig,
    ("stage", "base_teacher"): TeacherConfig,
    ("stage", "base_metric"): MetricConfig,
    ("stage", "base_pseudo_label"): PseudoLabelConfig,
    ("stage", "base_student"): StudentConfig,
    ("stage", "base_video"): VideoConfig,
    ("hydra/sweeper", "base_optuna"): SearchConfig,
}


def register_schemas() -> None:
    """Make the dataclasses known to Hydra; each YAML names its own first in its defaults list."""
    store = ConfigStore.instance()
    for (group, name), schema in SCHEMAS.items():
        store.store(group=group, name=name, node=schema)


def to_config(cfg: DictConfig) -> Any:
    """The dataclass that `cfg` was composed against; ConfigError names what is missing, unknown or out of range."""
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise ConfigError("no value for " + ", ".join(sorted(missing)) + ": give it as KEY=VALUE")
    unknown = unknown_keys(cfg)
    if unknown:
        raise ConfigError("unknown setting " + ", ".join(unknown) + ": `--cfg job` prints those that there are")
    return OmegaConf.to_object(cfg)


def unknown_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys that no dataclass has: Hydra adds them all the same when they come after a plus sign."""
    schema = OmegaConf.get_type(cfg)
    known = {each.name for each in fields(schema)} if is_dataclass(schema) else cfg.keys()
    unknown = [f"{prefix}{key}" for key in map(str, cfg) if key not in known]
    for key in map(str, cfg):
        if OmegaConf.is_dict(cfg[key]):
            unknown += unknown_keys(cfg[key], f"{prefix}{key}.")
    return unknown
