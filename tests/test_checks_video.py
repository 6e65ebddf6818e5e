"""Settings of clips that cannot work are refused while composing, with the values and the cure."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from handmade import unlabeled_sample, write_dataset

from depthkit.checks import check_streams, check_validation, check_video, num_steps
from depthkit.config import ConfigError, DatasetConfig, TrainConfig, VideoConfig, WorldConfig
from depthkit.data.clips import check_clips
from depthkit.data.manifest import load_manifest, save_manifest


@pytest.fixture
def walk(tmp_path: Path) -> DatasetConfig:
    """Ten frames: runs of 6 and 4."""
    path = write_dataset(
        tmp_path / "walk", {f"k{i}": unlabeled_sample(i) for i in range(10)}, None, samples_per_shard=10
    )
    manifest = load_manifest(path)
    save_manifest(replace(manifest, shards=(replace(manifest.shards[0], runs=(6, 4)),)), path)
    return DatasetConfig(manifest=str(path))


@pytest.fixture
def config(compose: Any, walk: DatasetConfig) -> TrainConfig:
    composed: TrainConfig = compose("stage=pretrain", "data=tiny_pretrain", "trainer.max_steps=10")
    composed.stage = VideoConfig()
    composed.data = replace(composed.data, unlabeled={"walk": walk}, clip_frames=3, val={}, batch_size=2)
    return composed


def check(config: TrainConfig) -> None:
    check_streams(config)
    check_video(config)
    check_validation(config)


def test_a_video_is_fine_and_its_clips_are_counted(config: TrainConfig, walk: DatasetConfig) -> None:
    check(config)
    config.trainer.max_steps, config.sweeps = -1, 3.0
    assert num_steps(config) == 9, "6 clips, 2 a step, three times"
    config.data.val_clips = {"walk": walk}
    check(config)
    config.trainer.devices = 2
    with pytest.raises(ConfigError, match=r"the 1 validation images are at least one for each of 2 ranks"):
        check(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_frames": None}, r"data\.clip_frames=None: .*at least 2: stage=video learns from clips"),
        ({"clip_frames": 4, "clip_stride": 2}, r"data\.unlabeled\.walk .*longest run has 6 .*clip_stride=2 spans 7"),
        ({"clip_frames": 7}, r"data\.unlabeled\.walk .*longest run has 6 .*spans 7; take shorter clips"),
    ],
    ids=str,
)
def test_clips_that_there_are_not_are_refused(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    config.data = replace(config.data, **settings)
    with pytest.raises(ConfigError, match=message):
        check(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_frames": 1}, r"data\.clip_frames=1: .*one frame shows no motion"),
        ({"clip_stride": 0}, r"data\.clip_stride=0"),
        ({"val_clip_frames": 1}, r"data\.val_clip_frames=1"),
    ],
    ids=str,
)
def test_clips_that_show_no_motion_are_refused(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(config.data, **settings)


def test_perturbations_that_would_be_motion_are_refused(config: TrainConfig) -> None:
    for augment, name in (
        (replace(config.data.augment, cutmix=0.5), "cutmix"),
        (replace(config.data.augment, camera=replace(config.data.augment.camera, rotation=1.0)), "rotation"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}=.* 0 with data\.clip_frames"):
            replace(config.data, augment=augment)


def test_other_stages_read_no_clips(compose: Any, walk: DatasetConfig) -> None:
    config = compose("stage=pretrain", "data=tiny_pretrain", "trainer.max_steps=10", "data.clip_frames=3")
    with pytest.raises(ConfigError, match=r"data\.clip_frames=3: .*null: stage=pretrain reads single images"):
        check(config)
    config.data.clip_frames, config.data.val_clips = None, {"walk": walk}
    with pytest.raises(ConfigError, match=r"data\.val_clips=\['walk'\]: .*empty without data\.clip_frames"):
        check(config)


def test_videos_that_are_single_images_or_still_to_be_rendered(config: TrainConfig, tmp_path: Path) -> None:
    world = WorldConfig(domain="source", split="train", num_images=20, num_frames=5)
    config.data.unlabeled = {"walk": DatasetConfig(manifest=str(tmp_path / "new" / "manifest.json"), world=world)}
    check(config)
    config.trainer.max_steps, config.sweeps = -1, 1.0
    assert num_steps(config) == 6, "four scenes of three clips, 2 a step"
    config.data.unlabeled["walk"].world = replace(world, num_frames=1)
    with pytest.raises(ConfigError, match=r"holds no video, only single images; set world\.num_frames"):
        check(config)
    images = write_dataset(tmp_path / "images", {f"k{i}": unlabeled_sample(i) for i in range(4)}, None)
    config.data.unlabeled = {"images": DatasetConfig(manifest=str(images))}
    with pytest.raises(ConfigError, match=r"data\.unlabeled\.images .*pack it with the facts sequence and frame"):
        check(config)


def test_a_selection_keeps_no_clips(walk: DatasetConfig) -> None:
    with pytest.raises(ConfigError, match=r"selection=chosen\.json keeps single images, which are no clips"):
        check_clips("data.unlabeled.walk", replace(walk, selection="chosen.json"), None, 3, 1)
