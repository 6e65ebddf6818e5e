"""Tracking by wandb: one id for all continuations of a run, and what it was made from and made as artifacts."""

import json
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from depthkit.config import TrainConfig
from depthkit.data.manifest import load_manifest
from depthkit.files import atomic_write

RUN_ID = "wandb_run_id"
"""File in the run's folder."""


def wandb_logger(run_dir: str, **arguments: Any) -> WandbLogger:
    """Lightning's logger with the run id of the folder, so that a continued or requeued run goes on in the same one.

    Runs whose folders lie in one folder form a group, unless `group` says otherwise.
    """
    folder = Path(run_dir)
    arguments["group"] = arguments.get("group") or folder.resolve().parent.name
    return WandbLogger(save_dir=run_dir, id=run_id(folder), resume="allow", **arguments)


def run_id(folder: Path) -> str | None:
    """The id in `folder`, made and kept there by the first rank; the one that `wandb agent` gives goes first."""
    if "WANDB_RUN_ID" in os.environ:
        return None  # wandb reads it itself
    path = folder / RUN_ID
    if not path.exists() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    return path.read_text() if path.exists() else None


class Lineage(L.Callback):
    """Connects a run to what it reads and writes in the graph of artifacts; does nothing without a wandb logger.

    Artifacts are told apart by their content, so the bundle that one run writes and another reads are one node,
    whichever machine they run on. Manifests stand for data sets and label sets: they hold the sha256 of every shard,
    and no shard is uploaded.
    """

    def __init__(self, bundle: Path, manifests: Sequence[str], bundles: Sequence[str]) -> None:
        self.bundle = bundle
        self.manifests = manifests
        self.bundles = bundles

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for run in runs(trainer):
            run.define_metric("samples_seen")
            run.define_metric("*", step_metric="samples_seen", step_sync=True, overwrite=True)
            use(run, [*map(manifest_artifact, self.manifests), *map(bundle_artifact, self.bundles)])

    def finish(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        for run in runs(trainer):
            run.summary.update(dict(metrics))
            run.log_artifact(bundle_artifact(str(self.bundle)), aliases=["latest", "best"])
            run.finish()  # the next run of this process, as in a sweep, is another one

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step < trainer.max_steps:
            for run in runs(trainer):
                run.finish()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        for run in runs(trainer):
            run.finish(exit_code=1)


def track_labels(config: TrainConfig, bundle: str, images: str, labels: str) -> None:
    """A run of the labelling stage, where a wandb logger is asked for: teacher and images in, label set out."""
    for settings in config.logger.values():
        if settings["_target_"] == f"{__name__}.{wandb_logger.__name__}":
            run = hydra.utils.instantiate(settings).experiment
            run.config.update(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
            use(run, [bundle_artifact(bundle), manifest_artifact(images)])
            run.log_artifact(manifest_artifact(labels), aliases=["latest"])
            run.finish()


def runs(trainer: L.Trainer) -> list[Any]:
    """The wandb runs of the first rank; none elsewhere."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    return [logger.experiment for logger in loggers] if trainer.is_global_zero else []


def use(run: Any, artifacts: Sequence[Any]) -> None:
    """Mark artifacts as inputs of a run, online and offline."""
    for artifact in artifacts:
        if run.offline:
            # `use_artifact` wants a server; this is what it does with a new artifact, and `wandb sync` sends it later.
            run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
        else:
            run.use_artifact(artifact)


def bundle_artifact(folder: str) -> Any:
    """The files of a bundle, named after the run that made it."""
    import wandb

    facts = json.loads((Path(folder) / "model.json").read_text())
    name = facts["provenance"].get("run_name") or Path(folder).resolve().parent.name
    artifact = wandb.Artifact(artifact_name(name), type="model", metadata={"sha256": facts["sha256"], "path": folder})
    artifact.add_dir(folder, policy="immutable", skip_cache=True)
    return artifact


def manifest_artifact(path: str) -> Any:
    """The manifest of a data set, or of a label set, which names its teacher and its images."""
    import wandb

    manifest = load_manifest(path)
    kind = "dataset" if manifest.labels_of is None else "labels"
    metadata = {"path": path, "num_samples": manifest.num_samples, "digest": manifest.digest()}
    if manifest.labels_of is not None:
        metadata |= asdict(manifest.labels_of)
    artifact = wandb.Artifact(artifact_name(manifest.name, manifest.split, kind), type=kind, metadata=metadata)
    with artifact.new_file("manifest.json") as file:
        json.dump(asdict(manifest), file, indent=1, sort_keys=True)
    return artifact


def artifact_name(*words: str) -> str:
    return "-".join(re.sub(r"[^\w.-]+", "-", word) for word in words if word)
