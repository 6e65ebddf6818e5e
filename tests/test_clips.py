"""Clips as samples: which frames, one window and one colour for all, their camera and motion, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import grey_levels, jpeg, write_dataset

from depthkit.config import AugmentConfig, CameraAugmentConfig, ConfigError, DataConfig, DatasetConfig, WorldConfig
from depthkit.data.clips import ClipReader, num_clips
from depthkit.data.datamodule import DepthDataModule, WholeImages, build_streams, render_missing, val_readers
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.windows import Window
from depthkit.types import Rejection

CAMERA = [50.0, 60.0, 21.0, 15.0]
RUNS = ((5, 3), (4,))
"""Two shards: frames 0-4 and 5-7, and 8-11; frame n is a grey picture that is brighter by 5 n."""


def pose(number: int) -> np.ndarray:
    """A camera far from the origin that turns by 0.1 and moves on by 0.5 m from frame to frame."""
    angle = 0.1 * number
    matrix = np.eye(4)
    matrix[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    matrix[:3, 3] = [6e6 + 0.25 * number, 1, 4e6 + 0.5 * number]
    return matrix


def frame(number: int, **facts: Any) -> dict[str, bytes]:
    known = {"intrinsics_px": CAMERA, "pose": pose(number).tolist()} | facts
    picture = grey_levels(0, (32, 40)) // 2 + 5 * number
    return {"jpg": jpeg(picture), "json": json.dumps({k: v for k, v in known.items() if v is not None}).encode()}


def write_video(folder: Path, samples: dict[str, dict[str, bytes]] | None = None) -> Path:
    samples = samples or {f"f{n:02d}": frame(n) for n in range(12)}
    path = write_dataset(folder, samples, None, samples_per_shard=8)
    content = json.loads(path.read_text())
    for shard, runs in zip(content["shards"], RUNS, strict=True):
        shard["runs"] = list(runs)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video"))


def clips(video: Path, num_frames: int = 3, stride: int = 1, **settings: Any) -> ClipReader:
    reader = DatasetConfig(manifest=str(video))
    return ClipReader("walk", reader, None, num_frames=num_frames, stride=stride, **settings)


def brightness(image: np.ndarray) -> list[int]:
    """The numbers of the frames, as their pictures show them."""
    first = grey_levels(0, (32, 40)) // 2
    return [round((float(each.mean()) - float(first.mean())) / 5) for each in image]


FULL = Window(0, 0, 32, 40, (32, 40))


@pytest.mark.parametrize(
    ("num_frames", "stride", "every", "expected"),
    [
        (3, 1, 1, [[[0, 1, 2], [1, 2, 3], [2, 3, 4], [5, 6, 7]], [[8, 9, 10], [9, 10, 11]]]),
        (2, 2, 1, [[[0, 2], [1, 3], [2, 4], [5, 7]], [[8, 10], [9, 11]]]),
        (2, 1, 2, [[[0, 1], [2, 3], [5, 6]], [[8, 9], [10, 11]]]),
        (5, 1, 1, [[[0, 1, 2, 3, 4]], []]),
    ],
)
def test_clips_are_the_frames_of_one_run(
    video: Path, num_frames: int, stride: int, every: int, expected: list[list[list[int]]]
) -> None:
    reader = clips(video, num_frames, stride, every=every)
    assert reader.shard_sizes == [len(shard) for shard in expected]
    for shard, numbers in enumerate(expected):
        for index, frames in enumerate(numbers):
            clip = reader.read(shard, index, lambda size: FULL)
            assert brightness(clip.image) == frames
            assert clip.key == f"f{frames[num_frames // 2]:02d}"


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize(("num_frames", "stride", "every"), [(2, 1, 1), (3, 2, 1), (3, 2, 5), (3, 1, 4)])
def test_the_number_of_clips_of_a_run(length: int, num_frames: int, stride: int, every: int) -> None:
    starts = [start for start in range(0, length, every) if start + (num_frames - 1) * stride < length]
    assert num_clips([length], num_frames, stride, every).tolist() == [len(starts)]


@pytest.mark.parametrize("flip", [False, True])
def test_all_frames_share_the_window_and_their_motion_is_that_of_the_pictures(video: Path, flip: bool) -> None:
    """The pose of a mirrored camera moves a mirrored point to the mirror of where the point goes."""
    calls: list[tuple[int, int]] = []

    def choose(size: tuple[int, int]) -> Window:
        calls.append(size)
        return Window(0, 4, 32, 32, (16, 16), flip=flip)

    clip = clips(video).read(0, 1, choose)
    assert calls == [(32, 40)]
    assert clip.image.shape == (3, 16, 16, 3)
    levels = clip.image.astype(int)
    assert (np.abs(np.diff(levels, axis=0) - 5) <= 3).all(), "the same pixels of every frame, 5 levels brighter each"
    np.testing.assert_allclose(clip.intrinsics_px, [25, 30, 16 - 8.5 if flip else 8.5, 7.5])
    assert clip.camera_to_world.dtype == np.float32
    mirror = np.array([-1.0 if flip else 1.0, 1, 1])
    point = np.array([0.3, -0.2, 2.0])  # seen from frame 3
    for place, number in enumerate((1, 2, 3)):
        seen = np.linalg.inv(pose(number)) @ pose(3) @ np.append(point, 1)
        pose_of = clip.camera_to_world.astype(float)
        found = np.linalg.inv(pose_of[place]) @ pose_of[2] @ np.append(mirror * point, 1)
        np.testing.assert_allclose(found[:3], mirror * seen[:3], atol=1e-5)
    np.testing.assert_allclose(clip.camera_to_world[0], np.eye(4), atol=1e-6)


@pytest.mark.parametrize("unknown", [None, [[1, 2], [3, 4]], np.zeros((4, 4)).tolist(), "north"], ids=str)
def test_a_pose_that_is_not_known_is_nan(tmp_path: Path, unknown: Any) -> None:
    samples = {f"f{n:02d}": frame(n, **({"pose": unknown} if n == 2 else {})) for n in range(12)}
    clip = clips(write_video(tmp_path, samples)).read(0, 0, lambda size: FULL)
    assert np.isnan(clip.camera_to_world).any(axis=(1, 2)).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ({"intrinsics_px": None}, "lack intrinsics_px"),
        ({"camera": "fisheye"}, "lack intrinsics_px"),
        ({"jpg": frame(2)["jpg"]}, "frames 1 and 2 .*'f01' are the same picture.*stands still"),
        ({"jpg": b"no image"}, r"frame \+1 of the clip: .*unreadable"),
        ({"jpg": jpeg(grey_levels(0, (32, 48)))}, r"frame \+1.*\(32, 48\) pixels in a video of \(32, 40\)"),
    ],
    ids=str,
)
def test_clips_that_cannot_teach_are_rejected_by_the_key_of_their_middle_frame(
    tmp_path: Path, damaged: dict[str, Any], reason: str
) -> None:
    facts = {name: value for name, value in damaged.items() if name != "jpg"}
    samples = {f"f{n:02d}": frame(n, **(facts if n == 1 else {})) for n in range(12)}
    samples["f02"] |= {"jpg": damaged["jpg"]} if "jpg" in damaged else {}
    if "same picture" in reason:
        samples["f01"]["jpg"] = damaged["jpg"]
    reader = clips(write_video(tmp_path, samples))
    with pytest.raises(SampleError, match=reason) as error:
        reader.read(0, 0, lambda size: FULL)
    assert reader.rejection(0, 0, error.value).key == "f01"
    assert reader.read(0, 3, lambda size: FULL).key == "f06", "other clips are read"


def test_data_sets_without_clips_are_refused(video: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"longest run has 5 frames.*3 frames with data\.clip_stride=3 spans 7"):
        clips(video, 3, 3)
    images = write_dataset(tmp_path, {"a": frame(0), "b": frame(1)}, None)
    with pytest.raises(ConfigError, match=r"holds no video, only single images; pack it with .*seq, frame"):
        clips(images)


# --- streams and batches ---------------------------------------------------------------------------------------------


def data_config(video: Path, **settings: Any) -> DataConfig:
    fields: dict[str, Any] = {"crop_size": [32, 32], "batch_size": 2, "num_workers": 0, "clip_frames": 3}
    return DataConfig(unlabeled={"walk": DatasetConfig(manifest=str(video))}, **(fields | settings))


def batches(config: DataConfig, seed: int = 0, num_steps: int = 4, **position: int) -> list[Any]:
    data = DepthDataModule(config, seed=seed, num_steps=num_steps, multiple=8, target_kind=None)
    return [batch["unlabeled"] for batch in data.train_loader(**position)]


def test_a_batch_of_clips(video: Path) -> None:
    (batch, *_) = batches(data_config(video))
    assert batch["image"].shape == (2, 3, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert batch["camera_to_world"].shape == (2, 3, 4, 4)
    assert batch["intrinsics_px"].shape == (2, 4)
    assert batch["target"].shape == batch["valid_mask"].shape == (2, 32, 32)
    assert not batch["valid_mask"].any()
    data = DepthDataModule(data_config(video), seed=0, num_steps=1, multiple=8, target_kind=None)
    plain = batch["image"].clone()
    normal = data.on_after_batch_transfer({"unlabeled": batch}, 0)["unlabeled"]["image"]
    assert normal.shape == plain.shape
    np.testing.assert_allclose(normal[0, 0, 0], (plain[0, 0, 0] / 255 - 0.485) / 0.229, rtol=1e-5)


def test_every_clip_comes_once_in_a_sweep_wherever_the_run_starts_again(video: Path) -> None:
    config = data_config(video, augment=AugmentConfig(color_jitter=1.0, blur=0.5))
    every = batches(config, num_steps=3)
    keys = [key for batch in every for key in batch["key"]]
    assert sorted(keys) == ["f01", "f02", "f03", "f06", "f09", "f10"]
    (again,) = batches(config, num_steps=3, start_step=2)
    assert torch.equal(again["image"], every[2]["image"])
    assert again["key"] == every[2]["key"]
    assert not torch.equal(batches(config, seed=1, num_steps=1)[0]["image"], every[0]["image"])
    config.num_workers = 2
    for batch, other in zip(every, batches(config, num_steps=3), strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in ("image", "intrinsics_px", "camera_to_world"))


def test_colours_are_those_of_one_camera_and_a_zoom_is_one_of_its_lens(tmp_path: Path) -> None:
    """A video whose frames are hardly different stays one under the strongest perturbation of colours."""
    samples = {f"f{n:02d}": frame(n) for n in range(12)}
    for number in range(12):
        picture = grey_levels(0, (32, 40)) // 2
        picture[number, number] += 100  # JPEG spreads it over its block
        picture[16:] += 4 * (number % 2)
        samples[f"f{number:02d}"]["jpg"] = jpeg(picture, 100)
    camera = CameraAugmentConfig(zoom=[1.25, 1.25], color=1.0, gamma=[0.8, 1.2], channel_gain=[0.5, 1.5])
    augment = AugmentConfig(color_jitter=1.0, hue=0.5, grayscale=0.3, camera=camera, horizontal_flip=0.0)
    config = data_config(write_video(tmp_path, samples), augment=augment)
    for batch in batches(config):
        levels = batch["image"].float()
        change = (levels[:, 1:] - levels[:, :-1]).abs().mean(dim=(2, 3, 4))
        assert change.max() < 12
        np.testing.assert_allclose(batch["intrinsics_px"][:, 0], 50 * 1.25, rtol=0.03)
    assert len({tuple(batch["image"].float().mean(dim=(1, 3, 4)).flatten().tolist()) for batch in batches(config)}) > 1


def test_broken_clips_give_way_and_a_video_of_them_ends_the_run(tmp_path: Path) -> None:
    samples = {f"f{n:02d}": frame(n, intrinsics_px=None if n < 8 else CAMERA) for n in range(12)}
    (stream,) = build_streams(data_config(write_video(tmp_path, samples)), None, seed=0).values()
    loaded = [stream.load(position)[0] for position in range(6)]
    assert {sample.key for sample in loaded} <= {"f09", "f10"}
    assert {rejection.key for sample in loaded for rejection in sample.rejections} == {"f01", "f02", "f03", "f06"}
    samples = {f"f{n:02d}": frame(n, intrinsics_px=None) for n in range(12)}
    (stream,) = build_streams(data_config(write_video(tmp_path / "none", samples)), None, seed=0).values()
    with pytest.raises(SampleError, match=r"16 samples in a row are broken.*\n.* f.*lack intrinsics_px"):
        stream.load(0)


def test_validation_clips_share_no_frame_and_come_after_the_images(video: Path, tiny_world: Path) -> None:
    images = {"rooms": DatasetConfig(manifest=str(tiny_world / "source_val" / "manifest.json"))}
    walk = {"walk": DatasetConfig(manifest=str(video))}
    config = data_config(video, val=images, val_clips=walk, val_clip_frames=2)
    whole = WholeImages(val_readers(config), short_side=64, multiple=8, limit=4)
    batches = [whole[index] for index in range(len(whole))]
    assert [batch["image"].ndim for batch in batches if not isinstance(batch, Rejection)] == [4] * 4 + [5] * 4
    clip = batches[4]
    assert not isinstance(clip, Rejection)
    assert clip["image"].shape == (1, 2, 3, 64, 80)
    assert clip["camera_to_world"].shape == (1, 2, 4, 4)
    np.testing.assert_allclose(clip["intrinsics_px"], [[100, 120, 42, 30]])
    reader = val_readers(config)[1]
    assert reader.shard_sizes == [3, 2]


def test_validation_clips_without_poses_are_rejections(tmp_path: Path) -> None:
    samples = {f"f{n:02d}": frame(n, pose=None if n == 4 else pose(n).tolist()) for n in range(12)}
    config = data_config(write_video(tmp_path, samples))
    config.val_clips, config.val_clip_frames = config.unlabeled, 3
    whole = WholeImages(val_readers(config), short_side=32, multiple=8)
    assert [isinstance(whole[index], Rejection) for index in range(len(whole))] == [False, False, False]
    samples = {f"f{n:02d}": frame(n, pose=None if n == 2 else pose(n).tolist()) for n in range(12)}
    config.val_clips = {"walk": DatasetConfig(manifest=str(write_video(tmp_path / "lost", samples)))}
    rejected = WholeImages(val_readers(config), short_side=32, multiple=8)[0]
    assert isinstance(rejected, Rejection)
    assert (rejected.key, rejected.dataset) == ("f01", "walk")
    assert "lack pose" in rejected.reason


def test_procedural_clips_are_read_with_their_motion(tmp_path: Path) -> None:
    world = WorldConfig(domain="source", split="train", num_images=8, size=[32, 40], num_frames=4, frame_step=3)
    group = {"clips": DatasetConfig(manifest=str(tmp_path / "clips" / "manifest.json"), world=world)}
    render_missing(group)
    assert [shard.runs for shard in load_manifest(tmp_path / "clips" / "manifest.json").shards] == [(4, 4)]
    config = data_config(tmp_path, batch_size=4)
    config.unlabeled = group
    (batch,) = batches(config, num_steps=1)
    steps = batch["camera_to_world"][:, 1:, :3, 3] - batch["camera_to_world"][:, :-1, :3, 3]
    assert (steps.norm(dim=-1) > 0.01).all()
    assert batch["intrinsics_px"].isfinite().all()


def test_shards_without_any_clip_are_passed_over(video: Path, tmp_path: Path) -> None:
    manifest = load_manifest(video)
    for shard in manifest.shards:
        (tmp_path / shard.path).symlink_to(video.parent / shard.path)
    save_manifest(manifest, tmp_path / "manifest.json")
    keys = [key for batch in batches(data_config(tmp_path / "manifest.json", clip_frames=5)) for key in batch["key"]]
    assert set(keys) == {"f02"}
