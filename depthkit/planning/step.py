"""A training step outside of a run: the real module of a stage on random images, without a Trainer."""

from dataclasses import replace
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import nn

from depthkit.config import PretrainConfig, TrainConfig
from depthkit.engine import prepare_model
from depthkit.train import build_module
from depthkit.types import Batch


def bare_module(config: TrainConfig) -> L.LightningModule:
    """The stage's module with random weights, whose `training_step` can be called by itself: it logs nowhere.

    With activation checkpointing where the settings say so; not compiled."""
    fresh = {"decoder_weights": False, "egomotion_weights": None}
    whole: dict[str, Any] = {name: value for name, value in fresh.items() if hasattr(config.stage, name)}
    config = replace(config, stage=replace(config.stage, encoder_weights=None, **whole))
    module = build_module(config)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0)  # type: ignore[assignment]
    module.log = module.log_dict = _log_nowhere  # type: ignore[method-assign]
    prepare_model(module, replace(config.trainer, compile=False, channels_last=False))
    return module.train()


def frozen_encoder(module: L.LightningModule) -> nn.Module:
    """The encoder that a student is compared with, which is no part of its module; of other stages an empty one."""
    return getattr(module, "frozen_encoder", None) or nn.Module()


def _log_nowhere(*args: Any, **kwargs: Any) -> None:
    """What a module logs comes here."""


def smallest_batch(config: TrainConfig) -> dict[str, int]:
    """Images of each stream in the smallest batch of one device that the settings allow; larger ones are multiples."""
    streams = {name for name, count in config.data.images_per_step().items() if count}
    both = streams == {"labeled", "unlabeled"}
    parts = {name: config.data.unlabeled_per_labeled if both and name == "unlabeled" else 1 for name in sorted(streams)}
    if config.data.balanced:
        parts = {name: count * len(getattr(config.data, name)) for name, count in parts.items()}
    pairs = 2 if config.data.augment.cutmix and parts.get("unlabeled", 0) % 2 else 1  # CutMix pairs neighbours
    return {name: pairs * count for name, count in parts.items()}


def random_batch(config: TrainConfig, images: dict[str, int], device: torch.device) -> dict[str, Batch]:
    """A batch as the data module gives it, with `images` of each stream, on `device`."""
    return {name: _random_part(config, name, count, device) for name, count in images.items()}


def _random_part(config: TrainConfig, stream: str, count: int, device: torch.device) -> Batch:
    height, width = config.data.crop_size
    frames = (config.data.clip_frames,) if stream == "unlabeled" and config.data.clip_frames else ()
    part: dict[str, Any] = {"image": torch.rand(count, *frames, 3, height, width, device=device)}
    part["dataset"] = list(islice(cycle(getattr(config.data, stream)), count))
    part["intrinsics_px"] = torch.full((count, 4), float(width), device=device)
    if not isinstance(config.stage, PretrainConfig):
        part["target"] = torch.rand(count, height, width, device=device)
        part["valid_mask"] = torch.ones(count, height, width, dtype=torch.bool, device=device)
        if stream == "unlabeled" and config.data.augment.cutmix:
            part["cutmix_region"] = torch.rand(count, height, width, device=device) < 0.2
    return part  # type: ignore[return-value]
