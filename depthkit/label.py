"""`depthkit label bundle=TEACHER images=MANIFEST out=DIR`: pseudo-labels for every image of a data set.

Any number of processes may run this at once on one `out`, on one machine or on many that share the folder: each takes
shards that no other one works on, and those of processes that died. Whoever finds all of them done writes the manifest.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader

import depthkit
from depthkit.bundle import load_model, sha256
from depthkit.config import ConfigError, PseudoLabelConfig, TrainConfig
from depthkit.data.cache import ShardCache
from depthkit.data.claims import Claims
from depthkit.data.datamodule import single_thread
from depthkit.data.label_images import ImageChunks, full_batches
from depthkit.data.labeling import LabelShards
from depthkit.data.manifest import LabelSettings, LabelsOf, load_manifest
from depthkit.data.quarantine import QuarantineBudgetExceeded
from depthkit.data.read_ahead import Prefetcher
from depthkit.data.remote import root_of
from depthkit.data.shards import ShardReader
from depthkit.ensembling import Views
from depthkit.formats.sky import load_sky_model
from depthkit.hydra_entry import hydra_main
from depthkit.licences import stated_licences
from depthkit.runtime.quiet import keep_back_noise
from depthkit.runtime.tracking import track_labels
from depthkit.stages.pseudo_label import PseudoLabelModule, WriteLabels

SHORT_KEYS = ("bundle", "images", "out", "verify")
"""Settings of the stage that this verb takes without their prefix."""
CLAIMS = ".claims"
MAX_PAUSE = 5.0
"""Seconds between two looks at the shards that others work on."""


def main(argv: list[str]) -> int:
    return hydra_main("label", as_stage_settings(argv), label, config_name="train")


def as_stage_settings(overrides: Sequence[str]) -> list[str]:
    """`bundle=`, `images=`, `out=` as settings of the stage, which is `pseudo_label` unless an experiment says so."""
    settings = [f"stage.{item}" if item.split("=")[0] in SHORT_KEYS else item for item in overrides]
    is_given = any(item.startswith(("stage=", "experiment=")) for item in settings)
    return settings if is_given else [*settings, "stage=pseudo_label"]


def label(config: TrainConfig) -> Path:
    """Label what is not labeled yet; returns the path of the label set's manifest.

    Done shards are kept, so a run that was stopped is started again with the same command. `trainer.devices` processes
    are started here, unless torchrun or srun started several on this machine; they do not talk to each other.
    """
    if not isinstance(config.stage, PseudoLabelConfig):
        raise ConfigError(f"stage.name={config.stage.name!r}: labelling needs stage=pseudo_label")
    if config.trainer.devices > 1 and not is_one_of_several():
        return start_processes(config, config.trainer.devices)
    return label_in_this_process(config, config.stage)


def is_one_of_several() -> bool:
    """Whether torchrun, or srun with several tasks on this machine, started this process."""
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return "LOCAL_RANK" in os.environ or (tasks is not None and int(tasks[0]) > 1)


def local_rank() -> int:
    """The number of this process among those that one command started on this machine."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


# --- several processes -----------------------------------------------------------------------------------------------


