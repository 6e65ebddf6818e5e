"""How fast a run is, and what it waits for."""

import time
from typing import Any

import lightning as L
import torch

from depthkit.types import Batch


class ThroughputMonitor(L.Callback):
    """Logs over each logging interval: images per second over all ranks, the share of time spent waiting for data, and
    the accelerator's peak memory in GiB. Nothing here waits for the accelerator, so single steps are not timed.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._waiting_since = 0.0
        self._waited = 0.0
        self._num_images = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Batch], batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._waiting_since
        self._num_images += sum(len(part["key"]) for part in batch.values())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            seconds = time.perf_counter() - self._start
            values = {
                "throughput/images_per_second": self._num_images * trainer.world_size / seconds,
                "throughput/data_wait": self._waited / seconds,
            }
            if torch.cuda.is_available():
                values["throughput/peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
            self._restart()
        self._waiting_since = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start = self._waiting_since = time.perf_counter()
        self._waited = 0.0
        self._num_images = 0
