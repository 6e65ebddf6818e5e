"""What makes the same prediction read as another number, one test for each: the effect is there, and the protocols say
which side they are on. What concerns the run (duplicates, dropped images) is in test_evaluate*.py.
"""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
import torch
from miniatures import pack_dataset, write_image
from shipped import SHIPPED, shipped
from test_datasets_evaluation_outdoor import DATE, DRIVE, kitti, npy
from torch import Tensor

from depthkit.data.quarantine import SampleError
from depthkit.evaluation.ground_truth import Case, EvaluationSet, cut, score_case
from depthkit.evaluation.protocols import aggregate, compare, evaluated_pixels, protocol_id, rank_correlation, score
from depthkit.evaluation.settings import Aggregation, Alignment, Clip, Floor, ProtocolConfig, Resize
from depthkit.types import Prediction

METRIC = ProtocolConfig(name="metric", max_depth=80, alignment=Alignment.none)
DISPARITY = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)


def row(*values: float) -> Tensor:
    """(1, 10, W): every row alike, so that enough pixels are scored."""
    return torch.tensor(values, dtype=torch.float32).expand(1, 10, len(values)).clone()


def abs_rel(prediction: Tensor, depth: Tensor, protocol: ProtocolConfig, kind="disparity") -> float:
    return score(prediction, depth, torch.ones_like(depth, dtype=torch.bool), protocol, kind)["abs_rel"].item()


def read(name: str, root: Path, out: Path) -> EvaluationSet:
    """A miniature of a data set, packed."""
    pack_dataset(name, root, out)
    return EvaluationSet(out / name / "manifest.json")


def abs_rel_of(dataset: EvaluationSet, index: int, depth: np.ndarray, protocol: ProtocolConfig) -> float:
    prediction = Prediction(values=depth.astype(np.float32), kind="depth", unit="m")
    return score_case(dataset.read(0, index), prediction, protocol)["abs_rel"]


# --- ground truth ----------------------------------------------------------------------------------------------------


def test_nyu_filled_depth_is_another_ground_truth(tmp_path: Path):
    """A wall at 2 m whose holes, every fourth column, were filled with 4 m: a perfect model loses |2 - 4| / 4 there."""
    measured = np.full((2, 480, 640), 2, np.float32)
    measured[..., ::4] = 0
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as content:
        content["images"] = np.zeros((2, 3, 640, 480), np.uint8)
        content["rawDepths"] = measured.swapaxes(1, 2)
        content["depths"] = np.where(measured > 0, measured, 4).swapaxes(1, 2)
    scipy.io.savemat(tmp_path / "splits.mat", {"testNdxs": np.uint16([[2]])})
    raw, filled = (read(name, tmp_path, tmp_path / "out") for name in ("nyuv2_raw", "nyuv2_filled"))
    perfect, protocol = np.full((480, 640), 2), shipped("zoedepth_nyu")
    assert abs_rel_of(raw, 0, perfect, protocol) == 0
    assert abs_rel_of(filled, 0, perfect, protocol) == pytest.approx(0.5 / 4)
    assert protocol.datasets == ["nyuv2_raw"]
    assert raw.refusal(protocol) is None
    assert "is defined on nyuv2_raw" in str(filled.refusal(protocol))
    assert filled.refusal(replace(protocol, datasets=None)) is None


def test_kitti_laser_sweeps_are_another_ground_truth(tmp_path: Path):
    """The value of a sweep is x of the laser, 0.27 m behind the camera: a perfect model of a wall loses 0.27 / 27."""
    kitti(tmp_path)
    left, up = (grid.ravel() for grid in np.meshgrid(np.linspace(-20, 20, 60), np.linspace(-12, 12, 60)))
    wall = np.column_stack([np.full(left.size, 27.0), left, up, np.ones(left.size)]).astype("<f4")
    (tmp_path / f"{DATE}/{DRIVE}/velodyne_points/data/{7:010d}.bin").write_bytes(wall.tobytes())
    sweeps, improved = (read(f"kitti_eigen{n}", tmp_path, tmp_path / "out") for n in (697, 652))
    index = sweeps.keys(0).index(next(key for key in sweeps.keys(0) if key.endswith("0000000007")))
    assert abs_rel_of(sweeps, index, np.full((24, 32), 27 - 0.27), METRIC) == pytest.approx(0.27 / 27, rel=1e-4)
    for name, usable, refused in (("sfmlearner", sweeps, improved), ("kitti_garg", improved, sweeps)):
        assert usable.refusal(shipped(name)) is None
        assert "is defined on" in str(refused.refusal(shipped(name)))


