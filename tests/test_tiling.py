"""Tiles: they cover every pixel, their weights sum to one, and no seam, constant or zero shows in what they make."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.inference.tiling import OVERLAP, Box, align_tiles, blend_tiles, blend_weights, tile_starts

SIDES = [(1, 1), (2, 1), (5, 2), (7, 3), (10, 4), (64, 64), (65, 64), (100, 64), (112, 64), (113, 64), (500, 64)]


@pytest.mark.parametrize(("length", "tile"), SIDES)
def test_tiles_reach_from_border_to_border_and_overlap(length: int, tile: int):
    starts = tile_starts(length, tile)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    assert all(0 < second - first <= max(1, tile * (1 - OVERLAP)) for first, second in pairwise(starts))


def test_a_side_not_longer_than_a_tile_is_one_tile():
    assert tile_starts(40, 64) == tile_starts(64, 64) == [0]


@pytest.mark.parametrize(("length", "tile"), SIDES)
def test_weights_sum_to_one_at_every_pixel(length: int, tile: int):
    starts = tile_starts(length, tile)
    weights = blend_weights(starts, tile, length)
    assert weights.shape == (len(starts), tile)
    assert weights.min() > 0
    total = torch.zeros(length)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones(length))


def test_a_tile_fades_in_without_a_step():
    weights = blend_weights(tile_starts(192, 64), 64, 192)
    assert all(weight[0] < 0.01 for weight in weights[1:])
    assert all(weight[-1] < 0.01 for weight in weights[:-1])
    assert weights.diff(dim=1).abs().max() < 0.15


def waves(height: int, width: int) -> Tensor:
    """A smooth map between 1 and 3."""
    y, x = torch.meshgrid(torch.arange(height) / 20, torch.arange(width) / 20, indexing="ij")
    return 2 + 0.6 * torch.sin(x + 0.3 * y) + 0.4 * torch.cos(0.7 * y)


def tiles_of(truth: Tensor, seed: int = 0):
    """A network that is right up to a random scale and shift of each tile."""
    generator = torch.Generator().manual_seed(seed)

    def predict(boxes: list[Box]) -> Tensor:
        tiles = torch.stack([truth[box] for box in boxes])
        scale, shift = torch.rand(2, len(boxes), 1, 1, generator=generator)
        return (0.1 + 5 * scale) * tiles + shift

    return predict


@pytest.mark.parametrize("size", [(150, 210), (40, 210), (150, 64), (65, 64), (64, 64), (30, 20)])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_tiles_of_any_scale_give_the_true_map(size: tuple[int, int], batch_size: int):
    truth = waves(*size)
    blended = blend_tiles(truth, tiles_of(truth), tile=64, resolution=size, batch_size=batch_size)
    torch.testing.assert_close(blended, truth, rtol=1e-4, atol=1e-4)


def coarse_of(truth: Tensor, resolution: tuple[int, int]) -> Tensor:
    """`truth` as a network sees it that looks at fewer pixels."""
    small = F.adaptive_avg_pool2d(truth[None, None], resolution)
    return F.interpolate(small, truth.shape, mode="bilinear", align_corners=False)[0, 0]


def test_what_a_coarse_map_lacks_leaves_no_seam():
    """The fits differ from tile to tile; blended, their difference changes as slowly at borders as anywhere."""
    truth = waves(160, 240)
    coarse = coarse_of(truth, (20, 30))
    error = blend_tiles(coarse, tiles_of(truth), tile=64, resolution=(20, 30), batch_size=4) - truth
    assert error.abs().max() < 0.04
    assert max(error.diff(dim=dim).abs().max() for dim in (0, 1)) < 0.003


def test_detail_comes_from_the_tiles_and_the_scale_from_the_coarse_map():
    """The coarse map holds nothing of a fine pattern, which at full resolution would more than halve the scale."""
    smooth = waves(160, 240)
    truth = smooth + 0.7 * (-1.0) ** torch.arange(240)
    coarse = coarse_of(smooth, (20, 30))
    blended = blend_tiles(coarse, tiles_of(truth), tile=64, resolution=(20, 30), batch_size=4)
    assert (blended - truth).abs().max() < 0.1


def test_boxes_come_in_batches_of_one_size():
    truth = waves(150, 100)
    seen: list[int] = []

    def predict(boxes: list[Box]) -> Tensor:
        seen.append(len(boxes))
        return torch.stack([truth[box] for box in boxes])

    blend_tiles(truth, predict, tile=64, resolution=(150, 100), batch_size=4)
    assert seen == [4, 2]


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_tiles_leave_the_coarse_map(value: float):
    coarse = waves(150, 100)
    blended = blend_tiles(
        coarse, lambda boxes: torch.full((len(boxes), 64, 64), value), tile=64, resolution=(50, 33), batch_size=4
    )
    torch.testing.assert_close(blended, coarse)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_coarse_map_stays(value: float):
    truth = waves(150, 100)
    coarse = torch.full((150, 100), value)
    blended = blend_tiles(coarse, tiles_of(truth), tile=64, resolution=(50, 33), batch_size=4)
    torch.testing.assert_close(blended, coarse, rtol=1e-4, atol=1e-4)


def test_a_tile_that_falls_where_the_coarse_map_rises_is_not_turned_over():
    coarse = waves(64, 64)[None]
    torch.testing.assert_close(align_tiles(3 - coarse, coarse, (0.5, 0.5)), coarse)


def test_a_tile_that_is_not_finite_does_not_hide():
    coarse = waves(64, 64)[None]
    tile = coarse.clone()
    tile[0, 3, 4] = torch.nan
    assert not align_tiles(tile, coarse, (0.5, 0.5)).isfinite().all()