def start_processes(config: TrainConfig, count: int) -> Path:
    """Label with `count` processes; ChildProcessError when none of them could finish the set."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_child, args=(config, rank)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if all(codes):
        raise ChildProcessError(f"all of {count} processes failed (exit codes {codes}); what they said stands above")
    if any(codes):
        print(f"{sum(map(bool, codes))} of {count} processes failed (exit codes {codes}); the others did their work")
    return Path(config.stage.out) / "manifest.json"  # type: ignore[attr-defined]


def _child(config: TrainConfig, rank: int) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    keep_back_noise()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        label(config)
    except (ValueError, OSError, QuarantineBudgetExceeded) as error:
        print(f"depthkit label: process {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


# --- one process -----------------------------------------------------------------------------------------------------


def label_in_this_process(config: TrainConfig, stage: PseudoLabelConfig) -> Path:
    reader = ShardReader(load_manifest(stage.images), root_of(stage.images), ShardCache(config.paths))
    model, facts = load_model(Path(stage.bundle))
    if facts.kind != "disparity":
        raise ConfigError(f"stage.bundle={stage.bundle} predicts {facts.kind}; pseudo-labels need a model of disparity")
    short_side, multiple = stage.short_side or facts.short_side, model.encoder.multiple
    views = Views(stage.flip, tuple(stage.scales))
    origin = LabelsOf(
        images=reader.manifest.name,
        images_digest=reader.manifest.digest(),
        teacher_sha256=facts.sha256,
        settings=LabelSettings(
            short_side=short_side,
            precision=config.trainer.precision,
            flip=views.flip,
            scales=views.scales,
            sky_model=sha256(Path(stage.sky_model)) if stage.sky_model else "",
            sky_class=stage.sky_class if stage.sky_model else None,
        ),
        code_version=depthkit.__version__,
        teacher_licences=stated_licences(facts.provenance),
    )
    find_sky = load_sky_model(Path(stage.sky_model), device_of(config), stage.sky_class) if stage.sky_model else None
    module = PseudoLabelModule(
        model, mean=facts.mean, std=facts.std, views=views, find_sky=find_sky, compile=stage.compile
    )
    chunks = ImageChunks(reader, short_side=short_side, multiple=multiple)
    claims = Claims(Path(stage.out) / CLAIMS, timeout=stage.claim_timeout)
    shards = LabelShards(Path(stage.out), reader, origin, claims, max_rejected=config.data.quarantine_budget)
    writer = WriteLabels(shards, num_threads=stage.num_writers)
    with claims:
        try:
            if stage.verify and local_rank() == 0:
                verify(shards, stage.num_writers)
            seconds = label_until_done(config, stage, shards, chunks, module, writer)
        finally:
            writer.close()
            shards.abandon()
    print(f"{shards.manifest_path}: {reader.manifest.num_samples} images. {summary(shards, writer, seconds)}")
    if local_rank() == 0:
        track_labels(config, stage.bundle, stage.images, str(shards.manifest_path))
    return shards.manifest_path


def summary(shards: LabelShards, writer: WriteLabels, seconds: float) -> str:
    """What this process did: how much, how fast, and how long it did not wait for the teacher."""
    done = f"{shards.num_written} of {len(shards.names)} shards written in this process"
    if not writer.num_images:
        return done
    idle = max(0.0, 1 - writer.forward_seconds / seconds)
    return f"{done}: {writer.num_images / seconds:.1f} images/s, {idle:.0%} of the time not in the forward pass"


def label_until_done(
    config: TrainConfig,
    stage: PseudoLabelConfig,
    shards: LabelShards,
    chunks: ImageChunks,
    module: PseudoLabelModule,
    writer: WriteLabels,
) -> float:
    """Label what is free until the manifest is written, by this or another process; seconds spent labelling."""
    trainer, prefetcher = build_trainer(config, writer), Prefetcher()
    seconds = 0.0
    while not shards.finish():
        if not shards.free():
            time.sleep(min(MAX_PAUSE, stage.claim_timeout / 4))
            continue
        loader = DataLoader(
            chunks,
            batch_size=None,
            sampler=claimed_chunks(shards, stage.batch_size, prefetcher),
            num_workers=stage.num_workers,
            worker_init_fn=single_thread if stage.num_workers else None,
        )
        start = time.perf_counter()
        batches = full_batches(loader, stage.batch_size, accept=shards.accept)
        trainer.predict(module, batches, return_predictions=False)
        seconds += time.perf_counter() - start
    return seconds


def claimed_chunks(shards: LabelShards, size: int, prefetcher: Prefetcher) -> Iterator[tuple[int, int, int]]:
    """(shard, first sample, end) of pieces of `size` samples; a shard is claimed when the loader gets to it.

    The one that this process will probably claim next, should it be remote, is fetched meanwhile: another process may
    get it first, which is rare and costs a download.
    """
    while (shard := shards.take()) is not None:
        if (upcoming := shards.upcoming()) is not None:
            prefetcher.request(shards.images, upcoming, needed_at=0)
        count = shards.images.manifest.shards[shard].num_samples
        for first in range(0, count, size):
            yield shard, first, min(first + size, count)


def verify(shards: LabelShards, num_threads: int) -> None:
    pending = set(shards.pending())
    finished = [shard for shard in range(len(shards.names)) if shard not in pending]
    with ThreadPoolExecutor(num_threads) as pool:
        num_good = sum(pool.map(shards.verify, finished))
    print(f"{shards.folder}: {num_good} of {len(finished)} finished label shards are whole")


def device_of(config: TrainConfig) -> torch.device:
    """The GPU of this process if it is to use one; else the CPU."""
    has_gpus = config.trainer.accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    return torch.device("cuda", local_rank() % torch.cuda.device_count()) if has_gpus else torch.device("cpu")


def build_trainer(config: TrainConfig, writer: WriteLabels) -> L.Trainer:
    """A trainer of this process alone, whatever else Slurm or torchrun started."""
    shows_progress = config.trainer.enable_progress_bar and local_rank() == 0
    device = device_of(config)
    return L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1 if device.index is None else [device.index],
        precision=config.trainer.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()],
        logger=False,
        callbacks=[writer, *([RichProgressBar()] if shows_progress else [])],
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
