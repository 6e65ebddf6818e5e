"""Do labels belong to their images? Depth has edges where images have them: here, and not a few pixels beside.

Shapes: B images, H/W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.alignment import masked_mean

LUMA = (0.299, 0.587, 0.114)
WORKING_SIDE = 128  # pixels; larger maps are averaged down to about this, so that edges of sensors' width meet
MAX_SHIFT = 8  # working pixels, in each direction
MAX_OTHERS = 7  # images whose labels each image is compared with, besides its own
SMALLEST_SHARE = 0.2  # of an image in which the label has edges to compare; sparse labels have none


class Edges(NamedTuple):
    """`strength` (B, h, w) in [0, 1), relative to the mean of the image; `is_known` (B, h, w); `factor`, pixels of the
    original for one of these."""

    strength: Tensor
    is_known: Tensor
    factor: int


class Agreement(NamedTuple):
    """Correlation of the edges of label and image, (images,) each: as they are given, with the labels of other images,
    with the label turned over; and `shifted` (images, 2 R + 1, 2 R + 1), the label moved by (-R to R) working pixels
    down and right. `chance` is the largest mean that another image's label reaches anywhere. `factor` as in `Edges`."""

    own: Tensor
    other: Tensor
    turned: dict[str, Tensor]
    shifted: Tensor
    chance: float
    factor: int


def image_edges(image: Tensor) -> Edges:
    """Edges of the luma of images (B, 3, H, W) uint8."""
    luma = torch.einsum("c,bchw->bhw", image.new_tensor(LUMA, dtype=torch.float32), image.float())
    return edges(luma, torch.ones_like(luma, dtype=torch.bool))


def label_edges(target: Tensor, valid_mask: Tensor) -> Edges:
    """Edges of targets (B, H, W), disparity or depth: of the logarithm, so that near and far steps count alike."""
    level = masked_mean(target, valid_mask)[:, None, None]
    positive = torch.where(valid_mask, target, level).float() + 0.01 * level  # sky has disparity 0
    return edges(positive.clamp(min=1e-9).log(), valid_mask)


def edges(values: Tensor, valid_mask: Tensor) -> Edges:
    """`s / (s + mean s)` of the gradient's magnitude s by central differences, where all four neighbours are valid."""
    across = (values[:, 1:-1, 2:] - values[:, 1:-1, :-2]).square() + (
        values[:, 2:, 1:-1] - values[:, :-2, 1:-1]
    ).square()
    neighbours = valid_mask[:, 1:-1, 2:] & valid_mask[:, 1:-1, :-2] & valid_mask[:, 2:, 1:-1] & valid_mask[:, :-2, 1:-1]
    factor = max(1, round(min(values.shape[-2:]) / WORKING_SIDE))
    share = F.avg_pool2d(neighbours.float(), factor)
    strength = F.avg_pool2d(torch.where(neighbours, across, 0.0).sqrt(), factor) / share.clamp(min=1e-6)
    is_known = share > 0.5
    mean = masked_mean(strength, is_known)[:, None, None].clamp(min=1e-12)
    return Edges(strength / (strength + mean), is_known, factor)


def correlation(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Pearson's, over the mask of each image; 0 where one of the two is constant."""
    x, y = (values - masked_mean(values, mask)[:, None, None] for values in (first, second))
    spread = (masked_mean(x**2, mask) * masked_mean(y**2, mask)).sqrt()
    return torch.where(spread > 1e-9, masked_mean(x * y, mask) / spread.clamp(min=1e-9), 0.0)


def measure(image: Tensor, target: Tensor, valid_mask: Tensor) -> Agreement | None:
    """The agreement of the images whose labels are dense enough; None for fewer than two.

    `image` (B, 3, H, W) uint8, `target` and `valid_mask` (B, H, W).
    """
    found, label = image_edges(image), label_edges(target, valid_mask)
    is_dense = label.is_known.float().mean((1, 2)) > SMALLEST_SHARE
    if is_dense.sum() < 2:
        return None
    strength, drawn, known = (values[is_dense] for values in (found.strength, label.strength, label.is_known))
    turns = {"mirrored left to right": [2], "upside down": [1], "turned by 180 degrees": [1, 2]}
    reach = min(MAX_SHIFT, min(strength.shape[1:]) // 4)
    turned_by = range(1, min(MAX_OTHERS, len(strength) - 1) + 1)
    others = [(drawn.roll(number, 0), known.roll(number, 0)) for number in turned_by]
    return Agreement(
        own=correlation(strength, drawn, known),
        other=torch.stack([correlation(strength, *other) for other in others]).mean(0),
        turned={name: correlation(strength, drawn.flip(axes), known.flip(axes)) for name, axes in turns.items()},
        shifted=shift_correlations(strength, drawn, known, reach),
        chance=float(shift_correlations(strength, *others[0], reach).mean(0).max()),
        factor=found.factor,
    )


def shift_correlations(strength: Tensor, drawn: Tensor, known: Tensor, reach: int) -> Tensor:
    """(B, 2 R + 1, 2 R + 1): the label moved down and right by -R to R pixels, over the same part of every label."""
    height, width = drawn.shape[1:]
    inner = (slice(None), slice(reach, height - reach), slice(reach, width - reach))
    moves = range(2 * reach + 1)
    found = [
        correlation(strength[:, y : y + height - 2 * reach, x : x + width - 2 * reach], drawn[inner], known[inner])
        for y in moves
        for x in moves
    ]
    return torch.stack(found, 1).view(-1, 2 * reach + 1, 2 * reach + 1)


def t_value(difference: Tensor) -> float:
    """Mean of paired differences (n,), n > 1, in standard errors: above 3 is hardly chance."""
    error = difference.std() / len(difference) ** 0.5
    return float(difference.mean() / error.clamp(min=1e-6))
