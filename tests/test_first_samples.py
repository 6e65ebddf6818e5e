"""What the first samples of a data set say before step 1."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from depthkit.config import ConfigError, DataConfig, DatasetConfig
from depthkit.data.datamodule import DepthDataModule
from depthkit.data.pack import main as pack


def write_frames(folder: Path, name: str, num_frames: int = 8, **facts: Any) -> str:
    """The manifest of a video of frames that differ, with labels in metres."""
    rows = []
    for number in range(num_frames):
        image, label = folder / f"{name}{number}.png", folder / f"{name}{number}_depth.png"
        Image.effect_noise((32, 24), 40 + number).convert("RGB").save(image)
        Image.new("I;16", (32, 24), 1000 + number).save(label)
        row = {"id": f"{name}/{number}", "source": name, "rgb": image.name, "label": label.name, "target": "depth"}
        rows.append(row | {"codec": "png16", "scale": 1000, "seq": "walk", "frame": number} | facts)
    index = folder / f"{name}.jsonl"
    index.write_text("\n".join(json.dumps(row) for row in rows))
    assert pack([str(index), "--out", str(folder / "data"), "--workers", "1"]) == 0
    return str(folder / "data" / name / "manifest.json")


K = [30.0, 30.0, 16.0, 12.0]


def data_module(*, learns_normals: bool = False, **groups: dict[str, DatasetConfig]) -> DepthDataModule:
    config = DataConfig(crop_size=[24, 32], batch_size=2, **groups)
    return DepthDataModule(config, seed=0, num_steps=1, multiple=8, learns_normals=learns_normals)


def test_normals_need_a_camera_of_one_data_set_at_least(tmp_path):
    known = DatasetConfig(manifest=write_frames(tmp_path, "known", K=K))
    unknown = DatasetConfig(manifest=write_frames(tmp_path, "unknown"))
    data_module(labeled={"unknown": unknown}).setup("fit")
    data_module(labeled={"unknown": unknown, "known": known}, learns_normals=True).setup("fit")
    with pytest.raises(
        ConfigError, match=r"stage\.normals=True: .*\(unknown\) lack intrinsics_px.*state K in the index"
    ):
        data_module(labeled={"unknown": unknown}, learns_normals=True).setup("fit")


def test_motion_is_judged_by_poses(tmp_path):
    images = {"images": DatasetConfig(manifest=write_frames(tmp_path, "images", K=K))}
    module = data_module(unlabeled=images, val_clips=images)
    module.config.val_clip_frames = 3
    with pytest.raises(ConfigError, match=r"data\.val_clips\.images: .*lack pose.*leave the data set out"):
        module.setup("fit")


def test_a_run_stops_before_its_first_step(tiny_config, tmp_path):
    from depthkit.train import run

    manifest = write_frames(tmp_path, "mine")
    settings = [f"data.labeled.source.manifest={manifest}", "stage.normals=true", "trainer.max_steps=2"]
    with pytest.raises(ConfigError, match=r"stage\.normals=True"):
        run(tiny_config("teacher", tmp_path / "run", *settings))
    assert not list((tmp_path / "run").rglob("*.ckpt"))
