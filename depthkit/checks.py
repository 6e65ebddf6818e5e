"""What settings say together. Everything here is judged before a job is queued; no sample is opened."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from depthkit.config import (
    ConfigError,
    DataConfig,
    DatasetConfig,
    DPTConfig,
    ModelConfig,
    PretrainConfig,
    PseudoLabelConfig,
    StudentConfig,
    SupervisedConfig,
    TeacherConfig,
    TrainConfig,
    TransferMode,
    VideoConfig,
    check,
)
from depthkit.data.clips import check_clips, clip_span, num_clips, runs_of
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.reader import labels_manifest, selected_samples, usable_target
from depthkit.data.remote import is_remote
from depthkit.evaluation.settings import Aggregation, GroundTruth, kind_refusal
from depthkit.metric_checks import check_metric
from depthkit.trainer_checks import check_trainer, zero_stage
from depthkit.types import Kind

if TYPE_CHECKING:
    from depthkit.models import Encoder


def validate(config: TrainConfig, pending: Collection[str] = ()) -> None:
    """Raise `ConfigError` for the first combination of settings that cannot work, with both values in the message.

    Label sets whose manifests, and bundles whose folders are in `pending` are still to be written and not looked at.
    """
    check_trainer(config.trainer, config.stage)
    if isinstance(config.stage, PseudoLabelConfig):
        return
    check_streams(config)
    check_model(config)
    check_transfer(config)
    check_normals(config)
    check_metric(config)
    check_sizes(config)
    check_steps(config)
    kind = config.stage.target_kind
    for group, datasets in (("labeled", config.data.labeled), ("unlabeled", config.data.unlabeled)):
        for name, dataset in datasets.items():
            check_dataset(f"data.{group}.{name}", dataset, None if dataset.labels in pending else kind)
    for name, dataset in config.data.val.items():
        check_dataset(f"data.val.{name}", dataset, "depth")
    check_video(config)
    check_validation(config)
    check_protocol(config)
    check_warmup(config)
    check_pareto(config)
    check_averaging(config)
    check_best(config)
    from depthkit.start import check_start  # with torch, for which a command that checks no stage does not wait

    check_start(config, pending)


def check_streams(config: TrainConfig) -> None:
    """The data sets fit the stage, and a batch can be split over the ranks."""
    labeled, unlabeled = list(config.data.labeled), list(config.data.unlabeled)
    stage, clip_frames, reads_clips = config.stage.name, config.data.clip_frames, config.stage.reads_clips
    needs = (
        f"at least 2: stage={stage} learns from clips" if reads_clips else f"null: stage={stage} reads single images"
    )
    check(reads_clips == (clip_frames is not None), "data.clip_frames", clip_frames, needs)
    if isinstance(config.stage, PretrainConfig | StudentConfig) or reads_clips:
        check(bool(unlabeled), "data.unlabeled", unlabeled, f"at least one data set for stage={stage}")
    else:
        check(bool(labeled), "data.labeled", labeled, f"at least one data set for stage={stage}")
        check(not unlabeled, "data.unlabeled", unlabeled, f"empty: stage={stage} does not read it")
    if isinstance(config.stage, PretrainConfig) or reads_clips:
        check(not labeled, "data.labeled", labeled, f"empty: stage={stage} reads images alone, from data.unlabeled")
    for name in ("devices", "num_nodes"):
        count = getattr(config.trainer, name)
        check(count > 0, f"trainer.{name}", count, "a number > 0: batches are split over the ranks")
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
    multiple = size_multiple(config.model)
    for side in config.data.crop_size:
        allowed = f"positive multiples of {multiple}, as model {config.model.title} needs"
        check(side > 0 and side % multiple == 0, "data.crop_size", list(config.data.crop_size), allowed)
    augment = config.data.augment
    elongation = max(config.data.crop_size) / min(config.data.crop_size)
    fits = augment.cutmix_area[1] * max(1.0, elongation * augment.cutmix_aspect) < 1
    allowed = f"such that the largest box fits into a crop of {list(config.data.crop_size)}, or no box is ever found"
    check(augment.cutmix == 0 or fits, "data.augment.cutmix_area", list(augment.cutmix_area), allowed)


def check_steps(config: TrainConfig) -> None:
    both = f"trainer.max_steps={config.trainer.max_steps} and sweeps={config.sweeps}"
    if (config.trainer.max_steps > 0) == (config.sweeps is not None):
        raise ConfigError(f"{both}: give one of the two, the number of optimizer steps or of passes over the data")
    if config.sweeps is not None:
        check(config.sweeps > 0, "sweeps", config.sweeps, "> 0")


def check_warmup(config: TrainConfig) -> None:
    """The rate reaches its peak, also where `sweeps` sets the number of steps."""
    steps, warmup = num_steps(config), config.optim.warmup_steps
    source = f"trainer.max_steps={steps}" if config.sweeps is None else f"{steps}, the steps of sweeps={config.sweeps}"
    check(warmup < steps, "optim.warmup_steps", warmup, f"below {source}")


def check_pareto(config: TrainConfig) -> None:
    """Each rank has the gradient of each data set, whole and in numbers that do not underflow."""
    if not isinstance(config.stage, TeacherConfig) or not config.stage.pareto:
        return
    names = list(config.data.labeled)
    check(config.data.balanced, "data.balanced", config.data.balanced, "true with stage.pareto=true")
    check(len(names) > 1, "data.labeled", names, "two data sets or more with stage.pareto=true: it weighs their losses")
    world_size = config.trainer.devices * config.trainer.num_nodes
    allowed = f"a multiple of {len(names)} data sets x {world_size} ranks with stage.pareto=true"
    is_multiple = config.data.batch_size % (len(names) * world_size) == 0
    check(is_multiple, "data.batch_size", config.data.batch_size, allowed)
    precision, strategy = config.trainer.precision, config.trainer.strategy
    check(precision != "16-mixed", "trainer.precision", precision, "32-true or bf16-mixed with stage.pareto=true")
    check(strategy != "deepspeed", "trainer.strategy", strategy, "auto or ddp with stage.pareto=true")


def check_averaging(config: TrainConfig) -> None:
    """Every rank has all weights to average."""
    allowed = "null with ZeRO stage 3, which spreads the weights over the ranks; stages 1 and 2 can average them"
    decay = config.optim.ema_decay
    check(decay is None or zero_stage(config.trainer) < 3, "optim.ema_decay", decay, allowed)


def check_best(config: TrainConfig) -> None:
    """The metric of the best checkpoint is measured."""
    metric = (config.callbacks.get("checkpoint") or {}).get("best_metric")
    allowed = f"one of protocol.metrics={list(config.protocol.metrics)}"
    check(metric is None or metric in config.protocol.metrics, "callbacks.checkpoint.best_metric", metric, allowed)


def check_dataset(field_name: str, dataset: DatasetConfig, kind: Kind | None) -> None:
    """The manifest is there (or can be rendered) and its labels can give `kind`; None for a stage that reads none."""
    if not is_remote(dataset.manifest) and not Path(dataset.manifest).is_file():
        if dataset.world is None:
            raise ConfigError(
                f"{field_name}.manifest={dataset.manifest}: no such file; `depthkit pack` writes manifests"
            )
        return
    images = load_manifest(dataset.manifest)
    if kind is not None:
        usable_target(labels_manifest(dataset, images), field_name, kind, dataset.depth_range)
    if dataset.selection is not None:
        selected_samples(dataset, images, labels_manifest(dataset, images))


def check_video(config: TrainConfig) -> None:
    """The data sets whose samples are clips hold video."""
    data, val_clips = config.data, list(config.data.val_clips)
    if isinstance(config.stage, VideoConfig):
        length, seen = data.val_clip_frames, data.clip_frames or 0
        allowed = f"at least data.clip_frames={seen}, which the ego-motion network sees at a time"
        check(not val_clips or length >= seen, "data.val_clip_frames", length, allowed)
    check(data.clip_frames is not None or not val_clips, "data.val_clips", val_clips, "empty without data.clip_frames")
    for group, num_frames in (("unlabeled", data.clip_frames), ("val_clips", data.val_clip_frames)):
        datasets: Mapping[str, DatasetConfig] = getattr(data, group) if num_frames is not None else {}
        for name, dataset in datasets.items():
            check_dataset(f"data.{group}.{name}", dataset, None)
            check_clips(f"data.{group}.{name}", dataset, found_manifest(dataset), num_frames or 0, data.clip_stride)


def check_validation(config: TrainConfig) -> None:
    """Every rank has something to validate; Lightning fails in the middle of a run on one that has not."""
    limit = config.trainer.limit_val_batches
    images = [num_images(dataset) for dataset in config.data.val.values()]
    length = {"num_frames": config.data.val_clip_frames, "stride": config.data.clip_stride}
    for dataset in config.data.val_clips.values():
        runs = runs_of(dataset, found_manifest(dataset))
        images.append(int(num_clips(runs, **length, every=clip_span(**length)).sum()))
    total = sum(count if limit is None else min(count, limit) for count in images)
    world_size = config.trainer.devices * config.trainer.num_nodes
    allowed = f"such that the {total} validation images are at least one for each of {world_size} ranks"
    check(not images or total >= world_size, "trainer.limit_val_batches", limit, allowed)


def check_protocol(config: TrainConfig) -> None:
    """The protocol can judge what the stage learns, by image, as validation meets it: whole images, seen once."""
    protocol = config.protocol
    if not config.data.val:
        return
    plain = {"ground_truth": GroundTruth.depth, "window": None, "flip": False, "aggregation": Aggregation.images}
    for name, usual in plain.items():
        allowed = f"{usual!r} in training; `depthkit evaluate` knows the others"
        check(getattr(protocol, name) == usual, f"protocol.{name}", getattr(protocol, name), allowed)
    learned = config.model.kind if config.stage.reads_clips else config.stage.target_kind or "disparity"
    if reason := kind_refusal(protocol, learned, config.model.unit if config.stage.reads_clips else "metres"):
        raise ConfigError(reason)
    if protocol.datasets is None:
        return
    for name, dataset in config.data.val.items():
        if is_remote(dataset.manifest) or Path(dataset.manifest).is_file():
            found = load_manifest(dataset.manifest).name
            allowed = f"null, or among them {found}, the data set of data.val.{name}"
            check(found in protocol.datasets, "protocol.datasets", protocol.datasets, allowed)


def check_model(config: TrainConfig) -> None:
    """The stage can train the model."""
    from depthkit.models import PlainEncoder

    kind = config.stage.target_kind or "disparity"
    largest = "metres, the largest depth that it predicts" if kind == "depth" else "null"
    other = "choose another model, such as model=vits"
    cure = f"max_depth must be {largest}, or {other}" if type(config.model) is DPTConfig else other
    if config.model.kind != kind and not config.stage.reads_clips:
        raise ConfigError(
            f"model.max_depth={config.model.max_depth}: {config.model.title} predicts {config.model.kind}, and "
            f"stage={config.stage.name} learns {kind}; {cure}"
        )
    if config.stage.encoder_weights == "timm":
        is_of_timm = isinstance(config.model, DPTConfig)
        allowed = f"a bundle or null: {config.model.title} is not in timm"
        check(is_of_timm, "stage.encoder_weights", config.stage.encoder_weights, allowed)
    if isinstance(config.stage, PretrainConfig):
        is_plain = isinstance(describe_encoder(config.model), PlainEncoder)
        allowed = "a vision transformer with class token and learned positions for stage=pretrain: it hides patches"
        check(is_plain, "model", config.model.title, allowed)
    if config.trainer.activation_checkpointing and (error := checkpointing_refusal(config.model)):
        reason = f"no part of its encoder can be run again in the backward pass ({error})"
        raise ConfigError(f"trainer.activation_checkpointing=True and model {config.model.title}: {reason}") from error


def checkpointing_refusal(model: ModelConfig) -> Exception | None:
    """Why the blocks of the encoder cannot be run again in the backward pass, as timm says it; None where they can."""
    try:
        describe_encoder(model).checkpoint_activations()
    except (AttributeError, AssertionError) as error:
        return error
    return None


def check_normals(config: TrainConfig) -> None:
    """Normals follow from labels whose shape is known, which disparity up to a shift does not tell."""
    if not isinstance(config.stage, SupervisedConfig) or not config.stage.normals:
        return
    check(bool(config.data.labeled), "data.labeled", [], "at least one data set with stage.normals=true")
    for name, dataset in config.data.labeled.items():
        if is_remote(dataset.manifest) or Path(dataset.manifest).is_file():
            images = load_manifest(dataset.manifest)
            target = labels_manifest(dataset, images).target
            allowed = f"false: the labels of data.labeled.{name} ({images.name}) have no unit"
            check(target is None or target.metric, "stage.normals", True, allowed)


def check_transfer(config: TrainConfig) -> None:
    """What is not trained comes from weights that were, and the encoder has the blocks that are asked for."""
    mode = config.transfer.mode
    if mode is TransferMode.full:
        return
    is_pretrain = isinstance(config.stage, PretrainConfig)
    check(not is_pretrain, "transfer.mode", mode.value, "full with stage=pretrain: it trains the encoder")
    allowed = f"timm or a bundle with transfer.mode={mode.value}: random weights that stay as they are teach nothing"
    check(config.stage.encoder_weights is not None, "stage.encoder_weights", None, allowed)
    from depthkit.transfer import apply_to_encoder

    apply_to_encoder(describe_encoder(config.model), config.transfer)


def size_multiple(model: ModelConfig) -> int:
    """Pixels: sides of the encoder's input are multiples of it."""
    return describe_encoder(model).multiple


