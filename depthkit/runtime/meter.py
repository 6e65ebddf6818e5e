"""What a run measures of itself: one row of numbers for every logging interval, the same for all who show them."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from depthkit.config import DataConfig
from depthkit.runtime.loss_means import LossMeans
from depthkit.runtime.throughput import DataWait, Usage, peak_memory_gib
from depthkit.types import Batch, StepOutput


class Meter(L.Callback):
    """Logs once in `log_every_n_steps` steps, over the interval and over all ranks: the mean losses, learning rates,
    images per second, the share of time spent waiting for data, peak memory, and what the run has used; after each
    validation its metrics. Ranks exchange one small vector per interval, and nothing waits for the device in between.

    `row` keeps the newest numbers. `used` is what earlier starts of the run have used, `batch_flops` what one batch
    over all ranks needs, `peak_flops` what one device does per second; None where it is not known.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        used: Usage,
        batch_flops: float | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.losses = LossMeans({"labeled": list(data.labeled), "unlabeled": list(data.unlabeled)})
        self.images_per_batch = sum(data.images_per_step().values())
        self.wait = DataWait()
        self.batch_flops = batch_flops
        self.peak_flops = peak_flops
        self.row: dict[str, float] = {}
        self.usage = replace(used, starts=used.starts + 1)
        self._before = used
        self._start = time.perf_counter()
        self._first: tuple[float, int] | None = None  # when the first step of this process was done, and which it was
        self._interval = Interval()
        self._rates: dict[str, float] = {}
        self._validated: tuple[int, dict[str, float]] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        trainer.profiler = self.wait  # type: ignore[attr-defined]

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interval = Interval(start=time.perf_counter(), waited=self.wait.seconds)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._rates = learning_rates(trainer)  # of this step: when it ends, those of the next one are set

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: StepOutput,  # type: ignore[override]
        batch: dict[str, Batch],
        batch_idx: int,
    ) -> None:
        self._interval.batches += 1
        image_losses = outputs.get("image_losses", {}) if outputs else {}
        # Not `outputs["loss"]`, which is divided by the number of batches in a step.
        self.losses.add(trainer.callback_metrics["loss"], image_losses, batch)
        if self._first is None and trainer.global_step:
            self._first = time.perf_counter(), trainer.global_step
        every = trainer.log_every_n_steps * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        if (batch_idx + 1) % every == 0 or trainer.global_step == trainer.max_steps:
            self._report(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_interval(self.wait.seconds - self._interval.waited, trainer.world_size)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interval.pause = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interval.start += time.perf_counter() - self._interval.pause
        metrics = val_metrics(trainer)
        is_new = (trainer.global_step, metrics) != self._validated  # the last step is validated again for the bundle
        self._validated = trainer.global_step, metrics
        if metrics and is_new:
            log(trainer, metrics | {"samples_seen": samples_seen(trainer)})

    # --- what others read --------------------------------------------------------------------------------------------

    def seconds_left(self, trainer: L.Trainer) -> float | None:
        """Until `max_steps`, at the rate of this process with all its validations; None before the second step."""
        if self._first is None or trainer.global_step <= self._first[1]:
            return None
        since, step = self._first
        rate = (time.perf_counter() - since) / (trainer.global_step - step)
        return (trainer.max_steps - trainer.global_step) * rate

    def usage_now(self, processes: int) -> Usage:
        seconds = time.perf_counter() - self._start
        return replace(
            self.usage,
            seconds=self._before.seconds + seconds,
            device_seconds=self._before.device_seconds + seconds * processes,
        )

    # --- one interval ------------------------------------------------------------------------------------------------

    def _report(self, trainer: L.Trainer) -> None:
        device = trainer.strategy.root_device
        own = [*self.losses.sums(), self.wait.seconds - self._interval.waited, peak_memory_gib(device)]
        gathered = trainer.strategy.all_gather(torch.tensor(own, device=device)).view(trainer.world_size, -1).tolist()
        *sums, waited, _ = (sum(column) for column in zip(*gathered, strict=True))
        rates = self._close_interval(waited / trainer.world_size, trainer.world_size).rates()
        left = self.seconds_left(trainer) or 0.0
        usage = self.usage_now(trainer.world_size).hours(device, left, trainer.world_size)
        memory = {"peak_memory_gib" if device.type == "cuda" else "peak_host_memory_gib": max(g[-1] for g in gathered)}
        self.row = {
            **self.losses.means(sums),
            **self._rates,
            "samples_seen": samples_seen(trainer),
            **{f"throughput/{name}": value for name, value in (rates | memory | usage).items()},
        }
        log(trainer, self.row)

    def _close_interval(self, waited: float, processes: int) -> Usage:
        """Add the interval to the usage and begin the next one; the usage of the interval alone."""
        now, interval = time.perf_counter(), self._interval
        self._interval = Interval(start=now, waited=self.wait.seconds)
        seconds = now - interval.start
        part = Usage(training_seconds=seconds, waited_seconds=waited, images=interval.batches * self.images_per_batch)
        if self.batch_flops and self.peak_flops:
            part.flops = interval.batches * self.batch_flops
            part.peak_flops = seconds * processes * self.peak_flops
        for name in ("training_seconds", "waited_seconds", "images", "flops", "peak_flops"):
            setattr(self.usage, name, getattr(self.usage, name) + getattr(part, name))
        return part


class Interval:
    """Where a logging interval began; a validation moves the start on by the time it took."""

    def __init__(self, start: float = 0.0, waited: float = 0.0) -> None:
        self.start = start
        self.waited = waited
        self.batches = 0
        self.pause = start


def learning_rates(trainer: L.Trainer) -> dict[str, float]:
    """`lr/GROUP` of each parameter group."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {f"lr/{group.get('name', number)}": float(group["lr"]) for number, group in enumerate(groups)}


def samples_seen(trainer: L.Trainer) -> int:
    """Images of all streams and ranks that went into the weights: the x-axis of everything."""
    images = sum(trainer.datamodule.config.images_per_step().values())  # type: ignore[attr-defined]
    return int(trainer.global_step * trainer.accumulate_grad_batches * images)


def val_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The newest metrics of a validation, `val/PROTOCOL/METRIC`."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def log(trainer: L.Trainer, metrics: Mapping[str, Any]) -> None:
    """Hand numbers of the steps done so far to all loggers, and have those that buffer write them to disk."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()
