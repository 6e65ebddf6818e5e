"""Predicting an image at more pixels than the network can look at: overlapping tiles, each brought onto the scale of a
coarse prediction of the whole image, blended without seams.

Shapes: N tiles, n tiles along one side, H/W pixels of the image, h/w of a tile.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.alignment import fit_least_squares

OVERLAP = 0.25
"""Smallest share of a tile's side that it has in common with the next tile."""

Box = tuple[slice, slice]
"""Rows and columns of the image that a tile covers."""


def blend_tiles(
    coarse: Tensor,
    predict: Callable[[list[Box]], Tensor],
    *,
    tile: int,
    resolution: tuple[int, int],
    batch_size: int,
) -> Tensor:
    """The prediction (H, W) of an image in tiles of at most `tile` x `tile` pixels, on the scale of `coarse`.

    `coarse` (H, W) is a prediction of the whole image for which the network saw it at `resolution`; `predict` gives
    those of at most `batch_size` boxes of one size, (N, h, w), each up to a scale and a shift of its own.
    """
    (rows, row_weights), (columns, column_weights) = (split_side(length, tile) for length in coarse.shape)
    row_weights, column_weights = row_weights.to(coarse.device), column_weights.to(coarse.device)
    places = list(product(zip(rows, row_weights, strict=True), zip(columns, column_weights, strict=True)))
    shrink = [min(1.0, seen / length) for seen, length in zip(resolution, coarse.shape, strict=True)]
    blended = torch.zeros_like(coarse)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        boxes = [(row, column) for (row, _), (column, _) in batch]
        aligned = align_tiles(predict(boxes), torch.stack([coarse[box] for box in boxes]), shrink)
        for values, ((row, row_weight), (column, column_weight)) in zip(aligned, batch, strict=True):
            blended[row, column] += row_weight[:, None] * column_weight * values
    return blended


def split_side(length: int, tile: int) -> tuple[list[slice], Tensor]:
    """The tiles along a side of `length` pixels, and the weight of each of their pixels, (n, min(tile, length))."""
    side = min(tile, length)
    starts = tile_starts(length, side)
    return [slice(start, start + side) for start in starts], blend_weights(starts, side, length)


def tile_starts(length: int, tile: int) -> list[int]:
    """Where the tiles along a side of `length` pixels begin: evenly spread, the last one ends at the border.

    Neighbours have `OVERLAP` of their pixels or more in common. One tile where the side is not longer than it.
    """
    if length <= tile:
        return [0]
    stride = max(1, int(tile * (1 - OVERLAP)))
    gaps = -(-(length - tile) // stride)
    return [round(index * (length - tile) / gaps) for index in range(gaps + 1)]


def blend_weights(starts: Sequence[int], tile: int, length: int) -> Tensor:
    """The weight of each pixel of each tile along a side of `length` pixels, (n, tile).

    A raised cosine `sin^2(pi (i + 1/2) / tile)`, divided by the sum over the tiles that cover the pixel: at every pixel
    the weights sum to one, and a tile fades to nothing where another one goes on.
    """
    window = torch.sin(torch.pi * (torch.arange(tile, dtype=torch.float64) + 0.5) / tile) ** 2
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + tile] += window
    return torch.stack([window / total[start : start + tile] for start in starts]).float()


def align_tiles(tiles: Tensor, coarse: Tensor, shrink: Sequence[float]) -> Tensor:
    """`scale * tile + shift`, the least-squares fit of each tile to `coarse` at its place; all (N, h, w).

    The fit sees both averaged down by the factors `shrink`, to the pixels that `coarse` was made of: detail that it
    cannot hold would count as noise in the tile and reduce the scale. A tile that is constant or falls where `coarse`
    rises has nothing to add: `coarse` stays there. NaN and infinity in a tile stay too.
    """
    height, width = (max(1, round(side * factor)) for side, factor in zip(tiles.shape[1:], shrink, strict=True))
    small_tiles, small_coarse = (F.adaptive_avg_pool2d(maps, (height, width)) for maps in (tiles, coarse))
    scale, shift = fit_least_squares(small_tiles, small_coarse, torch.ones_like(small_tiles, dtype=torch.bool))
    scale, shift = scale[:, None, None], shift[:, None, None]
    return torch.where(scale <= 0, coarse, scale * tiles + shift)
