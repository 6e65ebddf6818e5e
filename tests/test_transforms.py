"""Perturbations: seeded, independent of each other, off by default; CutMix moves image and target together."""

import numpy as np
import pytest
import torch

from depthkit.config import AugmentConfig
from depthkit.data.transforms import PhotometricPerturbation, box_region, cutmix, sample_cutmix_box
from depthkit.types import Batch

ALL = AugmentConfig(color_jitter=0.5, grayscale=0.5, blur=0.5, cutmix=0.5)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """Four coloured quarters."""
    colours = np.array([[[200, 40, 40], [40, 180, 60]], [[50, 60, 220], [200, 190, 40]]], np.uint8)
    return colours.repeat(16, axis=0).repeat(20, axis=1)


def perturb(image: np.ndarray, config: AugmentConfig, seed: int) -> np.ndarray:
    return PhotometricPerturbation(config)(image, np.random.default_rng(seed))


# Photometric


def test_a_generator_gives_one_picture_whatever_was_drawn_before(image: np.ndarray):
    perturbation = PhotometricPerturbation(ALL)
    expected = [perturbation(image, np.random.default_rng(seed)) for seed in range(20)]
    np.random.seed(5)  # noqa: NPY002  (the global generators must not matter)
    torch.manual_seed(5)
    for seed in reversed(range(20)):
        np.testing.assert_array_equal(perturbation(image, np.random.default_rng(seed)), expected[seed])
        np.testing.assert_array_equal(perturb(image, ALL, seed), expected[seed])
    assert len({picture.tobytes() for picture in expected}) > 10


def test_off_is_the_identity_and_the_input_is_left_alone(image: np.ndarray):
    before = image.copy()
    np.testing.assert_array_equal(perturb(image, AugmentConfig(), 0), image)
    for seed in range(10):
        perturb(image, ALL, seed)
    np.testing.assert_array_equal(image, before)


def test_geometry_is_left_alone(image: np.ndarray):
    """The borders between the quarters stay where they are: each quarter keeps one colour away from them."""
    config = AugmentConfig(color_jitter=1, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, blur=1)
    for seed in range(20):
        picture = perturb(image, config, seed)
        assert picture.shape == image.shape
        assert picture.dtype == np.uint8
        quarters = picture.reshape(2, 16, 2, 20, 3).swapaxes(1, 2)[:, :, 6:10, 8:12].reshape(4, 16, 3).astype(int)
        assert np.ptp(quarters, axis=1).max() <= 4
        means = quarters.mean(axis=1)
        assert all(np.abs(means[a] - means[b]).max() > 4 for a in range(4) for b in range(a))


def happened(image: np.ndarray, seed: int) -> tuple[bool, bool]:
    """Whether this seed made the picture grey, and whether it blurred it."""
    picture = perturb(image, AugmentConfig(grayscale=0.5, blur=0.5, blur_sigma=[1.5, 2.0]), seed)
    is_grey = bool((np.ptp(picture.astype(int), axis=2) == 0).all())
    # The left half of the upper border row is of one colour unless blurred with its neighbour.
    is_blurred = len(np.unique(picture[0, :20].reshape(-1, 3), axis=0)) > 1
    return is_grey, is_blurred


def test_transforms_are_not_driven_by_one_draw(image: np.ndarray):
    grey, blurred = np.array([happened(image, seed) for seed in range(400)]).T
    assert abs(grey.mean() - 0.5) < 0.1
    assert abs(blurred.mean() - 0.5) < 0.1
    assert abs((grey & blurred).mean() - 0.25) < 0.1  # 0.5 if one draw decided both


def test_the_strength_of_the_blur_follows_sigma(image: np.ndarray):
    def edge_width(sigma: float) -> int:
        picture = perturb(image, AugmentConfig(blur=1, blur_sigma=[sigma, sigma]), 0)
        return int((np.abs(np.diff(picture[4, :, 0].astype(int))) > 0).sum())

    assert edge_width(0.5) < edge_width(1.5) < edge_width(3.0)


def test_jitter_stays_within_its_range():
    grey = np.full((8, 8, 3), 100, np.uint8)
    only_brightness = AugmentConfig(color_jitter=1, brightness=0.2, contrast=0, saturation=0, hue=0)
    levels = [perturb(grey, only_brightness, seed)[0, 0, 0] for seed in range(300)]
    assert 79 <= min(levels) < 84
    assert 116 < max(levels) <= 121


