"""Reading one data set: crops with their labels, and which data sets and samples are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import DEPTH, grey_levels, jpeg, labeled_sample, png, pseudo_labels, unlabeled_sample, write_dataset

from depthkit.config import ConfigError, DatasetConfig
from depthkit.data.manifest import load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.windows import Window, full_window, random_window
from depthkit.types import Kind

SIZE = (32, 40)


def open_reader(manifest: Path, kind: Kind | None = "disparity", **config: Any) -> DatasetReader:
    return DatasetReader("rooms", DatasetConfig(manifest=str(manifest), **config), kind)


def whole(size: tuple[int, int]) -> Window:
    return full_window(size, size)


# Crops


def test_a_sample_is_the_crop_with_its_own_depth(tmp_path: Path):
    samples = {f"room_{i:02d}": labeled_sample(i) for i in range(10)}
    manifest = write_dataset(tmp_path, samples)
    disparity, depth = open_reader(manifest), open_reader(manifest, "depth")
    assert disparity.shard_sizes == [8, 2]
    window = Window(4, 10, 24, 24, (24, 24), flip=True)
    for place in ((0, 0), (0, 5), (1, 1)):
        sample = disparity.read(*place, lambda size: window)
        metres = depth.read(*place, lambda size: window)
        assert sample.key == metres.key == f"room_{8 * place[0] + place[1]:02d}"
        assert sample.dataset == "rooms"
        assert sample.rejections == []
        expected = grey_levels(8 * place[0] + place[1], SIZE)[4:28, 10:34][:, ::-1] / 10
        np.testing.assert_allclose(metres.target, expected, rtol=1e-6)
        np.testing.assert_allclose(sample.target, 1 / expected, rtol=1e-6)
        assert sample.target.dtype == np.float32
        assert sample.valid_mask.all()
        assert np.abs(sample.image[..., 0] / 10.0 - expected).max() < 0.5  # the JPEG's error


@pytest.mark.parametrize("size", [(64, 80), (200, 250), (260, 325)])
@pytest.mark.parametrize("label_share", [1, 2])
def test_image_and_label_agree_through_reduced_decoding(tmp_path: Path, size: tuple[int, int], label_share: int):
    """Images up to eight times the crop, so that JPEGs are decoded at a half and a quarter, with random windows."""
    label_size = (size[0] // label_share, size[1] // label_share)
    manifest = write_dataset(tmp_path, {f"k{i}": labeled_sample(i, size, label_size=label_size) for i in range(4)})
    reader = open_reader(manifest, "depth")
    generator = np.random.default_rng(0)
    for index in range(4):
        for _ in range(4):
            sample = reader.read(0, index, lambda size: random_window(size, (32, 32), generator, flip_probability=0.5))
            error = np.abs(sample.image[..., 0] / 10.0 - sample.target)
            step = max(np.abs(np.diff(sample.target, axis=axis)).max() for axis in (0, 1))
            assert step > 0.2
            # A pixel and a half (the window in whole reduced pixels, the nearest label) and what a JPEG changes.
            assert error.max() <= 1.5 * step + 0.3
            assert error.mean() <= 0.5 * step


def test_the_window_is_chosen_from_the_size_of_the_image(tmp_path: Path):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0, (30, 50)), "b": labeled_sample(1, (60, 20))})
    reader = open_reader(manifest)
    seen = []

    def choose(size: tuple[int, int]) -> Window:
        seen.append(size)
        return whole(size)

    shapes = [reader.read(0, i, choose).image.shape for i in range(2)]
    assert seen == [(30, 50), (60, 20)]
    assert shapes == [(30, 50, 3), (60, 20, 3)]


def test_a_whole_image_has_the_models_size_and_a_label_of_its_own_size(tmp_path: Path):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0, (100, 150), label_size=(50, 75))})
    sample = open_reader(manifest, "depth").read_whole(0, 0, short_side=32, multiple=8)
    assert sample.image.shape == (32, 48, 3)
    assert sample.target.shape == (50, 75)
    np.testing.assert_allclose(sample.target * 10, grey_levels(0, (100, 150))[::2, ::2], rtol=1e-6)


def test_without_a_kind_only_images_are_read(tmp_path: Path):
    broken_label = labeled_sample(0) | {"depth.png": b"not read at all"}
    labeled = write_dataset(tmp_path / "labeled", {"a": broken_label})
    unlabeled = write_dataset(tmp_path / "unlabeled", {"a": unlabeled_sample(0)}, None)
    for manifest in (labeled, unlabeled):
        sample = open_reader(manifest, None).read(0, 0, lambda size: Window(0, 0, 32, 32, (16, 16)))
        assert sample.image.shape == (16, 16, 3)
        assert sample.target.shape == sample.valid_mask.shape == (16, 16)
        assert not sample.valid_mask.any()
        assert not sample.target.any()


# What is supervised


@pytest.mark.parametrize("kind", ["disparity", "depth"])
def test_pixels_outside_the_depth_range_are_not_supervised(tmp_path: Path, kind: Kind):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0)})
    sample = open_reader(manifest, kind, depth_range=[5.0, 12.0]).read(0, 0, whole)
    depth = grey_levels(0, SIZE) / 10
    expected = (depth >= 5) & (depth <= 12)
    assert 0 < expected.sum() < expected.size
    inner = (depth > 5.01) & (depth < 11.99)  # the limits themselves are subject to rounding
    np.testing.assert_array_equal(sample.valid_mask[inner], True)
    np.testing.assert_array_equal(sample.valid_mask[(depth < 4.99) | (depth > 12.01)], False)
    assert not sample.target[~sample.valid_mask].any()


def test_sky_is_disparity_zero_and_valid_whatever_the_depth_range(tmp_path: Path):
    depth = np.full(SIZE, 8000, np.uint16)
    depth[:10] = 0  # sky
    depth[10:12] = 0  # holes
    sky = np.zeros(SIZE, np.uint8)
    sky[:10] = 255
    members = {"jpg": jpeg(grey_levels(0, SIZE)), "depth.png": png(depth), "sky.png": png(sky)}
    manifest = write_dataset(tmp_path, {"a": members})
    for config in ({}, {"depth_range": [1.0, 20.0]}):
        sample = open_reader(manifest, **config).read(0, 0, whole)
        assert sample.valid_mask[:10].all()
        assert not sample.target[:10].any()
        assert not sample.valid_mask[10:12].any()
        np.testing.assert_allclose(sample.target[12:], 1 / 8)
    assert not open_reader(manifest, "depth").read(0, 0, whole).valid_mask[:12].any()


# Pseudo-labels


@pytest.fixture
def unlabeled(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "images", {key: unlabeled_sample(i) for i, key in enumerate("abcd")}, None)


@pytest.mark.parametrize("label_size", [SIZE, (16, 24), (64, 72)])
def test_pseudo_labels_come_with_their_images_at_any_size(tmp_path: Path, unlabeled: Path, label_size: tuple[int, int]):
    """A teacher rounds sides to its patch, so aspect and size differ; both cover the same view."""
    labels = pseudo_labels(tmp_path / "labels", unlabeled, list("abcd"), size=label_size)
    reader = open_reader(unlabeled, labels=str(labels))
    sample = reader.read(0, 2, lambda size: Window(8, 4, 16, 16, (16, 16)))
    assert sample.key == "c"
    assert sample.valid_mask.all()
    centres = np.arange(8, 24) + 0.5
    expected = 3 - 2 * (centres / 32 * label_size[0] - 0.5) / (label_size[0] - 1)
    step = 2 / label_size[0]
    assert np.abs(sample.target - expected[:, None]).max() <= 0.5 * step + 1e-3
    assert np.abs(sample.image[..., 0].astype(int) - grey_levels(2, SIZE)[8:24, 4:20]).max() <= 5


def test_pseudo_labels_of_other_images_are_refused(tmp_path: Path, unlabeled: Path):
    other = write_dataset(tmp_path / "other", {key: unlabeled_sample(9) for key in "abcd"}, None)
    labels = pseudo_labels(tmp_path / "labels", other, list("abcd"))
    with pytest.raises(ConfigError) as error:
        open_reader(unlabeled, labels=str(labels))
    for manifest in (unlabeled, other):
        assert load_manifest(manifest).digest()[:12] in str(error.value)
    assert str(labels) in str(error.value)


def test_labels_must_be_a_pseudo_label_set(tmp_path: Path, unlabeled: Path):
    ordinary = write_dataset(tmp_path / "ordinary", {key: labeled_sample(1) for key in "abcd"})
    with pytest.raises(ConfigError, match="not a pseudo-label set"):
        open_reader(unlabeled, labels=str(ordinary))


def test_a_pseudo_label_under_another_key_is_rejected(tmp_path: Path, unlabeled: Path):
    labels = pseudo_labels(tmp_path / "labels", unlabeled, list("abdc"))
    reader = open_reader(unlabeled, labels=str(labels))
    assert reader.read(0, 1, whole).key == "b"
    with pytest.raises(SampleError, match="'d'"):
        reader.read(0, 2, whole)


# Refused data sets


def test_unlabeled_images_cannot_be_learned_from(unlabeled: Path):
    with pytest.raises(ConfigError, match=r"'rooms'.*without labels.*labels="):
        open_reader(unlabeled)


def test_labels_that_are_not_registered_are_refused(tmp_path: Path):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0)}, replace(DEPTH, aligned=False))
    with pytest.raises(ConfigError, match=r"'rooms'.*not registered"):
        open_reader(manifest)


def test_labels_without_a_unit_give_disparity_but_no_depth(tmp_path: Path):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0)}, replace(DEPTH, metric=False))
    assert open_reader(manifest).read(0, 0, whole).valid_mask.all()
    with pytest.raises(ConfigError, match=r"'rooms'.*metres"):
        open_reader(manifest, "depth")


# Broken samples


@pytest.mark.parametrize("label_size", [(40, 32), (32, 32), (64, 80)])
def test_a_label_of_another_view_is_rejected_with_both_sizes(tmp_path: Path, label_size: tuple[int, int]):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0, label_size=label_size)})
    with pytest.raises(SampleError, match=rf"{label_size[0]}x{label_size[1]} .* 32x40"):
        open_reader(manifest).read(0, 0, whole)


@pytest.mark.parametrize("size", [(31, 39), (375, 1242), (480, 641)])
def test_a_label_of_half_the_size_may_be_rounded(tmp_path: Path, size: tuple[int, int]):
    label_size = (size[0] // 2, size[1] // 2)
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0, size, label_size=label_size)})
    assert open_reader(manifest).read(0, 0, whole).target.shape == size


@pytest.mark.parametrize(("facts", "reason"), [(b"{not json", "not JSON"), (b"[1, 2]", "list")])
def test_facts_that_are_no_facts_are_rejected(tmp_path: Path, facts: bytes, reason: str):
    manifest = write_dataset(tmp_path, {"a": labeled_sample(0) | {"json": facts}})
    with pytest.raises(SampleError, match=reason):
        open_reader(manifest).read(0, 0, whole)


def test_a_rejection_names_data_set_shard_and_key(tmp_path: Path):
    manifest = write_dataset(tmp_path, {f"k{i}": labeled_sample(i) for i in range(10)})
    rejection = open_reader(manifest).rejection(1, 1, SampleError("it is grey"))
    assert (rejection.dataset, rejection.key, rejection.reason) == ("rooms", "k9", "it is grey")
    assert rejection.shard == str(tmp_path / "train-000001.tar")


def test_a_rejection_of_an_unreadable_shard_gives_the_place(tmp_path: Path):
    manifest = write_dataset(tmp_path, {f"k{i}": labeled_sample(i) for i in range(4)})
    tar = tmp_path / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:1000])
    reader = open_reader(manifest)
    with pytest.raises(SampleError, match="1000 bytes") as error:
        reader.read(0, 3, whole)
    assert reader.rejection(0, 3, error.value).key == "sample 3"
