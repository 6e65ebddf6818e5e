"""The entry of every stage: compose -> validate -> build -> fit or predict."""

import copy
from collections.abc import Sequence
from pathlib import Path

import lightning as L

from depthkit.bundle import BundleFacts, read_facts, save_bundle
from depthkit.checks import num_steps, size_multiple, validate
from depthkit.config import (
    DPTConfig,
    MetricConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    SupervisedConfig,
    TeacherConfig,
    TrainConfig,
    VideoConfig,
)
from depthkit.data.cache import ShardCache
from depthkit.data.datamodule import DepthDataModule
from depthkit.egomotion_bundle import save_egomotion
from depthkit.engine import build_trainer, prepare_model
from depthkit.hydra_entry import hydra_main
from depthkit.label import label
from depthkit.models import PlainEncoder, build_encoder, num_parameters
from depthkit.provenance import provenance
from depthkit.reporting import reporters
from depthkit.run_folder import enter
from depthkit.runtime.deepspeed_strategy import end_together, whole_weights
from depthkit.runtime.meter import val_metrics
from depthkit.runtime.summary import finish
from depthkit.stages.base import DepthModule, val_name
from depthkit.stages.metric import MetricModule
from depthkit.stages.pretrain import PretrainModule
from depthkit.stages.student import StudentModule
from depthkit.stages.teacher import TeacherModule
from depthkit.stages.video import VideoModule
from depthkit.start import initialised_egomotion, initialised_model
from depthkit.transfer import apply_transfer, merge_adapters


def main(argv: list[str]) -> int:
    return hydra_main("train", argv, run)


def run(config: TrainConfig, callbacks: Sequence[L.Callback] = ()) -> float | None:
    """Run one stage; returns the validation AbsRel (what a sweep minimises), None for a stage without it."""
    validate(config)
    if isinstance(config.stage, PseudoLabelConfig):
        label(config)
        return None
    abs_rel = fit(config, callbacks)
    end_together()
    return abs_rel


def fit(config: TrainConfig, callbacks: Sequence[L.Callback] = ()) -> float | None:
    """Train from the newest checkpoint or from the start, and write the model to `run_dir/bundle`.

    `callbacks` are added to those of the config.
    """
    L.seed_everything(config.seed, workers=True, verbose=False)
    run_dir = Path(config.run_dir)
    config.trainer.max_steps = num_steps(config)
    checkpoint, finished = enter(config)
    if finished:
        print(f"{run_dir / 'bundle'} is there: this run is finished; resume=never trains again in the same folder")
        return read_facts(run_dir / "bundle").provenance["metrics"].get(val_name(config.protocol, "abs_rel"))

    module = build_module(config)
    prepare_model(module, config.trainer)
    data = build_data(config)
    trainer = build_trainer(config, [*reporters(config, module), *callbacks])
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    if trainer.global_step < config.trainer.max_steps:
        return None  # stopped early: the checkpoints are there, the bundle comes with the last step
    metrics: dict[str, float] = {}
    if (config.data.val or config.data.val_clips) and not isinstance(module, PretrainModule):
        trainer.validate(module, data, verbose=False)
        metrics = val_metrics(trainer)
    with whole_weights(module):
        if trainer.is_global_zero:
            write_bundle(config, module, metrics)
        trainer.strategy.barrier("bundle")
    finish(trainer, metrics)
    return metrics.get(val_name(config.protocol, "abs_rel"))


def build_data(config: TrainConfig) -> DepthDataModule:
    return DepthDataModule(
        config.data,
        seed=config.seed,
        num_steps=config.trainer.max_steps * config.trainer.accumulate_grad_batches,
        multiple=size_multiple(config.model),
        target_kind=config.stage.target_kind,
        limit_val=config.trainer.limit_val_batches,
        needs_camera=canonical_focal_px(config) is not None,
        learns_normals=isinstance(config.stage, SupervisedConfig) and config.stage.normals,
        cache=ShardCache(config.paths),
    )


def canonical_focal_px(config: TrainConfig) -> float | None:
    return config.stage.canonical_focal_px if isinstance(config.stage, MetricConfig) else None


# --- modules ---------------------------------------------------------------------------------------------------------


def build_pretrain(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, PretrainConfig)
    assert isinstance(config.model, DPTConfig)
    encoder = build_encoder(config.model)
    assert isinstance(encoder, PlainEncoder)
    return PretrainModule(encoder, config.stage, config.optim, seed=config.seed)


def build_teacher(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, TeacherConfig)
    return TeacherModule(
        initialised_model(config),
        config.stage,
        config.optim,
        config.protocol,
        num_datasets=len(config.data.labeled),
    )


def build_student(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, StudentConfig)
    model = initialised_model(config)
    frozen_encoder = copy.deepcopy(model.encoder) if config.stage.feature_weight > 0 else None
    return StudentModule(model, frozen_encoder, config.stage, config.optim, config.protocol)


def build_metric(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, MetricConfig)
    return MetricModule(initialised_model(config), config.model.max_depth, config.stage, config.optim, config.protocol)


def build_video(config: TrainConfig) -> L.LightningModule:
    assert isinstance(config.stage, VideoConfig)
    model, egomotion = initialised_model(config), initialised_egomotion(config, config.stage)
    return VideoModule(model, egomotion, config.model.kind, config.stage, config.optim, config.protocol)


STAGES = {
    PretrainConfig: build_pretrain,
    TeacherConfig: build_teacher,
    StudentConfig: build_student,
    MetricConfig: build_metric,
    VideoConfig: build_video,
}


def build_module(config: TrainConfig) -> L.LightningModule:
    """The module of the stage as training begins with it: weights loaded, and frozen where the settings say so."""
    module = STAGES[type(config.stage)](config)
    if isinstance(module, DepthModule):
        apply_transfer(module.model, config.transfer)
    return module


def write_bundle(config: TrainConfig, module: L.LightningModule, metrics: dict[str, float]) -> None:
    """The stage's result: model, settings, and where it comes from."""
    assert isinstance(module, PretrainModule | DepthModule)
    result = module.encoder if isinstance(module, PretrainModule) else merge_adapters(module.model, config.transfer)
    facts = BundleFacts(
        content="encoder" if isinstance(module, PretrainModule) else "depth_model",
        model=config.model,
        kind="disparity" if isinstance(module, PretrainModule) else config.model.kind,
        short_side=min(config.data.crop_size),
        canonical_focal_px=canonical_focal_px(config),
        provenance=provenance(config, metrics) | {"num_parameters": num_parameters(result)},
    )
    if isinstance(config.stage, VideoConfig) and isinstance(module, VideoModule):
        save_egomotion(Path(config.run_dir) / "egomotion", module.egomotion, config.stage.egomotion)
    save_bundle(Path(config.run_dir) / "bundle", result, facts)
