"""Stage 1: a teacher on labeled mixes."""

from depthkit.config import OptimConfig, TeacherConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.models import DepthModel
from depthkit.stages.base import DepthModule, supervised_loss
from depthkit.types import Batch, StepOutput


class TeacherModule(DepthModule):
    """Supervised training on labeled images (V1: affine-invariant loss; V2: + 2.0 x gradient matching)."""

    def __init__(self, model: DepthModel, stage: TeacherConfig, optim: OptimConfig, protocol: ProtocolConfig) -> None:
        super().__init__(model, stage, optim, protocol)
        self.loss = supervised_loss(stage.loss, gradient_matching_weight=stage.gradient_matching_weight)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        labeled = batch["labeled"]
        prediction = self(labeled["image"]).values
        losses = self.loss(prediction, labeled["target"], labeled["valid_mask"])
        return self.weigh({"labeled": losses}, {"labeled": 1.0})
