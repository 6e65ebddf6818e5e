"""Labels on their images: what the doctor says of labels that are right, turned, moved, exchanged or sparse."""

import numpy as np
import pytest
import torch

from depthkit.doctor.alignment import Agreement, correlation, measure
from depthkit.doctor.finding import Level
from depthkit.doctor.labels import check_alignment, check_cameras, check_flips, check_values, is_mirror, judge
from depthkit.types import Sample

NUM, SIZE = 24, 64


@pytest.fixture(scope="module")
def scenes():
    """Images of boxes in random colours over a textured ground, and their disparity: nearer boxes cover others."""
    generator = np.random.default_rng(0)
    image = np.empty((NUM, SIZE, SIZE, 3), np.uint8)
    disparity = np.empty((NUM, SIZE, SIZE), np.float32)
    for index in range(NUM):
        image[index] = generator.integers(0, 60) + generator.integers(0, 40, (SIZE, SIZE, 1))
        disparity[index] = 0.1
        for level in (0.2, 0.3, 0.5, 0.8):
            top, left = generator.integers(0, SIZE - 16, 2)
            height, width = generator.integers(8, 32, 2)
            box = np.s_[index, top : top + height, left : left + width]
            image[box] = generator.integers(0, 255, 3)
            disparity[box] = level
    return torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(disparity)


def batch(disparity, valid_mask=None):
    mask = torch.ones_like(disparity, dtype=torch.bool) if valid_mask is None else valid_mask
    keys = [f"key{index}" for index in range(len(disparity))]
    return {"target": disparity, "valid_mask": mask, "key": keys}


def look(image, disparity, valid_mask=None):
    """The finding for labels that come in two batches."""
    whole, half = batch(disparity, valid_mask), len(image) // 2
    parts = [{name: value[part] for name, value in whole.items()} for part in (slice(half), slice(half, None))]
    return check_alignment([image[:half], image[half:]], parts)


def test_labels_that_belong(scenes):
    finding = look(*scenes)
    assert finding.level is Level.ok
    assert finding.values["own"] > finding.values["other_image"] + 0.2


@pytest.mark.parametrize(
    ("axes", "words"), [([2], "mirrored left to right"), ([1], "upside down"), ([1, 2], "turned by 180 degrees")]
)
def test_turned_labels_are_named(scenes, axes, words):
    image, disparity = scenes
    finding = look(image, disparity.flip(axes))
    assert finding.level is Level.problem
    assert words in finding.text


@pytest.mark.parametrize(
    ("down", "right", "level", "words"),
    [
        (5, 0, Level.problem, "lie 5 px too low:"),
        (0, -2, Level.warning, "lie 2 px too far left:"),
        (-3, 4, Level.problem, "lie 3 px too high and 4 px too far right:"),
    ],
)
def test_moved_labels_are_measured(scenes, down, right, level, words):
    image, disparity = scenes
    finding = look(image, disparity.roll((down, right), (1, 2)))
    assert finding.level is level
    assert words in finding.text


def test_a_shift_is_told_in_pixels_of_the_crop(scenes):
    image, disparity = (values.repeat_interleave(4, -1).repeat_interleave(4, -2) for values in scenes)
    finding = look(image, disparity.roll(12, 2))
    assert finding.values["right_px"] == 12


def test_labels_of_other_images(scenes):
    image, disparity = scenes
    finding = look(image, disparity.roll(5, 0))
    assert finding.level in (Level.warning, Level.problem)
    assert "no more of their own image than of another one" in finding.text


def test_edges_with_next_to_nothing_in_common_say_nothing():
    agreement = Agreement(
        own=torch.tensor([0.030, 0.031] * 8), other=torch.zeros(16), turned={"upside down": torch.zeros(16)},
        shifted=torch.full((16, 3, 3), 0.03), chance=0.02, factor=1,
    )  # fmt: skip
    level, text, values = judge(agreement)
    assert values["t"] > 3
    assert level is Level.warning
    assert "too little in common to tell" in text


