"""The Trainer of a run: strategy, precision, callbacks and loggers from the settings; and how its model is run."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import hydra
import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from depthkit.config import TrainConfig, TrainerConfig
from depthkit.models import Encoder
from depthkit.provenance import run_facts
from depthkit.runtime.averaging import WeightAverage
from depthkit.runtime.checkpoint import AtomicCheckpointIO, RunFacts
from depthkit.runtime.quarantine import QuarantineMonitor
from depthkit.runtime.requeue import Requeue, slurm_environment
from depthkit.runtime.seeding import SeedBatches
from depthkit.stages.base import DepthModule


def build_trainer(config: TrainConfig, callbacks: Sequence[L.Callback]) -> L.Trainer:
    """The Trainer of the config. Steps are its only clock: one "epoch" is the whole run."""
    run_dir = Path(config.run_dir)
    loggers: list[Logger] = [hydra.utils.instantiate(logger) for logger in config.logger.values()]
    settings = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    for logger in loggers:
        logger.log_hyperparams(settings)  # type: ignore[arg-type]
    arguments = asdict(config.trainer)
    interval = arguments.pop("val_check_interval") or config.trainer.max_steps + 1
    for name in ("zero_stage", "offload", "deepspeed_config", "activation_checkpointing", "compile", "channels_last"):
        arguments.pop(name)  # not Lightning's
    if config.trainer.strategy == "deepspeed":
        from depthkit.runtime.deepspeed_strategy import build_deepspeed

        world_size = config.trainer.devices * config.trainer.num_nodes
        arguments["strategy"] = build_deepspeed(config.trainer, images_per_rank=config.data.batch_size // world_size)
        arguments["precision"] = "32-true"  # of the weights; DeepSpeed has the autocast
    arguments.pop("limit_val_batches")  # counted in images per data set, by the data module
    return hydra.utils.instantiate(
        arguments,
        _convert_="all",
        logger=loggers,
        callbacks=[
            RunFacts(partial(run_facts, config)),
            SeedBatches(config.seed),
            QuarantineMonitor(run_dir / "quarantine", max_fraction=config.data.quarantine_budget),
            *(hydra.utils.instantiate(callback) for callback in config.callbacks.values()),
            *callbacks,
            # After those that draw what a validation saw: it then puts the weights back.
            *([WeightAverage(config.optim.ema_decay)] if config.optim.ema_decay is not None else []),
            Requeue(),  # after those that checkpoint
        ],
        plugins=[AtomicCheckpointIO(), *slurm_environment()],
        max_epochs=1,
        val_check_interval=interval * config.trainer.accumulate_grad_batches,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


def bare_trainer(trainer: TrainerConfig, accelerator: str) -> L.Trainer:
    """A Trainer that runs nothing and writes nowhere: the device and the autocast of single steps outside of a run."""
    return L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=trainer.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def prepare_model(module: L.LightningModule, trainer: TrainerConfig) -> None:
    """Recomputation, memory format and compilation as asked for. Names and values of the weights stay what they are."""
    model = module.model if isinstance(module, DepthModule) else None
    if trainer.activation_checkpointing:
        encoder: Encoder = model.encoder if model else module.encoder  # type: ignore[assignment]
        encoder.checkpoint_activations()
    if model and trainer.channels_last:
        model.decoder.to(memory_format=torch.channels_last)
    if model and trainer.compile:
        model.compile()
