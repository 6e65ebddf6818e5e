"""Stage 3: a student on labeled and pseudo-labeled images, under strong perturbation and feature alignment."""

from typing import Self

import torch

from depthkit.config import OptimConfig, ProtocolConfig, StudentConfig
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
        self.frozen_encoder = None if frozen_encoder is None else frozen_encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_encoder is not None:
            self.frozen_encoder.eval()
        return self

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
        return self.weigh(parts, self.weights)
