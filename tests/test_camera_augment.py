"""Another camera for image and target: seeded, off by default, and both stay one view with the depth that belongs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import DEPTH, jpeg, labeled_sample, png, write_dataset

from depthkit.config import AugmentConfig, CameraAugmentConfig, ConfigError, DataConfig, DatasetConfig
from depthkit.data.datamodule import build_streams
from depthkit.data.streams import Stream
from depthkit.data.transforms import Camera, draw_camera, rotate, take_again
from depthkit.data.windows import random_window
from depthkit.types import Sample

SIZE = (60, 80)
ALL = CameraAugmentConfig(
    zoom=[1.0, 1.5], rotation=5.0, color=0.5, gamma=[0.9, 1.1], brightness=[0.75, 1.25], channel_gain=[0.8, 1.2]
)


def sample(image: np.ndarray, target: np.ndarray) -> Sample:
    intrinsics = np.array([100, 90, 35.0, 20.0], np.float32)
    mask = np.ones(target.shape, bool)
    return Sample(
        image=image.copy(), target=target.copy(), valid_mask=mask, key="k", dataset="d", intrinsics_px=intrinsics
    )


def coordinates() -> tuple[np.ndarray, np.ndarray]:
    """A picture whose red grows to the right and green downwards, and a target that says the same with its numbers."""
    rows, cols = np.indices(SIZE)
    image = np.stack([3 * cols, 4 * rows, np.full(SIZE, 7)], axis=2).astype(np.uint8)
    return image, (1000 * rows + cols).astype(np.float32)


def draws(config: CameraAugmentConfig, num: int = 400) -> list[Camera]:
    return [draw_camera(config, np.random.default_rng(seed)) for seed in range(num)]


# Drawing


def test_off_draws_no_number():
    generator = np.random.default_rng(0)
    assert draw_camera(CameraAugmentConfig(), generator) == Camera()
    assert generator.random() == np.random.default_rng(0).random()


def test_draws_fill_their_ranges():
    cameras = draws(ALL)
    zooms, degrees = (np.array([getattr(camera, name) for camera in cameras]) for name in ("zoom", "degrees"))
    assert 1 <= zooms.min() < 1.02
    assert 1.48 < zooms.max() <= 1.5
    assert -5 <= degrees.min() < -4.8
    assert 4.8 < degrees.max() <= 5
    assert abs(np.corrcoef(zooms, degrees)[0, 1]) < 0.15
    assert abs(np.mean([camera.colors is None for camera in cameras]) - 0.5) < 0.08


def test_colours_are_gamma_brightness_and_gains():
    one = CameraAugmentConfig(color=1, gamma=[0.5, 0.5], brightness=[0.8, 0.8], channel_gain=[1.2, 1.2])
    colors = draws(one, 1)[0].colors
    assert colors is not None
    expected = np.rint(np.clip(255 * 0.8 * 1.2 * np.sqrt(np.arange(256) / 255), 0, 255))
    np.testing.assert_array_equal(colors[:, 0], np.stack([expected] * 3, axis=1))
    gains = np.array(
        [camera.colors[100, 0] / 100 for camera in draws(CameraAugmentConfig(color=1, channel_gain=[0.8, 1.2]))]
    )
    assert abs(np.corrcoef(gains.T)[0, 1]) < 0.15
    assert (gains.min(), gains.max()) == pytest.approx((0.8, 1.2), abs=0.01)


# Applying


@pytest.mark.parametrize(("kind", "factor"), [("depth", 1 / 1.25), ("disparity", 1.25)])
def test_zoom_brings_the_scene_nearer_and_keeps_the_focal_length(kind: Any, factor: float):
    """A window of 1 / 1.25 of the image shows things 1.25 times as large, as at depth / 1.25 with the same lens."""
    image, target = coordinates()
    window = random_window(SIZE, SIZE, np.random.default_rng(0), flip_probability=0, zoom=1.25)
    assert (window.height, window.width) == (48, 64)
    found = sample(image, target)
    found.intrinsics_px[:2] *= 1.25  # as the window leaves them
    take_again(found, Camera(zoom=1.25), kind)
    np.testing.assert_allclose(found.target, target * factor, rtol=1e-6)
    np.testing.assert_allclose(found.intrinsics_px, [100, 90, 35, 20], rtol=1e-6)
    np.testing.assert_array_equal(found.image, image)


@pytest.mark.parametrize("degrees", [-5.0, 3.0, 30.0])
def test_rotation_turns_image_and_target_as_one(degrees: float):
    """Colour and number of every supervised pixel say which place it was; it is the one that the angle says."""
    found = sample(*coordinates())
    rotate(found, degrees)
    seen_rows, seen_cols = np.divmod(found.target, 1000)
    rows, cols = np.indices(SIZE) + 0.5
    angle = np.deg2rad(degrees)  # counter-clockwise as seen, with rows downwards
    right, down = cols - 40, rows - 30
    source_cols = 40 + np.cos(angle) * right - np.sin(angle) * down
    source_rows = 30 + np.sin(angle) * right + np.cos(angle) * down
    mask = found.valid_mask
    assert np.abs(seen_rows + 0.5 - source_rows)[mask].max() < 0.55
    assert np.abs(seen_cols + 0.5 - source_cols)[mask].max() < 0.55
    is_inside = (source_rows > 0.6) & (source_rows < 59.4) & (source_cols > 0.6) & (source_cols < 79.4)
    assert np.abs(found.image[..., 0] / 3 + 0.5 - source_cols)[is_inside].max() < 0.25
    assert np.abs(found.image[..., 1] / 4 + 0.5 - source_rows)[is_inside].max() < 0.25
    is_outside = (source_rows < -0.6) | (source_rows > 60.6) | (source_cols < -0.6) | (source_cols > 80.6)
    assert mask[is_inside].all()
    assert not mask[is_outside].any()
    assert is_outside.any()
    assert not found.target[~mask].any()


def test_rotation_turns_the_principal_point():
    """By 90 degrees counter-clockwise a point right of the middle comes to lie above it."""
    found = sample(np.zeros((80, 80, 3), np.uint8), np.zeros((80, 80), np.float32))
    found.intrinsics_px[2:] = [50, 40]
    rotate(found, 90.0)
    np.testing.assert_allclose(found.intrinsics_px, [100, 90, 40, 30], atol=1e-4)
    found.intrinsics_px[:] = np.nan
    rotate(found, 3.0)
    assert np.isnan(found.intrinsics_px).all()


def test_a_clip_is_coloured_as_its_frames_and_keeps_its_camera():
    """Zoom is a crop alone where there is no target: the motion between frames would not fit another depth."""
    clip = np.random.default_rng(0).integers(0, 256, (3, *SIZE, 3), dtype=np.uint8)
    camera = draw_camera(
        CameraAugmentConfig(zoom=[1.2, 1.2], color=1, channel_gain=[0.8, 1.2]), np.random.default_rng(0)
    )
    found = sample(clip, np.zeros(SIZE, np.float32))
    take_again(found, camera, None)
    np.testing.assert_array_equal(found.intrinsics_px, [100, 90, 35, 20])
    for frame, expected in zip(found.image, clip, strict=True):
        single = sample(expected, np.zeros(SIZE, np.float32))
        take_again(single, camera, None)
        np.testing.assert_array_equal(frame, single.image)
        assert (single.image != expected).any()


def test_a_hole_stays_a_hole():
    found = sample(*coordinates())
    found.valid_mask[20:40, 30:50] = False
    rotate(found, 4.0)
    assert not found.valid_mask[24:36, 34:46].any()


# In the stream


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("rooms"), {f"r{i:02d}": labeled_sample(i, SIZE) for i in range(12)})


def stream(manifest: Path, augment: AugmentConfig, *, size: int = 32) -> Stream:
    config = DataConfig(
        labeled={"rooms": DatasetConfig(manifest=str(manifest))},
        crop_size=[size, size],
        batch_size=4,
        shuffle_block=4,
        augment=augment,
    )
    return build_streams(config, "depth", seed=0)["labeled"]


def test_labeled_samples_get_the_camera_and_nothing_of_the_strong_perturbations(manifest: Path):
    strong = AugmentConfig(color_jitter=1.0, grayscale=1.0, blur=1.0, blur_sigma=[2.0, 2.0])
    plain, other = stream(manifest, AugmentConfig()), stream(manifest, strong)
    seen = stream(manifest, replace(strong, camera=ALL))
    for position in range(12):
        a, b, c = (each.load(position)[0] for each in (plain, other, seen))
        np.testing.assert_array_equal(a.image, b.image)
        assert (a.image != c.image).any()


def test_zoom_shows_less_of_the_image(tmp_path: Path):
    """Grey levels that grow by 2 from column to column grow by 1 from pixel to pixel at a zoom of 2."""
    ramp = np.tile(np.arange(0, 160, 2, dtype=np.uint8), (80, 1))
    members = {"jpg": jpeg(ramp, quality=100), "depth.png": png(ramp.astype(np.uint16) * 100 + 100)}
    path = write_dataset(tmp_path, {"ramp": members})
    for zoom in (1.0, 2.0):
        found = stream(path, AugmentConfig(camera=CameraAugmentConfig(zoom=[zoom, zoom])), size=80).load(0)[0]
        assert abs(int(found.image[40, -1, 0]) - int(found.image[40, 0, 0])) == pytest.approx(158 / zoom, abs=3)


def test_zoom_rotation_and_label_agree_in_the_stream(manifest: Path):
    """The label times the zoom is the depth that the grey level says."""
    zoomed = stream(manifest, AugmentConfig(camera=CameraAugmentConfig(zoom=[1.3, 1.3], rotation=5.0)))
    for position in range(12):
        found = zoomed.load(position)[0]
        assert found.valid_mask.mean() > 0.9
        assert np.abs(found.image[..., 0] / 10 - found.target * 1.3)[found.valid_mask].mean() < 0.6


def test_a_position_is_one_camera(manifest: Path):
    a, b = (stream(manifest, AugmentConfig(camera=ALL)) for _ in range(2))
    first = [a.load(position)[0] for position in range(12)]
    for position in reversed(range(12)):
        again = b.load(position)[0]
        for name in ("image", "target", "valid_mask"):
            np.testing.assert_array_equal(getattr(again, name), getattr(first[position], name))
    assert len({found.target.tobytes() for found in first}) == 12


def test_range_in_metres_is_of_the_scene_not_of_the_picture(tmp_path: Path):
    """A wall at 9 m is within 0 to 10 m whatever the zoom makes of it, one at 11 m is not."""
    samples = {
        f"w{metres}": {"jpg": jpeg(np.full(SIZE, 10 * metres, np.uint8)), "depth.png": png(np.full(SIZE, wall, "u2"))}
        for metres, wall in ((9, 9000), (11, 11000))
    }
    path = write_dataset(tmp_path, samples, DEPTH)
    config = DatasetConfig(manifest=str(path), depth_range=[0.0, 10.0])
    augment = AugmentConfig(camera=CameraAugmentConfig(zoom=[1.5, 1.5]))
    data = DataConfig(labeled={"walls": config}, crop_size=[32, 32], augment=augment)
    found = {s.key: s for s, _ in map(build_streams(data, "depth", seed=0)["labeled"].load, range(2))}
    assert found["w9"].valid_mask.all()
    np.testing.assert_allclose(found["w9"].target, 6.0, rtol=1e-6)
    assert not found["w11"].valid_mask.any()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"zoom": [0.9, 1.0]}, "zoom"),
        ({"zoom": [1.5, 1.2]}, "zoom"),
        ({"gamma": [1.0]}, "gamma"),
        ({"rotation": -1.0}, "rotation"),
        ({"color": 1.5}, "color"),
        ({"channel_gain": [-0.1, 1.0]}, "channel_gain"),
    ],
)
def test_bad_ranges_are_named(settings: dict, name: str):
    with pytest.raises(ConfigError, match=f"data.augment.camera.{name}"):
        CameraAugmentConfig(**settings)
