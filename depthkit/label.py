"""`depthkit label bundle=TEACHER images=MANIFEST out=DIR`: pseudo-labels for every image of a data set."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

import depthkit
from depthkit.bundle import load_model
from depthkit.config import ConfigError, PseudoLabelConfig, TrainConfig
from depthkit.data.datamodule import single_thread
from depthkit.data.labeling import ImageChunks, LabelShards
from depthkit.data.manifest import LabelsOf, load_manifest
from depthkit.hydra_entry import hydra_main
from depthkit.licences import stated_licences
from depthkit.stages.pseudo_label import PseudoLabelModule, WriteLabels

SHORT_KEYS = ("bundle", "images", "out")
"""Settings of the stage that this verb takes without their prefix."""


def main(argv: list[str]) -> int:
    return hydra_main("label", as_stage_settings(argv), label, config_name="train")


def as_stage_settings(overrides: Sequence[str]) -> list[str]:
    """`bundle=`, `images=`, `out=` as settings of the stage, which is `pseudo_label` unless an experiment says so."""
    settings = [f"stage.{item}" if item.split("=")[0] in SHORT_KEYS else item for item in overrides]
    is_given = any(item.startswith(("stage=", "experiment=")) for item in settings)
    return settings if is_given else [*settings, "stage=pseudo_label"]


def label(config: TrainConfig) -> Path:
    """Label what is not labeled yet; returns the path of the label set's manifest.

    Done shards are kept, so a run that was stopped is started again with the same command. With several ranks each
    takes every n-th pending shard.
    """
    stage = config.stage
    if not isinstance(stage, PseudoLabelConfig):
        raise ConfigError(f"stage.name={stage.name!r}: labelling needs stage=pseudo_label")
    images_path = Path(stage.images)
    images = load_manifest(images_path)
    model, facts = load_model(Path(stage.bundle))
    if facts.kind != "disparity":
        raise ConfigError(f"stage.bundle={stage.bundle} predicts {facts.kind}; pseudo-labels need a model of disparity")
    short_side = stage.short_side or facts.short_side
    origin = LabelsOf(
        images=images.name,
        images_digest=images.digest(),
        teacher_sha256=facts.sha256,
        resolution=f"shorter side {short_side} px, aspect kept, sides multiples of {model.encoder.multiple}",
        code_version=depthkit.__version__,
        teacher_licences=stated_licences(facts.provenance),
    )
    shards = LabelShards(Path(stage.out), images, origin)
    writer = WriteLabels(shards, max_rejected=config.data.quarantine_budget)
    trainer = L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        strategy=config.trainer.strategy,
        precision=config.trainer.precision,  # type: ignore[arg-type]
        logger=False,
        callbacks=[writer, *([RichProgressBar()] if config.trainer.enable_progress_bar else [])],
        enable_progress_bar=config.trainer.enable_progress_bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    pending = shards.pending()
    chunks = ImageChunks(
        images_path,
        pending[trainer.global_rank :: trainer.world_size],
        chunk_size=stage.batch_size,
        short_side=short_side,
        multiple=model.encoder.multiple,
    )
    if pending:
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=stage.num_workers,
            worker_init_fn=single_thread if stage.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        with shards:
            trainer.predict(PseudoLabelModule(model, mean=facts.mean, std=facts.std), loader, return_predictions=False)
    trainer.strategy.barrier("labels")
    if trainer.is_global_zero:
        done = f"{len(pending)} of {len(images.shards)} shards written in this run"
        print(f"{shards.finish()}: {images.num_samples} images, {done}")
    return shards.manifest_path
