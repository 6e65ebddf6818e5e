"""Choosing images by what several teachers make of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from handmade import DISPARITY, unlabeled_sample, write_dataset

from depthkit.data.decode import encode_disparity
from depthkit.data.manifest import LabelsOf, load_manifest
from depthkit.select import main

KEYS = [f"image_{index:02d}" for index in range(7)]


def scene(index: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    rows, cols = ((np.arange(side) + 0.5) / side for side in size)
    return (1 + rows[:, None] + 0.5 * np.sin(6 * cols + index)).astype(np.float32)


def write_labels(folder: Path, images: Path, maps: list[np.ndarray | None], teacher: str) -> Path:
    samples = {}
    for key, values in zip(KEYS, maps, strict=True):
        if values is None:
            samples[key] = {"json": json.dumps({"rejected": "damaged"}).encode()}
        else:
            png, facts = encode_disparity(values)
            samples[key] = {"disparity.png": png, "json": json.dumps(facts).encode()}
    origin = LabelsOf(
        images="rooms", images_digest=load_manifest(images).digest(), teacher_sha256=teacher * 32, code_version="1"
    )
    return write_dataset(folder, samples, DISPARITY, samples_per_shard=3, labels_of=origin)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    samples = {key: unlabeled_sample(index) for index, key in enumerate(KEYS)}
    return write_dataset(tmp_path / "images", samples, None, samples_per_shard=3)


@pytest.fixture
def first(images: Path, tmp_path: Path) -> Path:
    return write_labels(tmp_path / "first", images, [scene(index) for index in range(7)], "ab")


def chosen(out: Path) -> list[str]:
    samples = json.loads(out.read_text())["samples"]
    starts = {f"train-{number:06d}.tar": 3 * number for number in range(3)}
    return [KEYS[starts[name] + index] for name, indices in samples.items() for index in indices]


def test_the_images_on_which_teachers_differ(images, first, tmp_path, capsys):
    """Scale, shift and size of a label are no difference; another shape is; without a label there is none."""
    maps = [0.3 * scene(index, (48, 64)) + 2 for index in range(7)]
    maps[2], maps[5], maps[6] = maps[2][:, ::-1].copy(), 0.5 * maps[5] + 0.2 * maps[0], None
    second, out = write_labels(tmp_path / "second", images, maps, "cd"), tmp_path / "hard.json"
    assert main([f"labels={first},{second}", f"out={out}", "fraction=0.34"]) == 0
    assert chosen(out) == [KEYS[2], KEYS[5]]
    assert "2 of 6 labeled images in 2 shards, 1 images have no label" in capsys.readouterr().out
    assert json.loads(out.read_text())["labels_digest"] == load_manifest(first).digest()


def test_the_number_is_the_variance_between_labels_over_that_of_their_mean(images, first, tmp_path):
    """By hand: a second label that is mirrored, aligned by numpy's least squares, in float64."""
    second = write_labels(tmp_path / "second", images, [scene(index)[:, ::-1].copy() for index in range(7)], "cd")
    one, other = scene(3).astype(float), scene(3)[:, ::-1].astype(float)
    scale, shift = np.polyfit(other.ravel(), one.ravel(), 1)
    both = np.stack([one, scale * other + shift])
    expected = both.var(0).mean() / both.mean(0).var()
    below, above = (f"max_disagreement={expected * factor}" for factor in (0.98, 1.02))
    found = {}
    for rule in (below, above):
        out = tmp_path / f"{rule}.json"
        found[rule] = KEYS[3] in chosen(out) if main([f"labels={first},{second}", f"out={out}", rule]) == 0 else False
    assert found == {below: False, above: True}


def test_three_teachers(images, first, tmp_path):
    others = []
    for number in range(2):
        maps = [scene(index) for index in range(7)]
        maps[4 + number] = maps[4 + number][:, ::-1].copy()
        others.append(write_labels(tmp_path / f"other{number}", images, maps, "cd"))
    out = tmp_path / "hard.json"
    assert main([f"labels={first},{others[0]},{others[1]}", f"out={out}", "fraction=0.3"]) == 0
    assert chosen(out) == [KEYS[4], KEYS[5]]


def test_labels_of_other_images_are_refused(images, first, tmp_path, capsys):
    samples = {key: unlabeled_sample(index + 1) for index, key in enumerate(KEYS)}
    elsewhere = write_dataset(tmp_path / "elsewhere", samples, None, samples_per_shard=3)
    second = write_labels(tmp_path / "second", elsewhere, [scene(index) for index in range(7)], "cd")
    out = tmp_path / "hard.json"
    assert main([f"labels={first},{second}", f"out={out}", "fraction=0.3"]) == 1
    assert "can only disagree on the same images" in capsys.readouterr().err
    assert main([f"labels={first},{images}", f"out={out}", "fraction=0.3"]) == 1
    assert f"labels={images} is not a pseudo-label set" in capsys.readouterr().err
    assert not out.exists()
