"""Stage 2: a teacher labels clean unlabeled images. One image shard gives one label shard with the same keys."""

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter

from depthkit.data.labeling import ImageChunk, LabelShards
from depthkit.data.quarantine import Quarantine
from depthkit.data.windows import normalize
from depthkit.models import DepthModel


class PseudoLabelModule(L.LightningModule):
    """Predicts disparity for chunks of images: index in the shard -> (H, W) float32. Sky, where it is known, is 0."""

    def __init__(self, model: DepthModel, *, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.mean = mean
        self.std = std
        # With more ranks than shards left some have nothing to do, but all of them must come to the first barrier.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def predict_step(self, batch: ImageChunk, batch_idx: int) -> dict[int, np.ndarray]:
        disparity: dict[int, np.ndarray] = {}
        for group in batch.groups:
            values = self.model(normalize(group.images.to(self.device), self.mean, self.std)).values.float()
            values = values.masked_fill(group.sky.to(self.device), 0.0)
            disparity.update(zip(group.indices, values.cpu().numpy(), strict=True))
        return disparity

    def transfer_batch_to_device(self, batch: ImageChunk, device: object, dataloader_idx: int) -> ImageChunk:
        return batch


class WriteLabels(BasePredictionWriter):
    """Hands each chunk's labels to `LabelShards`, and writes down what was rejected, in one file for each rank.

    A larger share of rejected images than `max_rejected` ends the run.
    """

    def __init__(self, shards: LabelShards, *, max_rejected: float) -> None:
        super().__init__(write_interval="batch")
        self.shards = shards
        self.max_rejected = max_rejected
        self.quarantine: Quarantine | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = self.shards.folder / f"rejected.rank-{trainer.global_rank:05d}.jsonl"
        self.quarantine = Quarantine(path, max_fraction=self.max_rejected)

    def write_on_batch_end(
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
        assert self.quarantine is not None
        self.quarantine.record(len(prediction), batch.rejections.values())

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.quarantine is not None and self.quarantine.num_rejected:
            print(self.quarantine.summary())