def test_diode_edges_are_a_test_of_the_mask(tmp_path: Path):
    """2 m on the left, 8 m on the right; in two columns at the edge the scan says 5 m, and the mask drops one of them.

    A perfect model loses 3 / 5 in the column that stays, one of 31.
    """
    depth, mask = np.full((24, 32, 1), 2, np.float32), np.ones((24, 32), np.float32)
    depth[:, 16:], depth[:, 15:17] = 8, 5
    mask[:, 16] = 0
    folder = tmp_path / "val/outdoor/scene_00020/scan_00180"
    write_image(folder / "a.png")
    npy(folder / "a_depth.npy", depth)
    npy(folder / "a_depth_mask.npy", mask)
    dataset = read("diode_outdoor", tmp_path, tmp_path / "out")
    perfect = np.where(np.arange(32) < 16, 2, 8) * np.ones((24, 1))
    assert abs_rel_of(dataset, 0, perfect, METRIC) == pytest.approx(0.6 / 31)
    assert abs_rel_of(dataset, 0, perfect, replace(METRIC, max_jump=0.1)) == 0
    case = dataset.read(0, 0)
    unmasked = case._replace(depth=depth[..., 0], valid_mask=np.ones_like(case.valid_mask))
    values = score_case(unmasked, Prediction(values=perfect.astype(np.float32), kind="depth", unit="m"), METRIC)
    assert values["abs_rel"] == pytest.approx(2 * 0.6 / 32)


@pytest.mark.parametrize("size", [(6, 8), (17, 23), (24, 32), (96, 128)])
@pytest.mark.parametrize("resize", Resize)
def test_ground_truth_is_never_resized(size: tuple[int, int], resize: Resize):
    rng = np.random.default_rng(0)
    depth = torch.from_numpy(rng.uniform(1, 70, (1, 24, 32)).astype(np.float32))
    mask = torch.from_numpy(rng.random((1, 24, 32)) < 0.5)
    protocol = replace(DISPARITY, resize=resize)
    comparison = compare(torch.rand(1, *size), depth, mask, protocol)
    assert comparison.prediction.shape == depth.shape
    assert torch.equal(comparison.valid_mask, mask)
    assert torch.equal(comparison.target[mask], depth[mask])


# --- crops -----------------------------------------------------------------------------------------------------------

NYU_BOX = (45, 471, 41, 601)
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
EIGEN = (0.3324324, 0.91351351, 0.0359477, 0.96405229)


def box_of(size: tuple[int, int], protocol: ProtocolConfig) -> tuple[int, int, int, int]:
    """First and last + 1 row and column, in the whole image, of what is evaluated."""
    rows, cols = np.indices(size, np.float32)
    whole = Case(np.zeros((*size, 3), np.uint8), 1 + rows, np.ones(size, bool))
    depth, across = cut(whole, protocol).depth, cut(whole._replace(depth=1 + cols), protocol).depth
    everything = replace(protocol, min_depth=0.0, max_depth=1e6)
    mask = evaluated_pixels(torch.from_numpy(depth)[None], torch.ones(1, *depth.shape, dtype=torch.bool), everything)[1]
    down, right = depth[mask[0].numpy()] - 1, across[mask[0].numpy()] - 1
    assert mask.sum() == (np.ptp(down) + 1) * (np.ptp(right) + 1), "a full rectangle"
    return int(down.min()), int(down.max()) + 1, int(right.min()), int(right.max()) + 1