# CutMix boxes


def boxes(size: tuple[int, int], config: AugmentConfig, num: int) -> np.ndarray:
    return np.array([sample_cutmix_box(size, config, np.random.default_rng(seed)) for seed in range(num)])


@pytest.mark.parametrize("size", [(518, 518), (96, 160)])
def test_boxes_lie_inside_the_image_and_within_their_ranges(size: tuple[int, int]):
    top, left, height, width = boxes(size, AugmentConfig(cutmix=1), 1500).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) > 0
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]
    # Sides are rounded down to whole pixels.
    assert (height * width <= 0.4 * size[0] * size[1] + 1e-6).all()
    assert ((height + 1) * (width + 1) >= 0.02 * size[0] * size[1]).all()
    assert (height / (width + 1) <= 1 / 0.3).all()
    assert ((height + 1) / width >= 0.3).all()


def test_the_area_of_boxes_is_uniform():
    """Redrawing a box that does not fit must not make large ones rare."""
    _, _, height, width = boxes((518, 518), AugmentConfig(cutmix=1), 3000).T
    area = height * width / 518**2
    counts, _ = np.histogram(area, bins=4, range=(0.02, 0.4))
    np.testing.assert_allclose(counts / 3000, 0.25, atol=0.04)


def test_boxes_come_with_their_probability():
    drawn = boxes((64, 64), AugmentConfig(cutmix=0.3), 2000)[:, 2] > 0
    assert abs(drawn.mean() - 0.3) < 0.04
    assert not boxes((64, 64), AugmentConfig(cutmix=0), 50).any()


# CutMix on a batch


def make_batch(box: list[list[int]]) -> Batch:
    """Image k has the grey level 10 k, the target 1 + k; one mask pixel of each is invalid."""
    num = len(box)
    order = torch.arange(num)
    valid_mask = torch.ones(num, 6, 8, dtype=torch.bool)
    valid_mask[order, 1, order] = False
    return Batch(
        image=(10.0 * order).view(-1, 1, 1, 1).expand(num, 3, 6, 8).clone(),
        target=(1.0 + order).view(-1, 1, 1).expand(num, 6, 8).clone(),
        valid_mask=valid_mask,
        key=[str(i) for i in range(num)],
        dataset=["d"] * num,
        rejections=[],
        cutmix_box=torch.tensor(box),
    )


def test_image_target_and_mask_of_the_partner_move_together():
    box = [[0, 0, 3, 4], [2, 5, 4, 3], [0, 0, 0, 0], [1, 1, 1, 2]]
    before, batch = make_batch(box), make_batch(box)
    region = cutmix(batch)
    for i, partner in enumerate([1, 0, 3, 2]):
        top, left, height, width = box[i]
        inside = np.zeros((6, 8), bool)
        inside[top : top + height, left : left + width] = True
        np.testing.assert_array_equal(region[i].numpy(), inside)
        for name in ("image", "target", "valid_mask"):
            expected = np.where(inside, before[name][partner].numpy(), before[name][i].numpy())
            np.testing.assert_array_equal(batch[name][i].numpy(), expected)


def test_no_box_changes_nothing():
    before, batch = make_batch([[0, 0, 0, 0]] * 4), make_batch([[0, 0, 0, 0]] * 4)
    assert not cutmix(batch).any()
    for name in ("image", "target", "valid_mask"):
        assert torch.equal(batch[name], before[name])


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_partners_never_cross_ranks(num_ranks: int):
    """Cut into equal parts of an even number of images, a batch mixes as it does whole."""
    generator = np.random.default_rng(0)
    box = [list(sample_cutmix_box((6, 8), AugmentConfig(cutmix=1), generator)) for _ in range(8)]
    whole = make_batch(box)
    per_rank = 8 // num_ranks
    parts = []
    for rank in range(num_ranks):
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        part = {name: value[mine] for name, value in make_batch(box).items()}
        cutmix(part)  # type: ignore[arg-type]
        parts.append(part)
    cutmix(whole)
    for name in ("image", "target", "valid_mask"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_box_region_is_the_pixels_of_the_box():
    region = box_region(torch.tensor([[1, 2, 2, 3], [0, 0, 0, 0]]), (4, 6))
    assert region.nonzero().tolist() == [[0, row, col] for row in (1, 2) for col in (2, 3, 4)]
