"""A training step outside of a run: the real module of a stage on random images, without a Trainer."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch.utils.checkpoint import checkpoint

from depthkit.config import PretrainConfig, TrainConfig
from depthkit.train import STAGES
from depthkit.types import Batch


def bare_module(config: TrainConfig) -> L.LightningModule:
    """The stage's module with random weights, whose `training_step` can be called by itself: it logs nowhere."""
    config = replace(config, stage=replace(config.stage, encoder_weights=None))
    module = STAGES[type(config.stage)](config)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0)  # type: ignore[assignment]
    module.log = module.log_dict = _log_nowhere  # type: ignore[method-assign]
    if config.trainer.activation_checkpointing:
        checkpoint_blocks(module)
    return module.train()


def checkpoint_blocks(module: L.LightningModule) -> None:
    """Blocks of the trained encoder keep their input alone and are computed again in the backward pass."""
    for name, blocks in module.named_modules():
        if name.split(".")[-1] in ("blocks", "stages") and not name.startswith("frozen_encoder"):
            for block in blocks.children():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _log_nowhere(*args: Any, **kwargs: Any) -> None:
    """What a module logs comes here."""


def smallest_batch(config: TrainConfig) -> dict[str, int]:
    """Images of each stream in the smallest batch of one device that the settings allow; larger ones are multiples."""
    streams = {name for name, count in config.data.images_per_step().items() if count}
    both = streams == {"labeled", "unlabeled"}
    parts = {name: config.data.unlabeled_per_labeled if both and name == "unlabeled" else 1 for name in sorted(streams)}
    pairs = 2 if config.data.augment.cutmix and parts.get("unlabeled", 0) % 2 else 1  # CutMix pairs neighbours
    return {name: pairs * count for name, count in parts.items()}


def random_batch(config: TrainConfig, images: dict[str, int], device: torch.device) -> dict[str, Batch]:
    """A batch as the data module gives it, with `images` of each stream, on `device`."""
    return {name: _random_part(config, name, count, device) for name, count in images.items()}


def _random_part(config: TrainConfig, stream: str, count: int, device: torch.device) -> Batch:
    height, width = config.data.crop_size
    part: dict[str, Any] = {"image": torch.rand(count, 3, height, width, device=device)}
    if not isinstance(config.stage, PretrainConfig):
        part["target"] = torch.rand(count, height, width, device=device)
        part["valid_mask"] = torch.ones(count, height, width, dtype=torch.bool, device=device)
        if stream == "unlabeled" and config.data.augment.cutmix:
            part["cutmix_region"] = torch.rand(count, height, width, device=device) < 0.2
    return part  # type: ignore[return-value]
