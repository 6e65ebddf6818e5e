"""What a run was made from: data sets, teachers, encoder weights, settings."""

import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from omegaconf import OmegaConf

import depthkit
from depthkit.bundle import read_facts
from depthkit.config import DPTConfig, TrainConfig, TransferMode
from depthkit.data.manifest import load_manifest
from depthkit.data.remote import is_remote
from depthkit.licences import NOT_STATED, stated_licences


def provenance(config: TrainConfig, metrics: Mapping[str, float]) -> dict[str, Any]:
    """What a bundle says about the run that made it; `num_parameters` comes with the model."""
    data, teachers = provenance_of_data(config, ("labeled", "unlabeled"))
    return {
        "stage": config.stage.name,
        "run_name": config.run_name,
        "seed": config.seed,
        "steps": config.trainer.max_steps,
        "data": data,
        "teachers": teachers,
        "encoder_weights": provenance_of_encoder(config),
        "hyperparameters": hyperparameters(config),
        "validation": provenance_of_data(config, ("val",))[0] if metrics else {},
        "metrics": dict(metrics),
        "versions": versions(),
    }


def run_facts(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint says about its run: all settings, the code, the data, and what a bundle of it would say."""
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    facts = {"config": settings, "versions": versions(), "data": data_digests(config)}
    return facts | {"provenance": provenance(config, {})}


def versions() -> dict[str, str]:
    """Of the packages that make the numbers; in a git checkout also the commit, with `-dirty` where files changed."""
    found = {"depthkit": depthkit.__version__, **{name: version(name) for name in ("torch", "timm")}}
    checkout = Path(depthkit.__file__).parents[1]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60)
            found["commit"] = done.stdout.strip()
    return found


def data_digests(config: TrainConfig) -> dict[str, str]:
    """sha256 of the manifests, labels and selections that training reads, by setting; procedural data sets that are
    not rendered yet are left out."""
    digests = {}
    for stream in ("labeled", "unlabeled"):
        for name, dataset in getattr(config.data, stream).items():
            for kind in ("manifest", "labels"):
                path = getattr(dataset, kind)
                if path is not None and (is_remote(path) or Path(path).is_file()):
                    digests[f"data.{stream}.{name}.{kind}"] = load_manifest(path).digest()
            if dataset.selection is not None:
                digests[f"data.{stream}.{name}.selection"] = sha256(Path(dataset.selection).read_bytes()).hexdigest()
    return digests


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
        assert isinstance(config.model, DPTConfig)  # `checks.check_model`
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
        "transfer": {} if config.transfer.mode is TransferMode.full else settings["transfer"],
        "batch": {
            "images": images,
            "crop_size": settings["data"]["crop_size"],
            "accumulate_grad_batches": config.trainer.accumulate_grad_batches,
        },
        "augment": settings["data"]["augment"],
        "numerics": {name: settings["trainer"][name] for name in ("precision", "gradient_clip_val")},
    }
