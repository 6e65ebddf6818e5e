"""Fine-tuning for depth in metres."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.config import DepthErrorLoss, MetricConfig, OptimConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.losses import MapLoss, scale_invariant_log_loss, silog_loss
from depthkit.models import DepthModel
from depthkit.models.metric_bins import MetricBinsModel
from depthkit.stages.base import DepthModule
from depthkit.types import Batch, StepOutput


class MetricModule(DepthModule):
    """Supervised training on depth in metres (Depth Anything V2, metric_depth/train.py; ZoeDepth; Eigen et al. 2014).

    Pixels farther than the network can say, `max_depth` in metres, are left out.

    With `stage.canonical_focal_px` what the network says is depth as a camera of that focal length would see it,
    `depth * canonical / focal`: the same object looks the same at the same canonical depth, whatever the camera.
    """

    stage: MetricConfig

    def __init__(
        self,
        model: DepthModel,
        max_depth: float | None,
        stage: MetricConfig,
        optim: OptimConfig,
        protocol: ProtocolConfig,
    ) -> None:
        super().__init__(model, stage, optim, protocol)
        self.max_depth = math.inf if max_depth is None else max_depth
        self.loss = depth_loss(stage)
        self.heads = [*model.decoder.bins.heads] if isinstance(model, MetricBinsModel) else []

    def predict(self, batch: Batch) -> Tensor:
        return self.camera_factor(batch) * self(batch["image"]).values

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        labeled = batch["labeled"]
        output, factor = self(labeled["image"]), self.camera_factor(labeled)
        depth = labeled["target"]
        is_within = labeled["valid_mask"] & (depth <= factor * self.max_depth)
        maps = (factor * output.values, depth, is_within)
        if self.stage.pooled:
            # An image as high as all of them.
            losses = self.loss(*(part.flatten(0, 1)[None] for part in maps)).expand(len(depth))
        else:
            losses = self.loss(*maps)
        parts, weights = {"labeled": self.stage.loss_scale * losses}, {"labeled": 1.0}
        if output.domain_logits is not None:
            parts["domain"] = self.domain_loss(output.domain_logits, labeled["dataset"])
            weights["domain"] = self.stage.domain_weight
        step = self.weigh(parts, weights)
        step["loss"] = step["loss"] * sum(weights.values())  # a sum, as published, whose size clipping sees
        self.log("loss", step["loss"].detach(), logger=False)
        return self.with_normals(step, output.features, labeled)

    def camera_factor(self, batch: Batch) -> Tensor | float:
        """What the network says, times this, is metres: (B, 1, 1), or 1 without a canonical camera."""
        if self.stage.canonical_focal_px is None:
            return 1.0
        return batch["intrinsics_px"][:, 0, None, None].to(self.device) / self.stage.canonical_focal_px

    def domain_loss(self, logits: Tensor, datasets: list[str]) -> Tensor:
        """Cross entropy (B,) of the router with the heads of the images' data sets."""
        numbers = [self.heads.index(self.stage.domains.get(name, name)) for name in datasets]
        heads = torch.tensor(numbers).to(logits.device, non_blocking=True)  # made there, it would wait for the device
        return F.cross_entropy(logits, heads, reduction="none")


def depth_loss(stage: MetricConfig) -> MapLoss:
    """The loss that the settings name, one value per image, before `loss_scale`."""
    loss = {
        DepthErrorLoss.silog: silog_loss,
        DepthErrorLoss.scale_invariant_log: scale_invariant_log_loss,
    }[stage.loss]
    return partial(loss, variance_focus=stage.variance_focus, sample_variance=stage.sample_variance)
