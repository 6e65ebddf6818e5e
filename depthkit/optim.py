"""Parameter groups and the learning-rate schedule."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from depthkit.config import Algorithm, ConfigError, OptimConfig, Schedule


def parameter_groups(model: nn.Module, encoder: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Encoder at `encoder_lr`, everything else of `model` at `encoder_lr * decoder_lr_multiplier` (V1 section 4: 10x),
    what `layer_lrs` names, by the start of its name, at the rate there; of several starts the longest holds.

    Every trainable parameter is in exactly one group; a group without any is left out. ConfigError for a name in
    `layer_lrs` that no parameter has.
    """
    for start in config.layer_lrs:
        if not any(is_part(name, start) for name, _ in model.named_parameters()):
            children = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(f"optim.layer_lrs.{start}: no parameter is called so; the model has {children}")
    in_encoder = {id(parameter) for parameter in encoder.parameters()}
    rates = {"encoder": config.encoder_lr, "decoder": config.encoder_lr * config.decoder_lr_multiplier}
    members: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            starts = [start for start in config.layer_lrs if is_part(name, start)]
            usual = "encoder" if id(parameter) in in_encoder else "decoder"
            members[max(starts, key=len, default=usual)].append(parameter)
    rates |= config.layer_lrs
    order = [*rates]
    return [
        {"name": name, "params": params, "lr": rates[name]}
        for name, params in sorted(members.items(), key=lambda group: order.index(group[0]))
    ]


def is_part(name: str, start: str) -> bool:
    """Whether the parameter `name` is `start` or lies in the module `start`."""
    return name == start or name.startswith(f"{start}.")


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    optimizer = ALGORITHMS[config.algorithm](groups, config)
    # Clipping needs gradients that are already unscaled; Lightning refuses to clip where the step would unscale them.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def adam(groups: list[dict[str, Any]], config: OptimConfig) -> Adam:
    return Adam(groups, betas=(config.betas[0], config.betas[1]), weight_decay=config.weight_decay, fused=True)


def adamw(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    return AdamW(groups, betas=(config.betas[0], config.betas[1]), weight_decay=config.weight_decay, fused=True)


def sgd(groups: list[dict[str, Any]], config: OptimConfig) -> SGD:
    return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)


ALGORITHMS: dict[Algorithm, Callable[[list[dict[str, Any]], OptimConfig], Optimizer]] = {
    Algorithm.adam: adam,
    Algorithm.adamw: adamw,
    Algorithm.sgd: sgd,
}


def build_schedule(optimizer: Optimizer, config: OptimConfig, *, num_steps: int) -> LRScheduler:
    """The schedule of a run of `num_steps` optimizer steps, to be stepped after each."""
    return {Schedule.decay: decay_schedule, Schedule.one_cycle: one_cycle_schedule}[config.schedule](
        optimizer, config, num_steps=num_steps
    )


def decay_schedule(optimizer: Optimizer, config: OptimConfig, *, num_steps: int) -> LambdaLR:
    """Factor on every group's rate: `(step + 1) / warmup_steps` at first, then from 1 to `final_lr_fraction` as
    `(1 - progress) ** schedule_power`.

    The last of `num_steps` steps is the one before `final_lr_fraction` is reached, so that none is done at a rate of 0.
    """

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        left = max(0.0, 1 - progress) ** config.schedule_power
        return config.final_lr_fraction + (1 - config.final_lr_fraction) * left

    return LambdaLR(optimizer, factor)


def one_cycle_schedule(optimizer: Optimizer, config: OptimConfig, *, num_steps: int) -> OneCycleLR:
    """From `start_lr_fraction` of every group's rate to the rate at `rise_fraction` of the steps, then to
    `final_lr_fraction`, both along a cosine (Smith and Topin 2018, as ZoeDepth has it)."""
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=num_steps + 1,  # it is stepped once more, after the last step
        pct_start=config.rise_fraction,
        div_factor=1 / config.start_lr_fraction,
        final_div_factor=config.start_lr_fraction / config.final_lr_fraction,
        cycle_momentum=config.cycle_momentum,
    )
