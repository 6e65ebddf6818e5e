"""The experiments of vid2depth against its published numbers, and the tiny one end to end."""

from pathlib import Path

import pytest

from depthkit.config import Algorithm, ConfigError, DispNetConfig, VideoConfig

# Mahjourian et al. 2018 and tensorflow/models research/vid2depth: train.py, model.py, reader.py, nets.py.
PUBLISHED = {
    "stage.reconstruction_weight": 0.85,
    "stage.ssim_weight": 0.15,
    "stage.smoothness_weight": 0.05,
    "stage.icp_weight": 0.1,
    "stage.num_scales": 4,
    "stage.minimum_reprojection": False,
    "stage.auto_mask": False,
    "stage.normalize_disparity": False,
    "stage.icp_points": None,
    "stage.egomotion.widths": [16, 32, 64, 128, 256, 256, 256],
    "stage.egomotion.search_px": None,
    "model.width_factor": 1.0,
    "data.crop_size": [128, 416],
    "data.clip_frames": 3,
    "data.batch_size": 4,
    "data.augment.horizontal_flip": 0.0,
    "data.augment.camera.zoom": [1.0, 1.15],
    "data.augment.camera.gamma": [0.8, 1.2],
    "data.augment.camera.brightness": [0.5, 2.0],
    "data.augment.camera.channel_gain": [0.8, 1.2],
    "data.augment.camera.color": 1.0,
    "optim.algorithm": Algorithm.adam,
    "optim.encoder_lr": 2e-4,
    "optim.decoder_lr_multiplier": 1.0,
    "optim.betas": [0.9, 0.999],
    "optim.final_lr_fraction": 1.0,
    "optim.warmup_steps": 0,
    "trainer.max_steps": 200_000,
    "trainer.gradient_clip_val": None,
    "protocol.name": "sfmlearner",
}


def value(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("experiment", "stride", "videos"),
    [
        ("vid2depth_kitti", 1, ["kitti"]),
        ("vid2depth_cityscapes", 2, ["cityscapes"]),
        ("vid2depth_cityscapes_kitti", 1, ["kitti"]),
    ],
)
def test_the_published_settings(compose, experiment, stride, videos):
    config = compose(f"experiment={experiment}")
    assert isinstance(config.stage, VideoConfig)
    assert isinstance(config.model, DispNetConfig)
    assert {name: value(config, name) for name in PUBLISHED} == PUBLISHED
    assert config.data.clip_stride == stride
    assert list(config.data.unlabeled) == videos


def test_the_second_phase_begins_where_the_first_one_ends(compose):
    first = Path(compose("experiment=vid2depth_cityscapes").run_dir)
    stage = compose("experiment=vid2depth_cityscapes_kitti").stage
    assert (stage.encoder_weights, stage.decoder_weights) == (str(first / "bundle"), True)
    assert stage.egomotion_weights == str(first / "egomotion")


TINY = [
    "experiment=tiny_vid2depth",
    "data.unlabeled.target.world.num_images=40",
    "data.val.target.world.num_images=10",
    "data.val_clips.target.world.num_images=10",
    "data.num_workers=0",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.clip_frames=null", "data.clip_frames"),
        ("data.clip_frames=1", "at least 2"),
        ("data.val_clip_frames=2", "data.val_clip_frames"),
        ("data.unlabeled.target.world.num_frames=1", "holds no video"),
        ("model.max_depth=80", "max_depth"),
        ("stage.encoder_weights=timm", "timm"),
        ("protocol=metric", "metres"),
    ],
)
def test_what_cannot_work_is_refused_while_composing(compose, tmp_path, override, message):
    from depthkit.checks import validate

    with pytest.raises(ConfigError, match=message):
        validate(compose(*TINY, f"paths.data={tmp_path}", override))


def test_a_model_that_knows_depth_alone_is_to_be_exchanged(compose):
    """Its max_depth, which is null, is not what could be changed."""
    from depthkit.checks import validate

    with pytest.raises(ConfigError, match=r"dispnet predicts depth, and stage=teacher learns disparity; choose"):
        validate(compose("experiment=tiny_teacher", "model=dispnet"))


@pytest.mark.slow
def test_a_short_tiny_run_learns_and_hands_over_both_networks(compose, tmp_path):
    import csv

    import numpy as np

    import depthkit
    from depthkit.egomotion_bundle import load_egomotion
    from depthkit.train import run

    steps = ["trainer.max_steps=60", "optim.warmup_steps=5", "data.batch_size=2"]
    paths = [f"paths.data={tmp_path / 'data'}", f"paths.runs={tmp_path / 'runs'}"]
    run(compose(*TINY, *steps, *paths))
    folder = tmp_path / "runs" / "tiny_vid2depth"
    rows = [row for path in folder.rglob("metrics.csv") for row in csv.DictReader(path.open())]
    losses = [float(row["loss"]) for row in rows if row.get("loss")]
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:10]), losses
    scored = {name for row in rows for name, number in row.items() if number and name.startswith("val/")}
    assert {"val/rank_correlation/spearman", "val/ate/egomotion", "val/ate/constant_motion"} <= scored
    model = depthkit.load(folder / "bundle")
    assert (model.kind, model.unit) == ("depth", "relative")
    prediction = model.predict(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
    assert prediction.values.shape == (64, 96)
    assert np.isfinite(prediction.values).all()
    assert load_egomotion(folder / "egomotion").num_frames == 3
