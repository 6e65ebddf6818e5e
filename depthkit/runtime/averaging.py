"""A running average of the weights, which validates better than the weights of any one step."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(L.Callback):
    """Exponential moving average (Polyak and Juditsky 1992): average <- d average + (1 - d) weights, every step.

    d = min(decay, (1 + t) / (10 + t)) in step t, so that the random start is soon forgotten. A weight counts half after
    ln 2 / (1 - decay) steps: 693 for 0.999. In float32, of trainable parameters, and of the statistics of trained
    BatchNorm layers, which would not fit averaged weights; what is frozen equals its average. Ranks hold the same
    weights and so the same average; of statistics, which each rank takes from its own images, the bundle has those of
    the first. It is what validation and the bundle use, and lies in the checkpoint beside the weights.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step = 0
        self._weights: dict[str, Tensor] | None = None  # put away while the average is in their place

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        weights = trained(pl_module)
        # Checkpoints of runs before statistics were averaged lack them.
        start = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self.average = {name: self.average.get(name, value).to(value.device) for name, value in start.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        self._step = trainer.global_step
        weights = [weight.detach().float() for weight in trained(pl_module).values()]
        get_ema_multi_avg_fn(decay)(list(self.average.values()), weights, None)  # type: ignore[no-untyped-call]

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.state.fn is TrainerFn.FITTING and self._weights is None:
            weights = trained(pl_module)
            self._weights = {name: weight.detach().clone() for name, weight in weights.items()}
            put(self.average, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._put_back(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._put_back(pl_module)  # in the middle of a validation; the checkpoint refers to the same memory

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        put(self.average, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]

    def _put_back(self, module: nn.Module) -> None:
        if self._weights is not None:
            put(self._weights, module)
            self._weights = None


def trained(module: nn.Module) -> dict[str, Tensor]:
    """What training changes, by name: trainable parameters and the statistics of BatchNorm layers that have some."""
    found: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for prefix, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and any(parameter.requires_grad for parameter in layer.parameters()):
            found |= {f"{prefix}.{name}": s for name, s in layer.named_buffers() if s.is_floating_point()}
    return found


@torch.no_grad()
def put(values: dict[str, Tensor], module: nn.Module) -> None:
    """Overwrite the parameters and statistics of these names."""
    for name, tensor in trained(module).items():
        tensor.copy_(values[name])
