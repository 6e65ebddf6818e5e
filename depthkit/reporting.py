"""Who measures, shows and keeps what a training run does, put together from its settings."""

from pathlib import Path

import lightning as L
import torch
from torch import nn

from depthkit.checks import num_samples
from depthkit.config import TrainConfig
from depthkit.provenance import versions
from depthkit.runtime.console import RunProgress
from depthkit.runtime.meter import Meter
from depthkit.runtime.summary import RunSummary, used_before
from depthkit.runtime.tracking import Lineage


def reporters(config: TrainConfig, module: nn.Module) -> list[L.Callback]:
    """The callbacks, which come after all others: what those take for drawing or saving is no waiting for data."""
    run_dir = Path(config.run_dir)
    peak = peak_flops(config)
    meter = Meter(
        config.data,
        used=used_before(run_dir / "summary.json"),
        batch_flops=None if peak is None else batch_flops(config, module),
        peak_flops=peak,
    )
    facts = {"run_name": config.run_name, "stage": config.stage.name, "seed": config.seed, "versions": versions()}
    datasets = [*config.data.labeled.values(), *config.data.unlabeled.values()]
    manifests = [path for dataset in datasets for path in (dataset.manifest, dataset.labels) if path is not None]
    weights = config.stage.encoder_weights
    return [
        meter,
        *([RunProgress(heading(config, module), meter)] if config.trainer.enable_progress_bar else []),
        RunSummary(run_dir / "summary.json", facts, meter),
        Lineage(run_dir / "bundle", manifests, [] if weights in (None, "timm") else [str(weights)]),
    ]


def peak_flops(config: TrainConfig) -> float | None:
    """FLOP/s that the device could do at best; None on CPUs and on GPUs that are not listed."""
    from depthkit.hardware import peak_tflops

    if config.trainer.accelerator not in ("gpu", "cuda", "auto") or not torch.cuda.is_available():
        return None
    tflops = peak_tflops(torch.cuda.get_device_name(), config.trainer.precision)
    return None if tflops is None else tflops * 1e12


def batch_flops(config: TrainConfig, module: nn.Module) -> float:
    """FLOPs of one batch over all ranks: forward and backward are three forward passes of what is trained, and one of
    an encoder that is frozen; of a clip each frame. What activation checkpointing does again is not counted, nor is the
    ego-motion network."""
    from depthkit.flops import forward_flops

    size = (config.data.crop_size[0], config.data.crop_size[1])
    images = config.data.images_per_step()
    trained: nn.Module = getattr(module, "model", None) or module.get_submodule("encoder")
    frames = images | {"unlabeled": images["unlabeled"] * (config.data.clip_frames or 1)}
    flops = 3 * sum(frames.values()) * forward_flops(trained, size)
    encoder: nn.Module | None = getattr(trained, "encoder", None)
    if encoder is not None and not any(parameter.requires_grad for parameter in encoder.parameters()):
        flops -= 2 * sum(frames.values()) * forward_flops(encoder, size)
    frozen = getattr(module, "frozen_encoder", None)
    return flops if frozen is None else flops + images["unlabeled"] * forward_flops(frozen, size)


def heading(config: TrainConfig, module: nn.Module) -> list[str]:
    """The arithmetic of a run in a few lines."""
    trainer, images = config.trainer, config.data.images_per_step()
    per_step = {stream: count * trainer.accumulate_grad_batches for stream, count in images.items() if count}
    streams = " + ".join(f"{count} {stream}" for stream, count in per_step.items())
    processes = trainer.devices * trainer.num_nodes
    split = f" = {trainer.accumulate_grad_batches} batches" if trainer.accumulate_grad_batches > 1 else ""
    sweeps = []
    for stream, count in per_step.items():
        samples = sum(d.weight * num_samples(config.data, stream, d) for d in getattr(config.data, stream).values())
        sweeps.append(f"{trainer.max_steps * count / samples:.3g} sweeps of the {stream} images")
    frozen_encoder = getattr(module, "frozen_encoder", None)  # no part of the module: strategies leave it alone
    parameters = {*module.parameters(), *(frozen_encoder.parameters() if frozen_encoder is not None else ())}
    trained, frozen = (sum(p.numel() for p in parameters if p.requires_grad is kind) / 1e6 for kind in (True, False))
    height, width = config.data.crop_size
    return [
        f"{config.run_name}: stage {config.stage.name}, seed {config.seed}, in {config.run_dir}",
        f"  {trainer.max_steps} steps of {streams} images of {height} x {width}{split}: {', '.join(sweeps)}",
        f"  {config.model.title}: {trained:.2f} M parameters trained, {frozen:.2f} M frozen",
        f"  {processes} x {trainer.accelerator}, strategy {trainer.strategy}, precision {trainer.precision}",
    ]