@pytest.mark.parametrize("kind", ["sparse", "few"])
def test_what_cannot_be_judged_is_skipped(scenes, kind):
    image, disparity = scenes
    sparse = torch.rand(disparity.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    finding = look(image, disparity, sparse) if kind == "sparse" else look(image[:4], disparity[:4])
    assert finding.level is Level.skipped
    assert "it takes 8" in finding.text


def test_holes_do_not_matter(scenes):
    image, disparity = scenes
    mask = torch.ones_like(disparity, dtype=torch.bool)
    mask[:, 20:40] = False
    masked = torch.where(mask, disparity, torch.nan)
    assert look(image, masked, mask).level is Level.ok
    assert measure(image, masked, mask).own.isfinite().all()


def test_correlation_equals_numpys_over_the_mask():
    generator = np.random.default_rng(1)
    first, second = generator.random((2, 2, 6, 7))
    mask = generator.random((2, 6, 7)) < 0.6
    found = correlation(*(torch.from_numpy(values) for values in (first, second, mask)))
    expected = [np.corrcoef(first[i][mask[i]], second[i][mask[i]])[0, 1] for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_values_are_told(scenes):
    finding = check_values([batch(scenes[1])], None)
    assert finding.level is Level.ok
    assert finding.values["max"] == pytest.approx(0.8)
    assert finding.values["valid_share"] == 1


def test_constant_and_empty_labels_are_named(scenes):
    disparity = scenes[1].clone()
    disparity[3] = 0.5
    mask = torch.ones_like(disparity, dtype=torch.bool)
    mask[7] = False
    finding = check_values([batch(disparity, mask)], None)
    assert finding.level is Level.warning
    assert "in 2 of them, which teach nothing: key3, key7" in finding.text


def test_labels_without_pixels_or_with_nan_are_a_problem(scenes):
    disparity = scenes[1].clone()
    assert check_values([batch(disparity, torch.zeros_like(disparity, dtype=torch.bool))], None).level is Level.problem
    disparity[2, 0, 0] = torch.nan
    finding = check_values([batch(disparity)], None)
    assert finding.level is Level.problem
    assert "key2" in finding.text


@pytest.mark.parametrize(("max_depth", "words"), [(0.4, "beyond model.max_depth=0.4"), (80.0, "far above them")])
def test_max_depth_that_does_not_fit_the_data(scenes, max_depth, words):
    finding = check_values([batch(scenes[1])], max_depth)
    assert finding.level is Level.warning
    assert words in finding.text
    assert check_values([batch(scenes[1])], 1.0).level is Level.ok


@pytest.mark.parametrize(("lacking", "level"), [(0, Level.ok), (1, Level.warning), (3, Level.problem)])
def test_images_without_a_camera(lacking, level):
    intrinsics_px = torch.full((3, 4), 50.0)
    intrinsics_px[:lacking, 2] = torch.nan
    finding = check_cameras([{"intrinsics_px": intrinsics_px, "key": ["a", "b", "c"]}])
    assert finding.level is level
    assert finding.values["with_camera"] == 3 - lacking


def test_flips_are_compared_part_by_part(tiny_config, tmp_path, monkeypatch):
    config = tiny_config("student", tmp_path)
    assert check_flips(config.data, "disparity", 0).level is Level.ok
    grid = __import__("depthkit.data.reader").data.reader.target_grid

    def grid_without_flip(window, *sizes):
        rows, cols = grid(window, *sizes)
        return rows, np.sort(cols)

    monkeypatch.setattr("depthkit.data.reader.target_grid", grid_without_flip)
    finding = check_flips(config.data, "disparity", 0)
    assert finding.level is Level.problem
    assert "target of" in finding.text


@pytest.mark.parametrize("frames", [(), (3,)])
def test_a_clip_is_mirrored_frame_by_frame(frames):
    image = np.arange(np.prod([*frames, 4, 6, 3]), dtype=np.uint8).reshape(*frames, 4, 6, 3)
    target = np.arange(24, dtype=np.float32).reshape(4, 6)

    def sample(image, target, cx):
        camera = np.array([5, 5, cx, 2], np.float32)
        mask = target > 3
        return Sample(image=image, target=target, valid_mask=mask, key="a", dataset="b", intrinsics_px=camera)

    straight = sample(image, target, 2.5)
    mirrored = sample(image[..., ::-1, :], target[:, ::-1], 3.5)
    for part in ("image", "target", "valid_mask", "intrinsics_px"):
        assert is_mirror(straight, mirrored, part)
        assert not is_mirror(straight, straight, part)
