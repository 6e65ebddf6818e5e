"""What the training stages share: the model, validation by a protocol, optimizer and schedule. No training step."""

from collections.abc import Mapping
from functools import partial
from typing import Self

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from depthkit.auxiliary import NormalsTask
from depthkit.config import DepthLoss, OptimConfig, StageConfig, SupervisedConfig
from depthkit.evaluation.protocols import protocol_id, score
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.losses import MapLoss, affine_invariant_loss, gradient_matching_loss, scale_shift_invariant_loss
from depthkit.models import DepthModel
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.transfer import keep_frozen_in_eval
from depthkit.types import Batch, Kind, ModelOutput, Rejection, StepOutput


class DepthModule(L.LightningModule):
    """Base of the stages. Each stage is one subclass with one `training_step`; nothing here calls into a stage."""

    def __init__(self, model: DepthModel, stage: StageConfig, optim: OptimConfig, protocol: ProtocolConfig) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.optim = optim
        self.protocol = protocol
        self.kind: Kind = stage.target_kind or "disparity"  # of what the model predicts
        metrics = {name: MeanMetric(nan_strategy="ignore") for name in protocol.metrics}
        self.val_metrics: Mapping[str, MeanMetric] = nn.ModuleDict(metrics)  # type: ignore[assignment]
        wants_normals = isinstance(stage, SupervisedConfig) and stage.normals
        self.normals_task = NormalsTask(model.encoder) if wants_normals else None

    def train(self, mode: bool = True) -> Self:
        """As everywhere, but what is frozen stays in eval mode."""
        super().train(mode)
        keep_frozen_in_eval(self.model)
        return self

    def forward(self, image: Tensor) -> ModelOutput:
        return self.model(image)

    def weigh(self, parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> StepOutput:
        """The weighted mean of the named losses, each (images,), a value per image.

        Callbacks get the total as `loss`, each mean as `loss/NAME`, and the values per image. What goes to the loggers
        is for them to say: Lightning would log one rank's numbers of one step, or wait for all ranks in every step.
        """
        means = {name: values.mean() for name, values in parts.items()}
        weighted = [weights[name] * mean for name, mean in means.items()]
        total = torch.stack(weighted).sum() / sum(weights[name] for name in parts)
        self.log_dict({f"loss/{name}": mean.detach() for name, mean in means.items()}, logger=False)
        self.log("loss", total.detach(), logger=False)
        return {"loss": total, "image_losses": {name: values.detach() for name, values in parts.items()}}

    def with_normals(self, step: StepOutput, features: Tensor, labeled: Batch) -> StepOutput:
        """The step with the loss of normals, where `stage.normals` asks for it; `features` are of the same images."""
        if self.normals_task is None:
            return step
        losses = self.normals_task(features, labeled, self.stage.target_kind or "disparity")
        self.log("loss/normals", losses.mean().detach(), logger=False)
        total = self.normals_task.combine(step["loss"], losses.mean())
        self.log("loss", total.detach(), logger=False)
        return {"loss": total, "image_losses": step["image_losses"] | {"normals": losses.detach()}}

    def predict(self, batch: Batch) -> Tensor:
        """Values (B, H, W) for the images of a batch, which are normalised, in the kind that the stage learns."""
        return self(batch["image"]).values

    def validation_step(self, batch: Batch | Rejection, batch_idx: int) -> None:
        """Metrics of whole images in depth, after the alignment that the protocol names."""
        if isinstance(batch, Rejection):
            return
        self.judge(self.predict(batch), batch)

    def judge(self, prediction: Tensor, batch: Batch) -> None:
        """Add the protocol's metrics of a prediction to those of the validation so far."""
        values = score(prediction, batch["target"], batch["valid_mask"], self.protocol, self.kind)
        for name, value in values.items():
            self.val_metrics[name].update(value)

    def on_validation_epoch_end(self) -> None:
        for name, metric in self.val_metrics.items():
            self.log(val_name(self.protocol, name), metric, logger=False)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = parameter_groups(self.model, self.model.encoder, self.optim)
        if self.normals_task is not None:
            rate = self.optim.encoder_lr * self.optim.decoder_lr_multiplier
            groups.append({"name": "normals", "params": [*self.normals_task.parameters()], "lr": rate})
        optimizer = build_optimizer(groups, self.optim)
        schedule = build_schedule(optimizer, self.optim, num_steps=int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def val_name(protocol: ProtocolConfig, metric: str) -> str:
    """The name of a validation metric in logs, with the protocol that made it."""
    return f"val/{protocol_id(protocol)}/{metric}"


def supervised_loss(kind: DepthLoss, *, gradient_matching_weight: float = 0.0, drop_fraction: float = 0.0) -> MapLoss:
    """`loss + gradient_matching_weight * gradient matching`, one value per image.

    `drop_fraction` of the largest residuals is left out of the first term; V2 does not say that it trims the second.
    """
    base = {
        DepthLoss.affine_invariant: partial(affine_invariant_loss, drop_fraction=drop_fraction),
        DepthLoss.scale_shift_invariant: partial(scale_shift_invariant_loss, trim_fraction=drop_fraction),
    }[kind]
    if gradient_matching_weight == 0:
        return base

    def loss(prediction: Tensor, target: Tensor, valid_mask: Tensor) -> Tensor:
        gradient = gradient_matching_loss(prediction, target, valid_mask)
        return base(prediction, target, valid_mask) + gradient_matching_weight * gradient

    return loss