def describe_encoder(model: ModelConfig) -> "Encoder":
    """The encoder without memory for its weights; ConfigError where it cannot be built or takes one image size only."""
    import torch  # a command that checks no model does not wait for it

    from depthkit.models import build_encoder, build_model

    with torch.device("meta"):
        try:
            encoder = build_encoder(model) if isinstance(model, DPTConfig) else build_model(model).encoder
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for height, width in ((2, 3), (3, 2), (5, 5)):
            size = (height * encoder.multiple, width * encoder.multiple)
            try:
                encoder(torch.empty(2, 3, *size))
            except (RuntimeError, AssertionError) as error:
                reason = f"{error}; depth needs an encoder for images of any size"
                raise ConfigError(f"model {model.title} does not take an image of {size}: {reason}") from error
    return encoder


def num_steps(config: TrainConfig, count: Callable[[DatasetConfig], int] | None = None) -> int:
    """Optimizer steps: `max_steps`, or as many as `sweeps` passes take over the unlabeled (else the labeled) images.

    `count` gives the images of a data set; without it the manifests do. Clips count as images do.
    """
    if config.sweeps is None:
        return config.trainer.max_steps
    stream = "unlabeled" if config.data.unlabeled else "labeled"
    group: Mapping[str, DatasetConfig] = getattr(config.data, stream)
    counted = count or partial(num_samples, config.data, stream)
    images = sum(dataset.weight * counted(dataset) for dataset in group.values())
    per_step = config.data.images_per_step()[stream] * config.trainer.accumulate_grad_batches
    return max(1, round(config.sweeps * images / per_step))


def num_samples(data: DataConfig, stream: str, dataset: DatasetConfig) -> int:
    """Images, or clips, that one sweep of a stream takes from a data set of weight 1."""
    if stream == "unlabeled" and data.clip_frames is not None:
        return int(num_clips(runs_of(dataset, found_manifest(dataset)), data.clip_frames, data.clip_stride).sum())
    return num_images(dataset)


def found_manifest(dataset: DatasetConfig) -> Manifest | None:
    """The manifest, None where it will be rendered."""
    is_there = is_remote(dataset.manifest) or Path(dataset.manifest).is_file()
    return load_manifest(dataset.manifest) if is_there else None


def num_images(dataset: DatasetConfig) -> int:
    if dataset.world is not None and not Path(dataset.manifest).is_file():
        return dataset.world.num_images
    images = load_manifest(dataset.manifest)
    if dataset.selection is not None:
        return sum(map(len, selected_samples(dataset, images, labels_manifest(dataset, images))))
    return images.num_samples
