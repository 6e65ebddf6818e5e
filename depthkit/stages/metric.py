"""Fine-tuning for depth in metres."""

import math
from functools import partial

from depthkit.config import DepthErrorLoss, MetricConfig, OptimConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.losses import MapLoss, scale_invariant_log_loss, silog_loss
from depthkit.models import DepthModel
from depthkit.stages.base import DepthModule
from depthkit.types import Batch, StepOutput


class MetricModule(DepthModule):
    """Supervised training on depth in metres (Depth Anything V2, metric_depth/train.py; ZoeDepth; Eigen et al. 2014).

    Pixels farther than the network can say, `max_depth` in metres, are left out.
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

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        labeled = batch["labeled"]
        depth = labeled["target"]
        is_within = labeled["valid_mask"] & (depth <= self.max_depth)
        prediction = self(labeled["image"]).values
        losses = self.stage.loss_scale * self.loss(prediction, depth, is_within)
        return self.weigh({"labeled": losses}, {"labeled": 1.0})


def depth_loss(stage: MetricConfig) -> MapLoss:
    """The loss that the settings name, one value per image, before `loss_scale`."""
    loss = {
        DepthErrorLoss.silog: silog_loss,
        DepthErrorLoss.scale_invariant_log: scale_invariant_log_loss,
    }[stage.loss]
    return partial(loss, variance_focus=stage.variance_focus, sample_variance=stage.sample_variance)
