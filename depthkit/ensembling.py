"""One image seen several ways by one network: the mean of what it predicts, and how much its predictions disagree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.alignment import SMALLEST_SPREAD, align_least_squares, masked_mean, zero_invalid


@dataclass(frozen=True)
class Views:
    """How an image is seen: at `scales` of its size, the first of which is 1, and with `flip` mirrored at each."""

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)

    @property
    def number(self) -> int:
        return len(self.scales) * (1 + self.flip)


class Ensemble(NamedTuple):
    """`values` (B, H, W), the mean of aligned predictions; `uncertainty` (B, H, W), their standard deviation at a pixel
    over that of `values` in the image; `disagreement` (B,), their variance, mean over pixels, over that of `values`.

    The last two do not depend on scale and shift of the predictions. They are 0 where the mean is constant; values and
    uncertainty are 0 outside the mask.
    """

    values: Tensor
    uncertainty: Tensor
    disagreement: Tensor


def predict_views(network: Callable[[Tensor], Tensor], images: Tensor, views: Views, multiple: int) -> list[Tensor]:
    """What `network` predicts, (B, H, W) float32, for each view of `images` (B, 3, H, W), at the place of the image.

    Images are resized with bicubic, predictions with bilinear antialiased filters; sides are rounded to a `multiple`.
    """
    size = images.shape[-2:]
    found = []
    for scale in views.scales:
        scaled = [max(1, round(side * scale / multiple)) * multiple for side in size]
        seen = images if scale == 1 else F.interpolate(images, scaled, mode="bicubic", antialias=True)
        for is_mirrored in (False, True)[: 1 + views.flip]:
            values = network(seen.flip(-1) if is_mirrored else seen).float()
            values = values.flip(-1) if is_mirrored else values
            if scale != 1:
                values = F.interpolate(values[:, None], list(size), mode="bilinear", antialias=True)[:, 0]
            found.append(values)
    return found


def combine(predictions: Sequence[Tensor], valid_mask: Tensor) -> Ensemble:
    """The ensemble of predictions (B, H, W), each brought to scale and shift of the first one by least squares.

    Disparity below 0, which a shift may give, becomes 0. Variances are those of a population: divided by the number.
    """
    first, *others = predictions
    aligned = torch.stack([first.float(), *(align_least_squares(each, first, valid_mask) for each in others)])
    mean = aligned.mean(0)
    level = masked_mean(mean, valid_mask)
    variance = masked_mean((mean - level[:, None, None]) ** 2, valid_mask)
    is_constant = variance <= (SMALLEST_SPREAD * level) ** 2
    inverse = torch.where(is_constant, 0.0, 1 / torch.where(is_constant, 1.0, variance))
    ratio = aligned.var(0, correction=0) * inverse[:, None, None]
    return Ensemble(
        values=zero_invalid(mean.clamp(min=0), valid_mask),
        uncertainty=zero_invalid(ratio.sqrt(), valid_mask),
        disagreement=masked_mean(ratio, valid_mask),
    )
