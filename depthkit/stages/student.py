"""Stage 3: a student on labeled and pseudo-labeled images, under strong perturbation and feature alignment."""

from typing import Any

import torch
from torch import nn

from depthkit.config import OptimConfig, StudentConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.losses import cutmix_loss, feature_alignment_loss
from depthkit.models import DepthModel, Encoder
from depthkit.stages.base import DepthModule, supervised_loss
from depthkit.types import StepOutput, StudentBatch


class StudentModule(DepthModule):
    """V1 section 3: L = mean of the labeled loss, the pseudo-labeled loss and the feature alignment loss.

    `frozen_encoder` is the encoder that the student started from; it sees the same (perturbed, mixed) image as the
    student, which the paper leaves open, because only that image is defined for both.
    """

    def __init__(
        self,
        model: DepthModel,
        frozen_encoder: Encoder | None,
        stage: StudentConfig,
        optim: OptimConfig,
        protocol: ProtocolConfig,
    ) -> None:
        super().__init__(model, stage, optim, protocol)
        self.frozen_encoder: Encoder | None
        weight = stage.gradient_matching_weight
        self.labeled_loss = supervised_loss(stage.loss, gradient_matching_weight=weight)
        self.unlabeled_loss = supervised_loss(
            stage.loss, gradient_matching_weight=weight, drop_fraction=stage.drop_fraction
        )
        self.tolerance_margin = stage.tolerance_margin
        self.weights = {
            "labeled": stage.labeled_weight,
            "unlabeled": stage.unlabeled_weight,
            "feature": stage.feature_weight,
        }
        # Not a submodule: no checkpoint holds it, no optimizer sees it and no strategy splits it.
        object.__setattr__(self, "frozen_encoder", frozen_encoder and frozen_encoder.requires_grad_(False).eval())

    def on_fit_start(self) -> None:
        if self.frozen_encoder is not None:
            self.frozen_encoder.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["frozen_encoder"] = fingerprint(self.frozen_encoder)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["frozen_encoder"] != fingerprint(self.frozen_encoder):
            raise ValueError(
                f"stage.encoder_weights={self.stage.encoder_weights}: the weights there are others than those that this"
                " run began with; bring those back, or start over with resume=never"
            )

    def training_step(self, batch: StudentBatch, batch_idx: int) -> StepOutput:
        unlabeled = batch["unlabeled"]
        images = [batch[name]["image"] for name in ("labeled", "unlabeled") if name in batch]
        output = self(torch.cat(images))
        num_labeled = sum(map(len, images)) - len(unlabeled["image"])
        prediction = output.values[num_labeled:]
        target, valid_mask = unlabeled["target"], unlabeled["valid_mask"]

        parts = {}
        if num_labeled:
            labeled = batch["labeled"]
            parts["labeled"] = self.labeled_loss(output.values[:num_labeled], labeled["target"], labeled["valid_mask"])
        if "cutmix_region" in unlabeled:
            region = unlabeled["cutmix_region"]
            parts["unlabeled"] = cutmix_loss(self.unlabeled_loss, prediction, target, valid_mask, region)
        else:
            parts["unlabeled"] = self.unlabeled_loss(prediction, target, valid_mask)
        if self.frozen_encoder is not None:
            with torch.no_grad():
                _, frozen_features = self.frozen_encoder(unlabeled["image"])
            parts["feature"] = feature_alignment_loss(
                output.features[num_labeled:], frozen_features, tolerance_margin=self.tolerance_margin
            )
        step = self.weigh(parts, self.weights)
        return self.with_normals(step, output.features[:num_labeled], batch["labeled"]) if num_labeled else step


def fingerprint(module: nn.Module | None) -> list[int]:
    """A number for each parameter that changes with any of its bits, on every device the same."""
    if module is None:
        return []
    return torch.stack([torch.hash_tensor(parameter) for parameter in module.parameters()]).view(torch.int64).tolist()
