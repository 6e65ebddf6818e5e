"""Parameter groups and the learning-rate schedule."""

from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from depthkit.config import OptimConfig


def parameter_groups(model: nn.Module, encoder: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Encoder at `encoder_lr`, everything else of `model` at `encoder_lr * decoder_lr_multiplier` (V1 section 4: 10x).

    Every trainable parameter is in exactly one group; a group without any is left out.
    """
    in_encoder = {id(parameter) for parameter in encoder.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "name": "encoder",
            "params": [parameter for parameter in trainable if id(parameter) in in_encoder],
            "lr": config.encoder_lr,
        },
        {
            "name": "decoder",
            "params": [parameter for parameter in trainable if id(parameter) not in in_encoder],
            "lr": config.encoder_lr * config.decoder_lr_multiplier,
        },
    ]
    covered = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(covered) == sorted(map(id, trainable)), "every trainable parameter belongs to exactly one group"
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> AdamW:
    optimizer = AdamW(groups, betas=(config.betas[0], config.betas[1]), weight_decay=config.weight_decay, fused=True)
    # Clipping needs gradients that are already unscaled; Lightning refuses to clip where the step would unscale them.
    optimizer._step_supports_amp_scaling = False
    return optimizer


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
