"""Stage 0, for models too small to have published weights: pre-train the encoder without labels."""

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from depthkit.config import OptimConfig, PretrainConfig
from depthkit.models import PlainEncoder
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.types import Batch


class PretrainModule(L.LightningModule):
    """Masked image modelling (SimMIM, Xie et al. 2022): hide patches, predict their pixels, L1 on the hidden ones.

    It takes the place of DINOv2, which no tiny encoder comes with, so that the student's start and its frozen encoder
    know the images of both domains. Hidden patches are blanked in the image too: a convolutional stem looks across
    patch borders.
    """

    def __init__(self, encoder: PlainEncoder, stage: PretrainConfig, optim: OptimConfig, *, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.mask_token.requires_grad_(True)
        self.stage = stage
        self.optim = optim
        self.seed = seed
        self.to_pixels = nn.Conv2d(encoder.width, 3 * encoder.multiple**2, 1)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        part = batch["unlabeled"]
        image = part["image"]
        grid = self.encoder.grid(image)
        hidden = self.hidden_patches(len(image), grid, batch_idx).to(image.device)
        hidden_pixels = F.interpolate(hidden[:, None].float(), image.shape[-2:]) > 0
        patches = self.encoder.embed(image.masked_fill(hidden_pixels, 0.0))
        patches = torch.where(hidden[..., None], self.encoder.mask_token.to(patches.dtype), patches)
        _, features = self.encoder.encode(patches, grid)
        prediction = F.pixel_shuffle(self.to_pixels(features), self.encoder.multiple)
        loss = (F.l1_loss(prediction, image, reduction="none") * hidden_pixels).sum() / (3 * hidden_pixels.sum())
        self.log("loss", loss.detach(), logger=False)
        return loss

    def hidden_patches(self, num_images: int, grid: tuple[int, int], step: int) -> Tensor:
        """A mask (B, h, w), True = hidden, the same number in every image: this rank's part of the step's masks."""
        trainer = self.trainer
        generator = torch.Generator().manual_seed(hash((self.seed, step)))
        noise = torch.rand(trainer.world_size * num_images, grid[0] * grid[1], generator=generator)
        order = noise.argsort(dim=1).argsort(dim=1)
        mine = order[trainer.global_rank * num_images :][:num_images]
        return (mine < round(self.stage.mask_ratio * order.shape[1])).view(num_images, *grid)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = build_optimizer(parameter_groups(self, self.encoder, self.optim), self.optim)
        schedule = build_schedule(optimizer, self.optim, num_steps=int(self.trainer.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
