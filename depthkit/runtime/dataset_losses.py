"""How each data set of a mix is learned."""

from collections import defaultdict

import lightning as L
import torch
from torch import Tensor

from depthkit.types import Batch, StepOutput

STREAMS = {"labeled": "labeled", "unlabeled": "unlabeled", "feature": "unlabeled"}
"""Part of the loss -> the stream whose images it is computed on."""


class DatasetLosses(L.Callback):
    """Logs over each logging interval the mean of each part of the loss over the images of each data set, as
    `loss/PART/DATASET`; of this process's images alone. The values stay on the device until then.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._datasets: dict[str, list[str]] = defaultdict(list)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: StepOutput,  # type: ignore[override]
        batch: dict[str, Batch],
        batch_idx: int,
    ) -> None:
        for part, values in outputs.get("image_losses", {}).items():
            self._values[part].append(values)
            self._datasets[part] += batch[STREAMS[part]]["dataset"]
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            means = self._means()
            for logger in trainer.loggers:
                logger.log_metrics(means, step=trainer.global_step)

    def _means(self) -> dict[str, float]:
        """The means since the last call."""
        losses: dict[str, list[float]] = defaultdict(list)
        for part, values in self._values.items():
            for dataset, value in zip(self._datasets[part], torch.cat(values).tolist(), strict=True):
                losses[f"loss/{part}/{dataset}"].append(value)
        self._values.clear()
        self._datasets.clear()
        return {name: sum(values) / len(values) for name, values in losses.items()}
