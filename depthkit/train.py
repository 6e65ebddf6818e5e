"""The entry of every stage: compose -> validate -> build -> fit or predict."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import timm
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

import depthkit
from depthkit.bundle import BundleFacts, load_encoder_weights, read_facts, save_bundle
from depthkit.checks import num_steps, size_multiple, validate
from depthkit.config import (
    ConfigError,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from depthkit.data.cache import ShardCache
from depthkit.data.datamodule import DepthDataModule
from depthkit.data.manifest import load_manifest
from depthkit.files import atomic_write
from depthkit.hydra_entry import hydra_main
from depthkit.label import label
from depthkit.licences import NOT_STATED, stated_licences
from depthkit.models import DepthModel, PlainEncoder, build_encoder, build_model
from depthkit.runtime.checkpoint import AtomicCheckpointIO, newest_checkpoint
from depthkit.runtime.quarantine import QuarantineMonitor
from depthkit.stages.base import DepthModule, val_name
from depthkit.stages.pretrain import PretrainModule
from depthkit.stages.student import StudentModule
from depthkit.stages.teacher import TeacherModule

MAY_DIFFER_ON_RESUME = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.enable",
    "data.num_workers",
    "data.quarantine_budget",
    "data.val",
    "logger",
    "callbacks",
    "resume",
    "run_dir",
    "run_name",
    "paths",
)
"""Settings that change neither the batches nor the mathematics."""


def main(argv: list[str]) -> int:
    return hydra_main("train", argv, run)


def run(config: TrainConfig, callbacks: Sequence[L.Callback] = ()) -> float | None:
    """Run one stage; returns the validation AbsRel (what a sweep minimises), None for a stage without it."""
    validate(config)
    if isinstance(config.stage, PseudoLabelConfig):
        label(config)
        return None
    return fit(config, callbacks)


def fit(config: TrainConfig, callbacks: Sequence[L.Callback] = ()) -> float | None:
    """Train from the newest checkpoint or from the start, and write the model to `run_dir/bundle`.

    `callbacks` are added to those of the config.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    run_dir = Path(config.run_dir)
    config.trainer.max_steps = num_steps(config)
    if config.resume == "never":
        set_aside(run_dir)
    finished = config.resume == "auto" and (run_dir / "bundle").is_dir()
    checkpoint = resume_point(config)
    keep_settings(config, run_dir / "config.yaml", resumed=finished or checkpoint is not None)
    if finished:
        print(f"{run_dir / 'bundle'} is there: this run is finished; resume=never trains again in the same folder")
        return read_facts(run_dir / "bundle").provenance["metrics"].get(val_name(config.protocol, "abs_rel"))

    module = STAGES[type(config.stage)](config)
    data = DepthDataModule(
        config.data,
        seed=config.seed,
        num_steps=config.trainer.max_steps * config.trainer.accumulate_grad_batches,
        multiple=size_multiple(config.model),
        target_kind=None if isinstance(config.stage, PretrainConfig) else "disparity",
        limit_val=config.trainer.limit_val_batches,
        cache=ShardCache(config.paths),
    )
    trainer = build_trainer(config, callbacks)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    if trainer.global_step < config.trainer.max_steps:
        return None  # stopped early: the checkpoints are there, the bundle comes with the last step
    metrics: dict[str, float] = {}
    if config.data.val and not isinstance(module, PretrainModule):
        (results,) = trainer.validate(module, data, verbose=False)
        metrics = dict(results)
    if trainer.is_global_zero:
        write_bundle(config, module, metrics)
    trainer.strategy.barrier("bundle")
    return metrics.get(val_name(config.protocol, "abs_rel"))


# --- modules ---------------------------------------------------------------------------------------------------------


def build_pretrain(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, PretrainConfig)
    encoder = build_encoder(config.model)
    assert isinstance(encoder, PlainEncoder)
    return PretrainModule(encoder, config.stage, config.optim, seed=config.seed)


def build_teacher(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, TeacherConfig)
    return TeacherModule(build_initialised_model(config), config.stage, config.optim, config.protocol)


def build_student(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, StudentConfig)
    model = build_initialised_model(config)
    frozen_encoder = copy.deepcopy(model.encoder) if config.stage.feature_weight > 0 else None
    return StudentModule(model, frozen_encoder, config.stage, config.optim, config.protocol)


STAGES = {PretrainConfig: build_pretrain, TeacherConfig: build_teacher, StudentConfig: build_student}


def build_initialised_model(config: TrainConfig) -> DepthModel:
    """The model with a fresh decoder and the encoder weights that the stage starts from."""
    weights = config.stage.encoder_weights
    model = build_model(config.model, pretrained_encoder=weights == "timm")
    if weights not in (None, "timm"):
        load_encoder_weights(model.encoder, Path(str(weights)))
    return model


# --- trainer ---------------------------------------------------------------------------------------------------------


