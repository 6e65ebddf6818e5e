"""Stage 2: a teacher labels clean unlabeled images. One image shard gives one label shard with the same keys."""

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

from depthkit.data.labeling import ImageChunk, LabelShards
from depthkit.data.windows import normalize
from depthkit.models import DepthModel
from depthkit.types import Rejection


class PseudoLabelModule(L.LightningModule):
    """Predicts disparity for chunks of images: index in the shard -> (H, W) float32. Sky, where it is known, is 0."""

    def __init__(self, model: DepthModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def predict_step(self, batch: ImageChunk, batch_idx: int) -> dict[int, np.ndarray]:
        disparity = {}
        for group in batch.groups:
            values = self.model(normalize(group.images.to(self.device))).values.float()
            values = values.masked_fill(group.sky.to(self.device), 0.0)
            disparity.update(zip(group.indices, values.cpu().numpy(), strict=True))
        return disparity

    def transfer_batch_to_device(self, batch: ImageChunk, device: object, dataloader_idx: int) -> ImageChunk:
        return batch


class WriteLabels(BasePredictionWriter):
    """Hands each chunk's labels to `LabelShards` and keeps what was rejected."""

    def __init__(self, shards: LabelShards) -> None:
        super().__init__(write_interval="batch")
        self.shards = shards
        self.num_labels = 0
        self.rejections: list[Rejection] = []

    def write_on_batch_end(  # type: ignore[override]
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[int, np.ndarray],
        batch_indices: object,
        batch: ImageChunk,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        self.shards.write(batch, prediction)
        self.num_labels += len(prediction)
        self.rejections += batch.rejections.values()