@pytest.mark.parametrize("size", [(375, 1242), (370, 1224), (374, 1238), (376, 1241), (370, 1226)])
@pytest.mark.parametrize(
    ("name", "shares", "window"),
    [
        ("affine_disparity", (0, 1, 0, 1), None),
        ("kitti_garg", GARG, None),
        ("sfmlearner", GARG, None),
        ("eigen2014_kitti", EIGEN, None),
        ("zoedepth_kitti", GARG, (352, 1216)),
        ("marigold_kitti", EIGEN, (352, 1216)),
    ],
)
def test_kitti_crops_are_the_published_rows_and_columns(name, shares, window, size: tuple[int, int]):
    """`int(share * side)`, as the published codes have it, within the window if there is one."""
    height, width = window or size
    top, left = size[0] - height, int((size[1] - width) / 2)
    expected = [int(share * side) for share, side in zip(shares, (height, height, width, width), strict=True)]
    assert box_of(size, shipped(name)) == (
        top + expected[0],
        top + expected[1],
        left + expected[2],
        left + expected[3],
    )


def test_crops_are_different_numbers_of_one_prediction():
    """Far above, near below, and a model that is 10 % off in the upper part: the box decides."""
    depth = torch.linspace(60, 5, 375)[None, :, None].expand(1, 375, 1242).clone()
    prediction = torch.where(torch.arange(375)[:, None] < 200, 1.1 * depth, depth)
    numbers = {}
    for name in ("kitti_garg", "eigen2014_kitti"):
        protocol = replace(METRIC, crop=shipped(name).crop)
        numbers[name] = abs_rel(prediction, depth, protocol, "depth")
    assert numbers["kitti_garg"] == pytest.approx(0.1 * (200 - 153) / (371 - 153), rel=1e-4)
    assert numbers["eigen2014_kitti"] == pytest.approx(0.1 * (200 - 124) / (342 - 124), rel=1e-4)


@pytest.mark.parametrize("name", ["nyu_eigen", "marigold_nyu", "zoedepth_nyu", "eigen2014_nyu"])
def test_the_nyu_crop_is_the_published_box(name: str):
    assert box_of((480, 640), shipped(name)) == NYU_BOX


def test_a_window_needs_image_and_truth_of_one_size():
    protocol, truth = shipped("zoedepth_kitti"), np.ones((375, 1242), np.float32)
    image = np.zeros((375, 1242, 3), np.uint8)
    assert cut(Case(image, truth, truth > 0), protocol).image.shape == (352, 1216, 3)
    for case in (Case(image[::2, ::2], truth, truth > 0), Case(image[:300], truth[:300], truth[:300] > 0)):
        with pytest.raises(SampleError, match=r"protocol.window=\[352, 1216\]"):
            cut(case, protocol)


# --- alignment and clipping ------------------------------------------------------------------------------------------


def test_one_pixel_at_the_horizon_outweighs_all_others():
    """True disparities .1, .1, .1, .4999 over -1, 0, 0, 1: the first is aligned to 2.5e-5: 40 km for 10 m."""
    prediction, depth = row(-1, 0, 0, 1), row(10, 10, 10, 1 / 0.4999)
    unclipped = replace(DISPARITY, floor=Floor.none, clip=Clip.none)
    assert abs_rel(prediction, depth, unclipped) == pytest.approx((3999 + 1.25) / 4, rel=1e-2)
    for clipped in (replace(unclipped, clip=Clip.after_alignment), DISPARITY):
        assert abs_rel(prediction, depth, clipped) == pytest.approx((7 + 0.5 + 0.5 + 0.25) / 4, rel=1e-3)


def test_clipping_before_alignment_is_another_number_than_after():
    """Medians 3 and 1.5; the last of 1, 1, 2, 200 becomes 200 -> 400 -> 80, or 200 -> 80 -> 160, where 5 is true."""
    prediction, depth = row(1, 1, 2, 200), row(1, 2, 4, 5)
    after = replace(METRIC, alignment=Alignment.scale_median)
    before = replace(after, clip=Clip.before_alignment)
    assert abs_rel(prediction, depth, after, "depth") == pytest.approx((1 + 15) / 4)
    assert abs_rel(prediction, depth, before, "depth") == pytest.approx((1 + 31) / 4)
    assert protocol_id(before) != protocol_id(after)


