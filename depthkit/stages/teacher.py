"""Stage 1: a teacher on labeled mixes."""

import torch
from torch import Tensor, distributed

from depthkit.config import OptimConfig, TeacherConfig
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.models import DepthModel
from depthkit.pareto import gradient_rows, mixing_weights
from depthkit.stages.base import DepthModule, supervised_loss
from depthkit.types import Batch, StepOutput


class TeacherModule(DepthModule):
    """Supervised training on labeled images (V1: affine-invariant loss; V2: + 2.0 x gradient matching; MiDaS: trimmed
    scale-and-shift-invariant loss + 0.5 x gradient matching on batches of `num_datasets` data sets in equal shares)."""

    stage: TeacherConfig

    def __init__(
        self,
        model: DepthModel,
        stage: TeacherConfig,
        optim: OptimConfig,
        protocol: ProtocolConfig,
        *,
        num_datasets: int = 1,
    ) -> None:
        super().__init__(model, stage, optim, protocol)
        self.num_datasets = num_datasets
        self.loss = supervised_loss(
            stage.loss,
            gradient_matching_weight=stage.gradient_matching_weight,
            drop_fraction=stage.drop_fraction,
        )

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> StepOutput:
        labeled = batch["labeled"]
        output = self(labeled["image"])
        losses = self.loss(output.values, labeled["target"], labeled["valid_mask"])
        step = self.weigh({"labeled": losses}, {"labeled": 1.0})
        if self.stage.pareto:
            # Slot s of a balanced batch is of data set s modulo their number.
            step["loss"] = self.pareto(losses.view(-1, self.num_datasets).mean(0))
        return self.with_normals(step, output.features, labeled)

    def pareto(self, losses: Tensor) -> Tensor:
        """The losses of the data sets (n,) weighed by `mixing_weights` of their gradients, those of all ranks."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rows = gradient_rows(losses, parameters)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(rows)
        return torch.dot(mixing_weights(rows), losses)
