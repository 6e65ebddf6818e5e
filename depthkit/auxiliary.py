"""Surface normals as a second task: they sharpen features where labels are few, and are gone when training ends."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthkit.models import Encoder
from depthkit.multitask import uncertainty_weighted_sum
from depthkit.normals import normal_loss, normals_from_depth
from depthkit.types import Batch, Kind

HEAD_WIDTH = 64  # channels


class NormalsTask(nn.Module):
    """Normals (B, 3, H, W) from the final features (B, C, h, w) of an encoder: 3x3 convolution, GELU, 1x1, bilinear.

    Its targets are the normals of the depth labels, whose images need intrinsics; an image without has none and adds
    nothing. It is weighed against depth by learned uncertainty.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width = feature_width(encoder)
        self.head = nn.Sequential(nn.Conv2d(width, HEAD_WIDTH, 3, padding=1), nn.GELU(), nn.Conv2d(HEAD_WIDTH, 3, 1))
        self.log_variances = nn.Parameter(torch.zeros(2))  # of depth, of normals

    def forward(self, features: Tensor, batch: Batch, kind: Kind) -> Tensor:
        """`1 - cos` between predicted and true normals, the mean of each image, (B,).

        Targets of kind disparity are inverse depth in any unit, without shift; sky, 0, has no normal.
        """
        target, mask = batch["target"], batch["valid_mask"]
        if kind == "disparity":
            mask = mask & (target > 0)
            target = 1 / torch.where(mask, target, 1.0)
        normals, has_normal = normals_from_depth(target, mask, batch["intrinsics_px"])
        prediction = F.interpolate(self.head(features), target.shape[-2:], mode="bilinear")
        return normal_loss(prediction, normals, has_normal)

    def combine(self, depth_loss: Tensor, normals_loss: Tensor) -> Tensor:
        """One loss of two scalars."""
        return uncertainty_weighted_sum(torch.stack([depth_loss, normals_loss]), self.log_variances)


@torch.no_grad()
def feature_width(encoder: Encoder) -> int:
    """Channels of the final features."""
    was_training = encoder.training
    _, features = encoder.eval()(torch.zeros(1, 3, 2 * encoder.multiple, 2 * encoder.multiple))
    encoder.train(was_training)
    return features.shape[1]
