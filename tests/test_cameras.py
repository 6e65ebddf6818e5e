"""Intrinsics in batches: the ray through a point of the image stays the ray through that point of the crop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import labeled_sample, unlabeled_sample, write_dataset

from depthkit.config import DatasetConfig
from depthkit.data.cameras import image_intrinsics, window_intrinsics
from depthkit.data.reader import DatasetReader
from depthkit.data.streams import collate
from depthkit.data.windows import Window
from depthkit.types import Kind, Sample

CAMERA = [50.0, 60.0, 21.0, 15.0]


@pytest.mark.parametrize("flip", [False, True])
def test_a_point_of_the_crop_lies_on_the_ray_of_the_same_point_of_the_image(flip: bool) -> None:
    window = Window(top=6, left=10, height=20, width=30, size=(40, 45), flip=flip)
    fx, fy, cx, cy = window_intrinsics(np.array(CAMERA), window)
    rows, cols = np.random.default_rng(0).uniform(0, 1, (2, 50))  # shares of the window
    x = (10 + 30 * cols - CAMERA[2]) / CAMERA[0]
    y = (6 + 20 * rows - CAMERA[3]) / CAMERA[1]
    crop_cols = 45 * (1 - cols) if flip else 45 * cols
    np.testing.assert_allclose((crop_cols - cx) / fx, -x if flip else x, atol=1e-5)
    np.testing.assert_allclose((40 * rows - cy) / fy, y, atol=1e-5)


def test_a_hand_computed_crop() -> None:
    window = Window(top=2, left=4, height=16, width=16, size=(32, 32), flip=True)
    np.testing.assert_allclose(window_intrinsics(np.array(CAMERA), window), [100, 120, 32 - 34, 26])


def test_intrinsics_of_a_smaller_label_are_brought_to_the_image() -> None:
    facts = {"intrinsics_px": CAMERA, "label_size": [16, 20]}
    np.testing.assert_allclose(image_intrinsics(facts, (32, 60)), [150, 120, 63, 30])


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"intrinsics_px": [1, 2, 3]},
        {"intrinsics_px": [1, 2, 3, "x"]},
        {"intrinsics_px": CAMERA, "camera": "fisheye"},
        {"intrinsics_px": CAMERA, "label_size": [0, 0]},
        {"intrinsics_px": CAMERA, "label_size": "small"},
    ],
    ids=str,
)
def test_a_camera_that_is_not_known_is_nan(facts: dict[str, Any]) -> None:
    assert np.isnan(image_intrinsics(facts, (32, 40))).all()


def read(tmp_path: Path, members: dict[str, bytes], kind: Kind | None, window: Window) -> tuple[Sample, Sample]:
    target = "depth.png" in members
    manifest = write_dataset(tmp_path, {"a": members}, *(() if target else (None,)))
    reader = DatasetReader("rooms", DatasetConfig(manifest=str(manifest)), kind)
    return reader.read(0, 0, lambda size: window), reader.read_whole(0, 0, short_side=64, multiple=8)


def test_crops_and_whole_images_bring_their_camera(tmp_path: Path) -> None:
    window = Window(0, 8, 32, 32, (32, 32))
    members = labeled_sample(0) | {"json": json.dumps({"intrinsics_px": CAMERA}).encode()}
    crop, whole = read(tmp_path, members, "depth", window)
    np.testing.assert_allclose(crop.intrinsics_px, [50, 60, 13, 15])
    np.testing.assert_allclose(whole.intrinsics_px, [100, 120, 42, 30])  # 32 x 40 seen as 64 x 80
    batch = collate([crop, crop])
    assert batch["intrinsics_px"].shape == (2, 4)
    assert str(batch["intrinsics_px"].dtype) == "torch.float32"


@pytest.mark.parametrize("facts", [b"[1, 2]", b"{broken", None], ids=str)
def test_facts_that_are_not_ours_leave_images_readable(tmp_path: Path, facts: bytes | None) -> None:
    members = unlabeled_sample(0) | ({"json": facts} if facts else {})
    crop, _ = read(tmp_path, members, None, Window(0, 8, 32, 32, (32, 32)))
    assert np.isnan(crop.intrinsics_px).all()
