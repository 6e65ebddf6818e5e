"""Broken samples during training: written down, counted, bounded."""

from pathlib import Path
from typing import Any

import lightning as L

from depthkit.data.quarantine import Quarantine
from depthkit.types import Batch, Rejection


class QuarantineMonitor(L.Callback):
    """Records what the loader rejected, into one file for each rank, logs how many of each data set, and stops the run
    beyond the budget."""

    def __init__(self, folder: Path, *, max_fraction: float) -> None:
        self.folder = folder
        self.max_fraction = max_fraction
        self.quarantine: Quarantine | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.quarantine is None:
            path = self.folder / f"rank-{trainer.global_rank:05d}.jsonl"
            self.quarantine = Quarantine(path, max_fraction=self.max_fraction)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: dict[str, Batch], batch_idx: int
    ) -> None:
        assert self.quarantine is not None
        for part in batch.values():
            self.quarantine.record(len(part["key"]), part["rejections"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.quarantine is not None
        is_due = (batch_idx + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if is_due and self.quarantine.num_rejected:
            counts = {f"quarantine/{dataset}": float(count) for dataset, count in self.quarantine.counts().items()}
            for logger in trainer.loggers:
                logger.log_metrics(counts, step=trainer.global_step)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch | Rejection, batch_idx: int, *_: Any
    ) -> None:
        assert self.quarantine is not None
        if isinstance(batch, Rejection):
            self.quarantine.record(0, [batch])
        else:
            self.quarantine.record(len(batch["key"]), [])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.quarantine is not None and self.quarantine.num_rejected:
            L.pytorch.utilities.rank_zero_warn(self.quarantine.summary())
