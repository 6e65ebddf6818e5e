"""Fine-tuning for depth in metres."""

from depthkit.config import MetricConfig, OptimConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.losses import silog_loss
from depthkit.models import DepthModel
from depthkit.stages.base import DepthModule
from depthkit.types import Batch, StepOutput


class MetricModule(DepthModule):
    """Supervised training on depth in metres with a sigmoid head (Depth Anything V2, metric_depth/train.py).

    Pixels farther than the head can say, `max_depth` in metres, are left out.
    """

    stage: MetricConfig

    def __init__(
        self, model: DepthModel, max_depth: float, stage: MetricConfig, optim: OptimConfig, protocol: ProtocolConfig
    ) -> None:
        super().__init__(model, stage, optim, protocol)
        self.max_depth = max_depth

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        labeled = batch["labeled"]
        depth = labeled["target"]
        is_within = labeled["valid_mask"] & (depth <= self.max_depth)
        prediction = self(labeled["image"]).values
        losses = silog_loss(prediction, depth, is_within, variance_focus=self.stage.variance_focus)
        return self.weigh({"labeled": losses}, {"labeled": 1.0})
