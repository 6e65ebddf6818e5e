"""What a plan adds up, each figure with where it comes from: images, steps, FLOPs, time, disk."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from depthkit.checks import check_steps, num_images, num_steps
from depthkit.config import ConfigError, DatasetConfig, TrainConfig
from depthkit.data.facts import known_datasets, load_facts
from depthkit.data.manifest import load_manifest
from depthkit.data.remote import is_remote
from depthkit.hardware import find_device, peak_tflops
from depthkit.planning.memory import Counts
from depthkit.planning.settings import PlanConfig

LABEL_BYTES = 596_731
"""Of a pseudo-label with a shorter side of 518 px, measured: docs/label-storage.md."""
CORE_RATES = {"labeled": 74.3, "unlabeled": 86.1}
"""Images/s that one core loads at 960 x 1280 px, measured: docs/benchmarks.md."""
IMAGE_ASPECT = 4 / 3
"""Longer side over shorter side of an image that is labeled whole. Assumed."""


class Figure(NamedTuple):
    """One line of a plan. `value` None: not known. `basis`: set | counted | published | measured | assumed | computed,
    the weakest of what went into it; `source` says what that is."""

    name: str
    value: float | None
    unit: str
    basis: str
    source: str = ""


class Images(NamedTuple):
    """How many images a data set has and what they take on disk, with the basis of both."""

    number: int
    basis: str
    bytes: float
    bytes_basis: str


def images_of(dataset: DatasetConfig, config: PlanConfig) -> Images | None:
    """From the manifest where there is one, else from the published facts; None where neither is known."""
    manifest = dataset.manifest
    if not is_remote(manifest) and Path(manifest).is_file():
        count = num_images(dataset)
        return Images(count, "counted", sum(shard.num_bytes for shard in load_manifest(manifest).shards), "counted")
    if dataset.world is not None:
        height, width = dataset.world.size
        return Images(dataset.world.num_images, "set", 3.0 * height * width * dataset.world.num_images, "assumed")
    published = published_images(manifest)
    if published is None:
        return None
    return Images(published, "published", published * config.image_kb * 1e3, "assumed")


def published_images(manifest: str) -> int | None:
    """Images of the training split of the public data set that lies in the folder of `manifest`, as published."""
    name = manifest.rstrip("/").split("/")[-2] if "/" in manifest else manifest
    if name not in known_datasets():
        return None
    split = load_facts(name).splits.get("train")
    return None if split is None else split.images


def weakest(bases: Iterable[str]) -> str:
    """Of several bases the one that says least."""
    order = ["set", "counted", "measured", "published", "assumed"]
    return max(bases, key=order.index, default="set")


# --- steps -----------------------------------------------------------------------------------------------------------


def steps_of(config: PlanConfig) -> Figure:
    """Optimizer steps of the run, without any data set that `trainer.max_steps` makes unnecessary."""
    check_steps(config)
    if config.sweeps is None:
        return Figure("optimizer steps", config.trainer.max_steps, "", "set", "trainer.max_steps")
    basis = "set"

    def number_of(dataset: DatasetConfig) -> int:
        nonlocal basis
        images = images_of(dataset, config)
        if images is None:
            raise ConfigError(
                f"manifest={dataset.manifest}: no such file, and no published number of images by the name of its "
                f"folder; with sweeps={config.sweeps} the steps are not known: pack it, or give sweeps=null and "
                "trainer.max_steps"
            )
        basis = weakest([basis, images.basis])
        return images.number

    steps = num_steps(config, number_of)
    return Figure("optimizer steps", steps, "", basis, f"sweeps={config.sweeps:g} over the images")


def images_per_step(config: TrainConfig) -> int:
    return sum(config.data.images_per_step().values()) * config.trainer.accumulate_grad_batches


# --- time ------------------------------------------------------------------------------------------------------------


def rate_of(config: PlanConfig, flops_per_image: float) -> Figure:
    """Images/s of one device: measured and given, else from the peak rate and an assumed share of it."""
    name = "images/s of a device"
    if config.images_per_second is not None:
        return Figure(name, config.images_per_second, "", "measured", "images_per_second, as given")
    peak = peak_tflops(config.cluster.device, config.trainer.precision)
    if peak is None:
        source = f"no peak rate for {config.cluster.device} in {config.trainer.precision}; give images_per_second="
        return Figure(name, None, "", "assumed", source)
    source = f"{config.mfu:.0%} of {peak:g} TFLOP/s (mfu={config.mfu:g}; peak from the data sheet)"
    return Figure(name, config.mfu * peak * 1e12 / flops_per_image, "", "assumed", source)


def time_figures(config: PlanConfig, images: float, flops_per_image: float) -> list[Figure]:
    """GPU-hours and days for `images` passes, and the cores that load them fast enough."""
    rate = rate_of(config, flops_per_image)
    world_size = config.trainer.devices * config.trainer.num_nodes
    hours = None if rate.value is None else images / rate.value / 3600
    days = None if hours is None else hours / 24 / world_size
    return [
        Figure("FLOPs in all", images * flops_per_image, "FLOP", "counted"),
        rate,
        Figure("device-hours", hours, "h", rate.basis, "without validation and checkpoints"),
        Figure("days on the cluster", days, "d", rate.basis, f"{world_size} devices, no loss by communication"),
    ]


def loader_figure(config: PlanConfig, rate: Figure) -> Figure:
    """Cores of a node that keep its devices fed."""
    per_step = config.data.images_per_step()
    seconds = sum(count / CORE_RATES[name] for name, count in per_step.items()) / sum(per_step.values())
    cores = None if rate.value is None else rate.value * seconds * config.trainer.devices
    rates = " and ".join(f"{rate} {name}" for name, rate in CORE_RATES.items())
    source = f"one core loads {rates} images/s of 960 x 1280 (docs/benchmarks.md)"
    basis = weakest(["measured", rate.basis])
    return Figure("loader cores per node", None if cores is None else math.ceil(cores), "", basis, source)


def precision_trouble(config: PlanConfig) -> list[str]:
    """A device that has no unit for the precision."""
    device = find_device(config.cluster.device)
    if device is None or device.bf16 is not None or not config.trainer.precision.startswith("bf16"):
        return []
    return [f"{config.cluster.device} does not compute in bfloat16: trainer.precision=16-mixed"]


# --- disk ------------------------------------------------------------------------------------------------------------


def label_bytes(short_side: int) -> float:
    """Bytes of a pseudo-label, in proportion to its area."""
    return LABEL_BYTES * (short_side / 518) ** 2


def shards_figure(datasets: Iterable[DatasetConfig], config: PlanConfig) -> Figure:
    sets = [images_of(dataset, config) for dataset in datasets]
    known = [each for each in sets if each is not None]
    basis = weakest(each.bytes_basis for each in known)
    source = f"{config.image_kb:g} kB an image where nothing is packed yet (image_kb)" if basis == "assumed" else ""
    if len(known) < len(sets):
        return Figure("image shards", None, "B", basis, f"{len(sets) - len(known)} data sets of unknown size")
    return Figure("image shards", sum(each.bytes for each in known), "B", basis, source)


def labels_figure(images: Images | None, short_side: int) -> Figure:
    """What the labels of `images` take; the bytes of one are measured, the number of images has its own basis."""
    source = f"{label_bytes(short_side):,.0f} B a label of shorter side {short_side}, measured (docs/label-storage.md)"
    total = None if images is None else images.number * label_bytes(short_side)
    return Figure("pseudo-labels", total, "B", weakest(["measured", images.basis if images else "set"]), source)


def sum_of(sets: Iterable[Images | None]) -> Images | None:
    """Several data sets together; None if one is not known."""
    known = list(sets)
    if None in known or not known:
        return None
    images = [each for each in known if each is not None]
    return Images(
        sum(each.number for each in images),
        weakest(each.basis for each in images),
        sum(each.bytes for each in images),
        weakest(each.bytes_basis for each in images),
    )


def checkpoints_figure(config: PlanConfig, counts: Counts) -> Figure:
    """Checkpoints that are kept at a time and the one being written: weights, two moments, EMA."""
    one = 4.0 * (counts.all + 2 * counts.trained + counts.ema)
    kept = int(config.callbacks.get("checkpoint", {}).get("keep", 2)) + 2
    source = f"{kept} x {one / 1e9:.1f} GB: the newest, the best, the one being written"
    return Figure("checkpoints", kept * one, "B", "counted", source)
