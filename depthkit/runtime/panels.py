"""Pictures of a run: what the model makes of the same few images, at every validation."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from depthkit.data.windows import normalize
from depthkit.evaluation.protocols import compare, protocol_id
from depthkit.evaluation.report_pictures import UNIT_LABELS, encode, shrink
from depthkit.evaluation.settings import Alignment, ProtocolConfig
from depthkit.files import atomic_write
from depthkit.runtime.meter import samples_seen
from depthkit.types import Batch, Kind, Rejection
from depthkit.visualize import panel


class ImagePanels(L.Callback):
    """Writes `folder/step-STEP.png` at the end of each validation and hands it to the loggers that take images.

    One row for each of at most `num_images` images, evenly spread over the validation sets and the same each time:
    image, ground truth, aligned prediction, relative error. Nothing happens in runs that do not validate.
    """

    def __init__(self, folder: str, num_images: int = 4) -> None:
        self.folder = Path(folder)
        self.num_images = num_images
        self._batches: list[Batch] | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._batches is None:
            assert trainer.val_dataloaders is not None
            batches = fixed_batches(trainer.val_dataloaders.dataset, self.num_images)
            self._batches = [batch for batch in batches if "camera_to_world" not in batch]  # clips are no panels
        # On every rank: where the weights are spread over the ranks, one alone would wait for the others.
        predictions = [predict(trainer, pl_module, batch) for batch in self._batches]
        if not trainer.is_global_zero or not predictions:
            return
        protocol = pl_module.protocol
        assert isinstance(protocol, ProtocolConfig)
        title = f"{protocol_id(protocol)}, step {trainer.global_step}"
        kind: Kind = pl_module.kind  # type: ignore[assignment]
        rows = [draw(*pair, kind, protocol, title) for pair in zip(self._batches, predictions, strict=True)]
        picture = np.concatenate(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.folder / f"step-{trainer.global_step:08d}.png") as file:
            file.write(encode(picture, ".png"))
        unit = UNIT_LABELS[protocol.unit]
        shown = "prediction, aligned" if is_aligned(protocol) else "prediction"
        caption = f"{title}: image | ground truth | {shown} | relative error. Depth, one scale: {unit}"
        for logger in trainer.loggers:
            log_picture(logger, picture, caption, trainer)


def is_aligned(protocol: ProtocolConfig) -> bool:
    return protocol.alignment is not Alignment.none


def fixed_batches(dataset: Any, num_images: int) -> list[Batch]:
    """At most `num_images` elements of the validation data, evenly spread, without the broken ones."""
    num_images = min(num_images, len(dataset))
    batches = (dataset[i * len(dataset) // num_images] for i in range(num_images))
    return [batch for batch in batches if not isinstance(batch, Rejection)]


def predict(trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> Tensor:
    """(1, H, W) float32 on the CPU."""
    with trainer.precision_plugin.forward_context():
        moved = {"image": normalize(batch["image"].to(pl_module.device)), "intrinsics_px": batch["intrinsics_px"]}
        values = pl_module.predict(moved)  # type: ignore[operator]
    return values.float().cpu()


def draw(batch: Batch, prediction: Tensor, kind: Kind, protocol: ProtocolConfig, title: str) -> np.ndarray:
    """One row of the picture, (H, W, 3) uint8; all rows are equally wide."""
    comparison = compare(prediction, batch["target"], batch["valid_mask"], protocol, kind)
    aligned, target, valid_mask = (tensor[0].numpy() for tensor in comparison)
    aligned, _ = shrink(aligned, np.ones_like(valid_mask))
    target, valid_mask = shrink(target, valid_mask)
    image = batch["image"][0].permute(1, 2, 0).numpy()
    return panel(
        image, target, aligned, valid_mask, unit=UNIT_LABELS[protocol.unit], title=title, aligned=is_aligned(protocol)
    )


def log_picture(logger: Logger, picture: np.ndarray, caption: str, trainer: L.Trainer) -> None:
    """Log the picture as `val/panels`; loggers without images do nothing."""
    step = trainer.global_step
    if isinstance(logger, WandbLogger):
        logger.log_metrics({"samples_seen": samples_seen(trainer)}, step=step)  # the place of the picture on the x-axis
        logger.log_image("val/panels", [picture], step=step, caption=[caption])
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("val/panels", picture, step, dataformats="HWC")
