"""What settings say together. Everything here is judged before a job is queued; no sample is opened."""

import re
from collections.abc import Mapping
from pathlib import Path

from depthkit.config import (
    ConfigError,
    DatasetConfig,
    ModelConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    TrainConfig,
    check,
)
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.reader import check_labels_belong, usable_target


def validate(config: TrainConfig) -> None:
    """Raise `ConfigError` for the first combination of settings that cannot work, with both values in the message."""
    if isinstance(config.stage, PseudoLabelConfig):
        return
    check_streams(config)
    check_sizes(config)
    check_steps(config)
    for group, datasets in (("labeled", config.data.labeled), ("unlabeled", config.data.unlabeled)):
        for name, dataset in datasets.items():
            check_dataset(f"data.{group}.{name}", dataset, reads_labels=not isinstance(config.stage, PretrainConfig))
    for name, dataset in config.data.val.items():
        check_dataset(f"data.val.{name}", dataset, reads_labels=True)
    check_validation(config)


def check_streams(config: TrainConfig) -> None:
    """The data sets fit the stage, and a batch can be split over the ranks."""
    labeled, unlabeled = list(config.data.labeled), list(config.data.unlabeled)
    stage = config.stage.name
    if isinstance(config.stage, PretrainConfig | StudentConfig):
        check(bool(unlabeled), "data.unlabeled", unlabeled, f"at least one data set for stage={stage}")
    else:
        check(bool(labeled), "data.labeled", labeled, f"at least one data set for stage={stage}")
        check(not unlabeled, "data.unlabeled", unlabeled, f"empty: stage={stage} does not read it")
    if isinstance(config.stage, PretrainConfig):
        check(not labeled, "data.labeled", labeled, "empty: stage=pretrain reads images alone, from data.unlabeled")
    world_size = config.trainer.devices * config.trainer.num_nodes
    for name, count in config.data.images_per_step().items():
        allowed = (
            f"such that its {count} {name} images split evenly over {world_size} ranks "
            "(trainer.devices x trainer.num_nodes)"
        )
        check(count % world_size == 0, "data.batch_size", config.data.batch_size, allowed)
    per_rank = config.data.images_per_step()["unlabeled"] // world_size
    if config.data.augment.cutmix:
        check(
            per_rank % 2 == 0,
            "data.batch_size",
            config.data.batch_size,
            f"such that {per_rank} unlabeled images per rank are an even number: CutMix pairs neighbours",
        )


def check_sizes(config: TrainConfig) -> None:
    patch = patch_size(config.model)
    for side in config.data.crop_size:
        allowed = f"positive multiples of {patch}, the patch size of model.encoder={config.model.encoder}"
        check(side > 0 and side % patch == 0, "data.crop_size", list(config.data.crop_size), allowed)


def check_steps(config: TrainConfig) -> None:
    both = f"trainer.max_steps={config.trainer.max_steps} and sweeps={config.sweeps}"
    if (config.trainer.max_steps > 0) == (config.sweeps is not None):
        raise ConfigError(f"{both}: give one of the two, the number of optimizer steps or of passes over the data")
    if config.sweeps is not None:
        check(config.sweeps > 0, "sweeps", config.sweeps, "> 0")
    steps = config.trainer.max_steps
    allowed = f"below trainer.max_steps={steps}"
    check(steps <= 0 or config.optim.warmup_steps < steps, "optim.warmup_steps", config.optim.warmup_steps, allowed)


def check_dataset(field_name: str, dataset: DatasetConfig, *, reads_labels: bool) -> None:
    """The manifest is there (or can be rendered) and holds what the stage reads."""
    path = Path(dataset.manifest)
    if not path.is_file():
        if dataset.world is None:
            raise ConfigError(
                f"{field_name}.manifest={dataset.manifest}: no such file; `depthkit pack` writes manifests"
            )
        return
    if reads_labels:
        images = load_manifest(path)
        usable_target(labels_manifest(dataset, images), field_name, "disparity")


def labels_manifest(dataset: DatasetConfig, images: Manifest) -> Manifest:
    """The manifest that holds the labels: the images' own, or that of their pseudo-labels."""
    if dataset.labels is None:
        return images
    path = Path(dataset.labels)
    if not path.is_file():
        raise ConfigError(f"labels={dataset.labels}: no such file; `depthkit label` writes it when all shards are done")
    labels = load_manifest(path)
    check_labels_belong(labels, images, path, Path(dataset.manifest))
    return labels


def check_validation(config: TrainConfig) -> None:
    """Every rank has something to validate; Lightning fails in the middle of a run on one that has not."""
    limit = config.trainer.limit_val_batches
    images = [num_images(dataset) for dataset in config.data.val.values()]
    total = sum(count if limit is None else min(count, limit) for count in images)
    world_size = config.trainer.devices * config.trainer.num_nodes
    allowed = f"such that the {total} validation images are at least one for each of {world_size} ranks"
    check(not images or total >= world_size, "trainer.limit_val_batches", limit, allowed)


def patch_size(model: ModelConfig) -> int:
    """Pixels on a side of a patch, from `encoder_args` or the timm name, without building the model."""
    if "patch_size" in model.encoder_args:
        return int(model.encoder_args["patch_size"])
    found = re.search(r"patch(\d+)", model.encoder)
    if found is None:
        raise ConfigError(
            f"model.encoder={model.encoder}: its name shows no patch size; give model.encoder_args.patch_size"
        )
    return int(found[1])


def num_steps(config: TrainConfig) -> int:
    """Optimizer steps: `max_steps`, or as many as `sweeps` passes take over the unlabeled (else the labeled) images."""
    if config.sweeps is None:
        return config.trainer.max_steps
    stream = "unlabeled" if config.data.unlabeled else "labeled"
    group: Mapping[str, DatasetConfig] = getattr(config.data, stream)
    images = sum(dataset.weight * num_images(dataset) for dataset in group.values())
    per_step = config.data.images_per_step()[stream] * config.trainer.accumulate_grad_batches
    return max(1, round(config.sweeps * images / per_step))


def num_images(dataset: DatasetConfig) -> int:
    path = Path(dataset.manifest)
    if not path.is_file() and dataset.world is not None:
        return dataset.world.num_images
    return load_manifest(path).num_samples