def build_trainer(config: TrainConfig, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """The Trainer of the config. Steps are its only clock: one "epoch" is the whole run."""
    run_dir = Path(config.run_dir)
    loggers: list[Logger] = [hydra.utils.instantiate(logger) for logger in config.logger.values()]
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    for logger in loggers:
        logger.log_hyperparams(settings)  # type: ignore[arg-type]
    arguments = asdict(config.trainer)
    interval = arguments.pop("val_check_interval") or config.trainer.max_steps + 1
    arguments.pop("limit_val_batches")  # counted in images per data set, by the data module
    return hydra.utils.instantiate(
        arguments,
        _convert_="all",
        logger=loggers,
        callbacks=[
            QuarantineMonitor(run_dir / "quarantine", max_fraction=config.data.quarantine_budget),
            *([RichProgressBar(leave=True)] if config.trainer.enable_progress_bar else []),
            *(hydra.utils.instantiate(callback) for callback in config.callbacks.values()),
            *callbacks,
        ],
        plugins=[AtomicCheckpointIO()],
        max_epochs=1,
        val_check_interval=interval * config.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


# --- files of a run --------------------------------------------------------------------------------------------------


def set_aside(run_dir: Path) -> None:
    """Move the results of earlier runs in this folder to `before-N`, where no later start takes them for its own."""
    old = [path for path in (run_dir / "bundle", run_dir / "checkpoints") if path.is_dir()]
    if old and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder = run_dir / f"before-{1 + len(list(run_dir.glob('before-*')))}"
        folder.mkdir()
        for path in old:
            path.rename(folder / path.name)


def resume_point(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, by `config.resume`."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_checkpoint(Path(config.run_dir) / "checkpoints")
    path = Path(config.resume)
    if not path.exists():
        raise ConfigError(f"resume={config.resume}: no such checkpoint; give auto, never or the path of one")
    return path


def keep_settings(config: TrainConfig, path: Path, *, resumed: bool) -> None:
    """Write the settings of the run down; ConfigError if it goes on from a checkpoint that others made."""
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    if resumed and path.exists():
        before, now = flatten(OmegaConf.load(path)), flatten(OmegaConf.create(settings))
        different = [
            f"{key}: was {before.get(key)}, is {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_DIFFER_ON_RESUME)
        ]
        if different:
            raise ConfigError(
                f"{path.parent} holds a run with other settings:\n  " + "\n  ".join(different) + "\n"
                "Choose another run_name, or resume=never to start over in the same folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(settings.encode())


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if OmegaConf.is_dict(value) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def write_bundle(config: TrainConfig, module: L.LightningModule, metrics: dict[str, float]) -> None:
    """The stage's result: model, settings, and where it comes from."""
    assert isinstance(module, PretrainModule | DepthModule)
    result = module.encoder if isinstance(module, PretrainModule) else module.model
    data, teachers = provenance_of_data(config, ("labeled", "unlabeled"))
    facts = BundleFacts(
        content="encoder" if isinstance(module, PretrainModule) else "depth_model",
        model=config.model,
        kind="disparity",
        short_side=min(config.data.crop_size),
        provenance={
            "stage": config.stage.name,
            "run_name": config.run_name,
            "seed": config.seed,
            "steps": config.trainer.max_steps,
            "num_parameters": sum(parameter.numel() for parameter in result.parameters()),
            "data": data,
            "teachers": teachers,
            "encoder_weights": provenance_of_encoder(config),
            "hyperparameters": hyperparameters(config),
            "validation": provenance_of_data(config, ("val",))[0] if metrics else {},
            "metrics": metrics,
            "versions": {"depthkit": depthkit.__version__, **{name: version(name) for name in ("torch", "timm")}},
        },
    )
    save_bundle(Path(config.run_dir) / "bundle", result, facts)


def provenance_of_data(
    config: TrainConfig, streams: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Two dictionaries. `STREAM.NAME` -> name, digest and licence of a data set, and the teacher of its pseudo-labels;
    sha256 of each teacher -> name and stated licence of all that it was made from, empty if the labels do not say it.
    """
    rows: dict[str, dict[str, Any]] = {}
    teachers: dict[str, dict[str, str]] = {}
    for stream in streams:
        for name, dataset in getattr(config.data, stream).items():
            manifest = load_manifest(dataset.manifest)
            row = {
                "name": manifest.name,
                "split": manifest.split,
                "num_images": manifest.num_samples,
                "source": manifest.source,
                "digest": manifest.digest(),
                "licence": manifest.licence,
            }
            if dataset.labels is not None:
                labels = load_manifest(dataset.labels)
                row["labels_digest"] = labels.digest()
                row["labels_licence"] = labels.licence
                row["teacher_sha256"] = labels.labels_of.teacher_sha256 if labels.labels_of else ""
                if labels.labels_of:
                    teachers[labels.labels_of.teacher_sha256] = labels.labels_of.teacher_licences or {}
            rows[f"{stream}.{name}"] = row
    return rows, teachers


def provenance_of_encoder(config: TrainConfig) -> dict[str, Any] | None:
    """Name, hash and stated licences of the weights that the encoder started from; None for random ones."""
    weights = config.stage.encoder_weights
    if weights is None:
        return None
    if weights == "timm":
        published = timm.get_pretrained_cfg(config.model.encoder)
        name = f"timm {published.architecture}.{published.tag}"
        return {"name": name, "sha256": "", "sources": {name: published.license or NOT_STATED}}
    facts = read_facts(Path(weights))
    name = facts.provenance.get("run_name") or facts.provenance.get("source") or Path(weights).name
    return {"name": name, "sha256": facts.sha256, "sources": stated_licences(facts.provenance)}


def hyperparameters(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """The settings that make the recipe, by group, as plain values."""
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    images = {stream: count for stream, count in config.data.images_per_step().items() if count}
    return {
        "stage": {name: value for name, value in settings["stage"].items() if name not in ("name", "encoder_weights")},
        "optim": settings["optim"],
        "batch": {
            "images": images,
            "crop_size": settings["data"]["crop_size"],
            "accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        },
        "augment": settings["data"]["augment"],
        "numerics": {name: settings["trainer"][name] for name in ("precision", "gradient_clip_val")},
    }
