"""The metric recipes of Depth Anything V2 against their released training code, and their tiny twin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import depthkit
from depthkit.config import Algorithm, DepthErrorLoss, MetricConfig, Schedule, TransferMode
from depthkit.train import run

# metric_depth/train.py and dist_train.sh of Depth-Anything-V2: 8 GPUs x 4 images, 120 epochs; metres.
RANGES = {"hypersim": 20.0, "vkitti2": 80.0}


@pytest.mark.parametrize("name", sorted(RANGES))
def test_settings_are_the_published_ones(compose: Any, name: str):
    config = compose(f"experiment=metric_da_v2_{name}", "stage.encoder_weights=x")
    assert isinstance(config.stage, MetricConfig)
    assert (config.stage.loss, config.stage.variance_focus) == (DepthErrorLoss.silog, 0.5)
    assert (config.stage.sample_variance, config.stage.pooled, config.stage.loss_scale) == (False, False, 1.0)
    assert config.stage.decoder_weights is False
    assert config.model.max_depth == RANGES[name]
    assert config.data.labeled[name].depth_range[1] == RANGES[name]
    assert (config.data.batch_size, config.data.crop_size, config.sweeps) == (32, [518, 518], 120)
    assert (config.data.augment.horizontal_flip, config.data.augment.camera.zoom) == (0.5, [1.0, 1.0])
    optim = config.optim
    assert (optim.algorithm, optim.betas, optim.weight_decay) == (Algorithm.adamw, [0.9, 0.999], 0.01)
    assert (optim.encoder_lr, optim.decoder_lr_multiplier) == (5e-6, 10.0)
    assert (optim.schedule, optim.schedule_power, optim.warmup_steps) == (Schedule.decay, 0.9, 0)
    assert (config.trainer.precision, config.trainer.gradient_clip_val) == ("32-true", None)
    assert config.transfer.mode is TransferMode.full
    assert config.callbacks["checkpoint"]["best_metric"] == "abs_rel"


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
