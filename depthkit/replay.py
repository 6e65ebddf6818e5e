"""`depthkit replay RUN_DIR --step N`: the samples of one training step, their losses and pictures, and its gradient."""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from depthkit.compose import SCHEMAS
from depthkit.config import ConfigError, TrainConfig
from depthkit.engine import bare_trainer
from depthkit.evaluation.report_pictures import encode
from depthkit.files import atomic_write
from depthkit.runtime.bad_steps import Step
from depthkit.runtime.checkpoint import is_whole, steps_of
from depthkit.runtime.seeding import SeedBatches
from depthkit.settings.model import ARCHITECTURES
from depthkit.train import build_data, build_module
from depthkit.types import Batch, Kind
from depthkit.visualize import PictureRow, Tile, colorize, kind_scale, picture_grid, render, value_range


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="depthkit replay",
        description="Computes one step of a run again, without changing the run: which samples it read, the losses of "
        "each, and whether the gradient is finite. A batch follows from seed and step alone, so any step will do.",
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run, with its config.yaml")
    parser.add_argument("--step", type=int, required=True, help="optimizer steps done before it; the first is 0")
    parser.add_argument(
        "--checkpoint", type=Path, help="weights; default: the checkpoint of the run nearest to the step"
    )
    parser.add_argument("--out", type=Path, help="folder for pictures of the samples; default: none are drawn")
    parser.add_argument("--accelerator", help="cpu, gpu, ...; default: that of the run")
    arguments = parser.parse_args(argv)
    try:
        replay(**vars(arguments))
    except (ValueError, OSError) as error:
        print(f"depthkit replay: {error}", file=sys.stderr)
        return 1
    return 0


def replay(run_dir: Path, step: int, checkpoint: Path | None, out: Path | None, accelerator: str | None) -> None:
    """Print a table of the step's samples, those of all ranks, then its loss and the norm of its gradient."""
    config = load_settings(run_dir / "config.yaml")
    if not 0 <= step < config.trainer.max_steps:
        raise ConfigError(f"--step {step}: the run has the steps 0 to {config.trainer.max_steps - 1}")
    L.seed_everything(config.seed, workers=True, verbose=False)
    module = build_module(config)
    path = checkpoint or nearest_checkpoint(run_dir / "checkpoints", step)
    if path is not None and path.is_dir():
        raise ConfigError(f"{path}: the weights are spread over ranks; give a file as --checkpoint")
    if path is not None:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=False)["state_dict"])
    print(f"step {step} of {run_dir} with the weights {f'of {path}' if path else 'at the start'}")
    loss, norm = compute(config, module, step, accelerator or config.trainer.accelerator, out)
    print(f"loss {loss:.6g}, norm of the gradient {norm:.6g}")


def compute(
    config: TrainConfig, module: L.LightningModule, step: int, accelerator: str, out: Path | None
) -> tuple[float, float]:
    """Forward and backward of the batches that each rank had, one after the other; mean loss, norm of the gradient."""
    trainer = bare_trainer(config.trainer, accelerator)
    module.to(trainer.strategy.root_device).train()
    module.log = module.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    world_size, accumulated = config.trainer.devices * config.trainer.num_nodes, config.trainer.accumulate_grad_batches
    config.data.num_workers = 0
    data = build_data(config)
    kind = config.stage.target_kind or "disparity"
    losses = []
    print(f"{'stream':<10} {'image':<8} {'target':<20} {'valid':>6}  losses, data set, key, shard")
    for rank in range(world_size):
        module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
        loader = data.train_loader(start_step=step * accumulated, rank=rank, world_size=world_size)
        for index, loaded in zip(range(step * accumulated, (step + 1) * accumulated), loader, strict=False):
            pixels = {stream: middle_frames(part["image"]) for stream, part in loaded.items()}
            batch = data.on_after_batch_transfer(data.transfer_batch_to_device(loaded, module.device, 0), 0)
            SeedBatches(config.seed).on_train_batch_start(module.trainer, module, batch, index)
            with trainer.precision_plugin.train_step_context():
                result: Any = module.training_step(batch, index)
            outputs: Any = {"loss": result} if isinstance(result, Tensor) else result
            (outputs["loss"] / (accumulated * world_size)).backward()
            losses.append(outputs["loss"].item())
            show(step, batch, pixels, outputs.get("image_losses", {}), kind, out)
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return sum(losses) / len(losses), float(torch.nn.utils.get_total_norm(gradients))


def middle_frames(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as they are, of clips (B, T, 3, H, W) the frame that targets and keys belong to."""
    return images if images.ndim == 4 else images[:, images.shape[1] // 2]


def show(
    number: int,
    batch: Mapping[str, Batch],
    pixels: Mapping[str, Tensor],
    image_losses: Mapping[str, Tensor],
    kind: Kind,
    out: Path | None,
) -> None:
    """A line for each sample, as the model saw it but with the image before normalisation; and its picture."""
    step = Step(number)
    step.add(batch, image_losses)
    images, targets, masks = (
        [one for stream in batch for one in tensors[stream].cpu().numpy()]
        for tensors in (pixels, *({s: part[name] for s, part in batch.items()} for name in ("target", "valid_mask")))
    )
    for sample, image, target, mask in zip(step.samples(), images, targets, masks, strict=True):
        values = target[mask]
        between = f"{values.min():.4g} to {values.max():.4g}" if values.size else "none"
        losses = " ".join(f"{part} {float(value):.4g}" for part, value in sample["losses"].items())
        is_finite = np.isfinite(values).all() and all(math.isfinite(float(v)) for v in sample["losses"].values())
        print(
            f"{sample['stream']:<10} {image.min()}-{image.max():<6} {between:<20} {mask.mean():>6.1%}  {losses}  "
            f"{sample['dataset']} {sample['key']} {sample['shard']}{'' if is_finite else '  <- NOT FINITE'}"
        )
        if out is not None:
            draw(
                image.transpose(1, 2, 0),
                target,
                mask,
                kind,
                out / f"{sample['stream']}-{sample['dataset']}-{sample['key']}.png",
            )


def draw(image: np.ndarray, target: np.ndarray, valid_mask: np.ndarray, kind: Kind, path: Path) -> None:
    scale = kind_scale(kind, *value_range(target, valid_mask))
    tiles = [Tile(path.stem, image), Tile("target", colorize(target, valid_mask, scale))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(encode(render(picture_grid([PictureRow(tiles, [scale])])), ".png"))


def load_settings(path: Path) -> TrainConfig:
    """The settings that a run wrote down."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give the folder of a run")
    settings = OmegaConf.load(path)
    schema = OmegaConf.structured(TrainConfig)
    schema.stage = SCHEMAS["stage", f"base_{settings.stage.name}"]
    schema.model = ARCHITECTURES[settings.model.get("architecture", "dpt")]  # older runs do not say it
    config = OmegaConf.to_object(OmegaConf.merge(schema, settings))
    assert isinstance(config, TrainConfig)
    return config


def nearest_checkpoint(folder: Path, step: int) -> Path | None:
    """The whole checkpoint whose weights were in use at a step, or closest to it; None when there is none.

    Closest, not before: the one that a guard wrote after it left out some steps has the weights of these.
    """
    return min(filter(is_whole, steps_of(folder)), key=lambda path: abs(int(path.stem) - step), default=None)
