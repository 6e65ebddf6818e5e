"""A stage's network and batches, to run steps of training as often as one likes: no Trainer, nothing is written."""

import copy
import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from depthkit.checks import num_steps
from depthkit.config import TrainConfig
from depthkit.engine import bare_trainer, prepare_model
from depthkit.runtime.seeding import SeedBatches
from depthkit.train import build_data, build_module
from depthkit.types import Batch

WARMUP_SHARE = 0.1
"""Of the steps of `Bench.train`: the rate rises, as Adam's first steps are its largest."""

Batches = dict[str, Batch]
"""Of one step, by stream."""


class Bench:
    """The module as training would begin with it, on the device that the settings name, and the batches of one rank."""

    def __init__(self, config: TrainConfig) -> None:
        L.seed_everything(config.seed, workers=True, verbose=False)
        config.trainer.max_steps = num_steps(config)
        config.trainer.compile = False
        config.data.num_workers = 0
        self.config = config
        self.world_size = config.trainer.devices * config.trainer.num_nodes
        self.data = build_data(config)
        self.data.prepare_data()
        trainer = bare_trainer(config.trainer, config.trainer.accelerator)
        self.context = trainer.precision_plugin.train_step_context
        self.module = build_module(config)
        prepare_model(self.module, config.trainer)
        self.module.to(trainer.strategy.root_device).train()
        self.module.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=0, world_size=self.world_size, max_steps=config.trainer.max_steps, global_step=0
        )
        self.module.log = self.module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
        self.module.on_fit_start()
        self.start = copy.deepcopy(self.module.state_dict())

    def batches(self) -> Iterator[tuple[dict[str, Tensor], Batches]]:
        """Step by step: the images (B, 3, H, W) uint8 of each stream, and the batch as the loader gives it."""
        for loaded in self.data.train_loader(world_size=self.world_size):
            yield {stream: part["image"] for stream, part in loaded.items()}, loaded

    def on_device(self, loaded: Mapping[str, Batch]) -> Batches:
        """A loaded batch as the training step gets it; `loaded` stays as it is."""
        copied = {stream: {**part} for stream, part in loaded.items()}
        return self.data.on_after_batch_transfer(self.data.transfer_batch_to_device(copied, self.module.device, 0), 0)

    def loss(self, batch: Batches) -> Tensor:
        """The loss of the first step on a batch."""
        given: Any = {stream: {**part} for stream, part in batch.items()}
        SeedBatches(self.config.seed).on_train_batch_start(self.module.trainer, self.module, given, 0)
        with self.context():
            result: Any = self.module.training_step(given, 0)
        return result if isinstance(result, Tensor) else result["loss"]

    def train(self, batch: Batches, *, steps: int, factor: float = 1.0) -> Iterator[float]:
        """Train from the start on one batch, at `factor` times the rates of the settings; the loss before each step,
        and after the last. It ends with the first loss that is not finite."""
        self.module.load_state_dict(self.start)
        optimizer = self.optimizer()
        peaks = [group.get("max_lr", group["initial_lr"]) * factor for group in optimizer.param_groups]
        rising = max(1, round(WARMUP_SHARE * steps))
        for step in range(steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, (step + 1) / rising)
            loss = self.loss(batch)
            yield (value := float(loss.detach()))
            if not math.isfinite(value):
                return
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            if clip := self.config.trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(self.module.parameters(), clip)
            optimizer.step()
        with torch.no_grad():
            yield float(self.loss(batch))

    def optimizer(self) -> Any:
        configured: Any = self.module.configure_optimizers()
        return configured["optimizer"]