@pytest.mark.parametrize(
    ("floor", "clip", "first"),
    [
        (Floor.cap, Clip.after_alignment, 80),
        (Floor.cap, Clip.none, 80),
        (Floor.image_maximum, Clip.after_alignment, 10),
        (Floor.none, Clip.none, -10),
        (Floor.none, Clip.after_alignment, 1e-3),
    ],
)
def test_a_disparity_aligned_below_zero_is_a_depth_by_decree(floor: Floor, clip: Clip, first: float):
    """Disparity -.1 where 10 m is true: at the cap, at the farthest truth, behind the camera, or at its lens."""
    protocol = replace(DISPARITY, floor=floor, clip=clip)
    prediction, depth = row(-1, 0, 0, 1), row(10, 10, 10, 10 / 9)
    aligned = compare(prediction, depth, depth > 0, protocol).prediction
    torch.testing.assert_close(aligned[0, 0, 0], torch.tensor(float(first)), rtol=1e-4, atol=0)
    expected = (abs(first - 10) / 10 + 2 / 3 + 2 / 3 + 2 / 7) / 4
    assert abs_rel(prediction, depth, protocol) == pytest.approx(expected, rel=1e-4)


def test_every_shipped_fit_in_disparity_has_a_floor():
    assert all(shipped(name).floor is not Floor.none for name in SHIPPED)


# --- averages --------------------------------------------------------------------------------------------------------


def test_pooled_pixels_are_another_number_than_the_mean_over_images():
    """12 pixels that are 50 % and 1 m off, 36 that are 10 % and 3 m off."""
    images, pixels = METRIC, replace(METRIC, aggregation=Aggregation.pixels)
    assert aggregate(images, "abs_rel", [0.5, 0.1], [12, 36]) == pytest.approx(0.3)
    assert aggregate(pixels, "abs_rel", [0.5, 0.1], [12, 36]) == pytest.approx(0.2)
    assert aggregate(images, "rmse", [1, 3], [12, 36]) == pytest.approx(2)
    assert aggregate(pixels, "rmse", [1, 3], [12, 36]) == pytest.approx(((12 * 1 + 36 * 9) / 48) ** 0.5)
    assert protocol_id(images) != protocol_id(pixels)


def test_averaging_with_the_mirror_image_shows_in_the_id():
    assert protocol_id(replace(METRIC, flip=True)) != protocol_id(METRIC)
    assert not METRIC.flip


# --- kind ------------------------------------------------------------------------------------------------------------


def test_depth_passed_as_disparity_shows_in_the_sign_of_the_rank_correlation():
    """The fit turns it round with a negative scale, so that the metrics alone look like those of a weak model."""
    generator = torch.Generator().manual_seed(0)
    depth = 1 + 9 * torch.rand(1, 40, 50, generator=generator)
    mask = torch.rand(1, 40, 50, generator=generator) < 0.7
    noisy = depth * torch.exp(0.1 * torch.randn(1, 40, 50, generator=generator))
    assert score(noisy, depth, mask, DISPARITY)["abs_rel"].item() < 1
    assert rank_correlation(noisy, depth, mask).item() < -0.9
    assert rank_correlation(noisy, depth, mask, "depth").item() > 0.9
    assert rank_correlation(1 / noisy, depth, mask).item() > 0.9
    assert rank_correlation(1 / noisy, depth, mask, "depth").item() < -0.9


def test_invalid_pixels_of_depth_0_do_not_count_where_the_range_begins_at_0():
    depth = torch.tensor([[[0.0, 1.0, 2.0]]])
    protocol = ProtocolConfig(name="from_0", min_depth=0, max_depth=2, alignment=Alignment.none)
    assert evaluated_pixels(depth, torch.ones_like(depth, dtype=torch.bool), protocol)[1].tolist() == [
        [[False, True, True]]
    ]


def test_of_an_odd_number_of_spare_columns_the_larger_part_is_right():
    """KITTI's 1241 columns, of which `int((1241 - 1216) / 2)` = 12 are cut off on the left."""
    numbers = np.arange(5, dtype=np.float32)[None].repeat(3, 0)
    case = Case(numbers[..., None].repeat(3, 2).astype(np.uint8), numbers, numbers >= 0)
    protocol = ProtocolConfig(name="window", window=[2, 2], max_depth=80, alignment=Alignment.none)
    assert cut(case, protocol).depth.tolist() == [[1, 2], [1, 2]]
    assert cut(case, protocol).image[0, :, 0].tolist() == [1, 2]
