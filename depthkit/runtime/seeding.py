"""Random numbers of a run that do not depend on how often it was interrupted."""

import random
from typing import Any

import lightning as L
import numpy as np
import torch


class SeedBatches(L.Callback):
    """Seeds Python, NumPy and torch on every device from (seed, number of the batch, rank) before each training batch.

    What the model draws, such as dropout and drop path, is then a function of the same three, as the batch itself is,
    and a run that goes on from a checkpoint needs no state of a generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        (seed,) = np.random.SeedSequence((self.seed, batch_idx, trainer.global_rank)).generate_state(1).tolist()
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (what others draw from it)
        torch.manual_seed(seed)
