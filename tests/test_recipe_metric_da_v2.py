"""Depth Anything V2 in metres: settings against a table written apart from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import depthkit
from depthkit.config import TrainConfig
from depthkit.models import build_model
from depthkit.optim import build_optimizer, build_schedule, parameter_groups
from depthkit.train import run

# metric_depth/train.py, util/loss.py and dist_train.sh of DepthAnything/Depth-Anything-V2.
PUBLISHED: dict[str, dict[str, Any]] = {
    # Validation is ours: real images, where the released code has Hypersim's own.
    "hypersim": {"max_depth": 20.0, "val": ["nyuv2_train"]},
    "vkitti2": {"max_depth": 80.0, "val": ["kitti_eigen652"]},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_settings_are_the_published_ones(compose: Any, name: str) -> None:
    config: TrainConfig = compose(f"experiment=metric_da_v2_{name}", "stage.encoder_weights=bundle")
    table, stage, data, model = PUBLISHED[name], config.stage, config.data, config.model
    assert (stage.name, stage.loss.value, stage.variance_focus, stage.loss_scale) == ("metric", "silog", 0.5, 1.0)
    assert (stage.sample_variance, stage.pooled, stage.decoder_weights) == (False, True, False)
    assert (model.encoder, model.tap_layers, model.max_depth) == (
        "vit_large_patch14_dinov2",
        [4, 11, 17, 23],
        table["max_depth"],
    )
    assert (data.crop_size, data.batch_size, config.sweeps) == ([518, 518], 8 * 4, 120)
    assert (data.augment.horizontal_flip, data.augment.color_jitter, data.augment.camera.zoom) == (0.5, 0.0, [1, 1])
    assert {key: dataset.depth_range for key, dataset in data.labeled.items()} == {name: [0.0, table["max_depth"]]}
    assert list(data.val) == table["val"]
    assert (config.trainer.gradient_clip_val, config.trainer.precision) == (None, "32-true")
    # The best checkpoint is looked for about once an epoch.
    assert config.callbacks["checkpoint"]["best_metric"] == "abs_rel"
    assert 600 < config.trainer.val_check_interval < 2000


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_rates_fall_by_the_power_of_nine_tenths(compose: Any, name: str) -> None:
    """lr * (1 - it / total) ** 0.9, 5e-6 for the encoder and ten times that for the rest."""
    config: TrainConfig = compose(f"experiment=metric_da_v2_{name}")
    with torch.device("meta"):
        model = build_model(config.model)
    optimizer = build_optimizer(parameter_groups(model, model.encoder, config.optim), config.optim)
    schedule = build_schedule(optimizer, config.optim, num_steps=4)
    assert type(optimizer) is torch.optim.AdamW
    for step in range(4):
        found = {
            group["name"]: (group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups
        }
        factor = (1 - step / 4) ** 0.9
        assert found == {
            "encoder": (pytest.approx(5e-6 * factor), (0.9, 0.999), 0.01),
            "decoder": (pytest.approx(5e-5 * factor), (0.9, 0.999), 0.01),
        }
        optimizer.step()
        schedule.step()


@pytest.mark.slow
def test_a_short_run_learns_and_leaves_a_bundle(compose: Any, tiny_world: Path, tiny_settings: Any, tmp_path: Path):
    shown = [item for item in tiny_settings("teacher", tmp_path) if not item.startswith(("stage=", "data=tiny"))]
    config = compose("experiment=tiny_metric", *shown, "stage.encoder_weights=null", "trainer.max_steps=60")
    run(config)
    rows = np.genfromtxt(next(tmp_path.glob("csv/**/metrics.csv")), delimiter=",", names=True)
    losses = rows["losslabeled"][np.isfinite(rows["losslabeled"])]
    assert len(losses) == 60
    assert losses[-10:].mean() < 0.8 * losses[:5].mean()
    prediction = depthkit.load(tmp_path / "bundle").predict(np.zeros((40, 60, 3), np.uint8))
    assert (prediction.kind, prediction.unit) == ("depth", "metres, planar z")
