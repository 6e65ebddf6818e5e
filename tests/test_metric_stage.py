"""Fine-tuning for depth in metres."""

from pathlib import Path

import numpy as np
import pytest
import torch

import depthkit
from depthkit.bundle import read_facts
from depthkit.checks import validate
from depthkit.config import ConfigError, DepthErrorLoss, MetricConfig
from depthkit.losses import scale_invariant_log_loss, silog_loss
from depthkit.stages.metric import depth_loss
from depthkit.train import build_metric, run

METRIC = ["stage=metric", "protocol=metric", "model.max_depth=80", "data.labeled.source.depth_range=[0,80]"]


def reference(prediction: np.ndarray, depth: np.ndarray, mask: np.ndarray, focus: float) -> float:
    """Depth Anything V2's formula, in float64."""
    difference = np.log(depth[mask]) - np.log(prediction[mask])
    return float(np.sqrt((difference**2).mean() - focus * difference.mean() ** 2))


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("focus", [0.0, 0.5, 0.85, 1.0])
def test_silog_is_its_formula_per_image(focus: float):
    rng = np.random.default_rng(0)
    depth, prediction = rng.uniform(0.5, 80, (2, 3, 20, 30))
    mask = rng.random((3, 20, 30)) < 0.4
    found = silog_loss(*map(torch.from_numpy, (prediction, depth, mask)), variance_focus=focus)
    expected = [reference(*maps, focus) for maps in zip(prediction, depth, mask, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_silog_by_hand():
    """Differences 0 and ln 2: mean ln 2 / 2, mean square ln^2 2 / 2."""
    depth, prediction = torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 2)
    found = silog_loss(prediction, depth, torch.ones(1, 1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(np.log(2) * np.sqrt(1 / 2 - 1 / 8))


@pytest.mark.parametrize("focus", [0.0, 0.5, 1.0])
def test_the_loss_of_eigen_has_no_root(focus: float):
    """Equation 4 of the paper, sums and all."""
    rng = np.random.default_rng(1)
    depth, prediction = rng.uniform(0.5, 80, (2, 1, 20, 30))
    mask = rng.random((1, 20, 30)) < 0.4
    found = scale_invariant_log_loss(*map(torch.from_numpy, (prediction, depth, mask)), variance_focus=focus)
    d, n = np.log(prediction[mask]) - np.log(depth[mask]), mask.sum()
    assert found.item() == pytest.approx((d**2).sum() / n - focus / n**2 * d.sum() ** 2, rel=1e-5)


def test_the_loss_of_zoedepth_has_the_variance_of_a_sample():
    """10 sqrt(var(g) + 0.15 mean(g)^2) with n - 1 in the variance; one pixel has none."""
    rng = np.random.default_rng(2)
    depth, prediction = rng.uniform(0.5, 10, (2, 1, 2, 3))
    every = np.ones((1, 2, 3), bool)
    arguments = [torch.from_numpy(each) for each in (prediction, depth, every)]
    found = 10 * silog_loss(*arguments, variance_focus=0.85, sample_variance=True)
    g = np.log(prediction) - np.log(depth)
    assert found.item() == pytest.approx(10 * np.sqrt(np.var(g, ddof=1) + 0.15 * g.mean() ** 2), rel=1e-5)
    one = torch.zeros(1, 2, 3, dtype=torch.bool)
    one[0, 0, 0] = True
    alone = silog_loss(*arguments[:2], one, variance_focus=0.85, sample_variance=True)
    assert alone.item() == pytest.approx(np.sqrt(0.15) * abs(g[0, 0, 0]), rel=1e-5)


def test_the_stage_takes_the_loss_that_is_named():
    depth, prediction = torch.rand(2, 4, 4) + 1, torch.rand(2, 4, 4) + 1
    maps = (prediction, depth, torch.ones(2, 4, 4, dtype=torch.bool))
    root = depth_loss(MetricConfig(variance_focus=0.3))(*maps)
    square = depth_loss(MetricConfig(loss=DepthErrorLoss.scale_invariant_log, variance_focus=0.3))(*maps)
    torch.testing.assert_close(root**2, square)
    assert depth_loss(MetricConfig(sample_variance=True))(*maps)[0] > depth_loss(MetricConfig())(*maps)[0]


def test_a_wrong_scale_is_seen_below_a_focus_of_1_alone():
    depth = torch.rand(1, 8, 8) + 1
    mask = torch.ones(1, 8, 8, dtype=torch.bool)
    assert silog_loss(2 * depth, depth, mask, variance_focus=1.0).item() == pytest.approx(0, abs=1e-3)
    assert silog_loss(2 * depth, depth, mask).item() == pytest.approx(np.log(2) * np.sqrt(0.5), rel=1e-5)


@pytest.mark.parametrize("case", ["perfect", "empty", "zero"])
def test_silog_and_its_gradient_are_finite(case: str):
    depth = torch.rand(1, 4, 4) + 1
    depth[0, 0, 0] = torch.nan
    mask = torch.full((1, 4, 4), case != "empty")
    mask[0, 0, 0] = False
    prediction = torch.zeros(1, 4, 4) if case == "zero" else depth.nan_to_num(3.0).clone()
    prediction.requires_grad_()
    loss = silog_loss(prediction, depth, mask)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(prediction.grad).all()
    assert (loss > 1) == (case == "zero")


def test_silog_gradcheck():
    torch.manual_seed(0)
    depth = (torch.rand(2, 3, 4) + 1).double()
    prediction = (torch.rand(2, 3, 4) + 1).double().requires_grad_()
    mask = torch.rand(2, 3, 4) < 0.7
    loss = silog_loss(prediction, depth, mask).sum()
    (gradient,) = torch.autograd.grad(loss, prediction)
    numbers = torch.zeros_like(prediction)
    for place in np.ndindex(2, 3, 4):
        moved = prediction.detach().clone()
        moved[place] += 1e-3
        above = silog_loss(moved, depth, mask).sum()
        moved[place] -= 2e-3
        numbers[place] = (above - silog_loss(moved, depth, mask).sum()) / 2e-3
    torch.testing.assert_close(gradient, numbers, rtol=2e-2, atol=2e-3)


# --- the stage -------------------------------------------------------------------------------------------------------


def test_a_run_ends_in_a_bundle_that_predicts_metres(tiny_config, tiny_teacher: Path, tmp_path: Path):
    config = tiny_config("teacher", tmp_path, *METRIC, f"stage.encoder_weights={tiny_teacher}")
    abs_rel = run(config)
    assert abs_rel is not None
    bundle = tmp_path / "bundle"
    assert read_facts(bundle).kind == "depth"
    prediction = depthkit.load(bundle).predict(np.zeros((32, 40, 3), np.uint8))
    assert (prediction.kind, prediction.unit) == ("depth", "metres, planar z")
    assert 0 < prediction.values.max() < 80


@pytest.mark.parametrize("keeps_decoder", [False, True])
def test_the_start_is_the_encoder_or_the_whole_of_a_relative_model(
    tiny_config, tiny_teacher: Path, tmp_path: Path, keeps_decoder: bool
):
    settings = [f"stage.encoder_weights={tiny_teacher}", f"stage.decoder_weights={keeps_decoder}"]
    module = build_metric(tiny_config("teacher", tmp_path, *METRIC, *settings))
    relative = depthkit.bundle.load_model(tiny_teacher)[0].state_dict()
    same = {name: torch.equal(tensor, relative[name]) for name, tensor in module.model.state_dict().items()}
    assert all(value for name, value in same.items() if name.startswith("encoder."))
    assert all(value for name, value in same.items() if name.startswith("decoder.")) == keeps_decoder


def test_pixels_beyond_the_head_are_left_out(tiny_config, tmp_path: Path):
    module = build_metric(tiny_config("teacher", tmp_path, *METRIC))
    image, near = torch.randn(1, 3, 32, 40), torch.full((1, 32, 40), 5.0)
    far = near.clone()
    far[:, :10] = 500
    mask = torch.ones(1, 32, 40, dtype=torch.bool)
    cut = mask.clone()
    cut[:, :10] = False
    losses = [
        module.training_step({"labeled": {"image": image, "target": depth, "valid_mask": valid}}, 0)["loss"]
        for depth, valid in ((far, mask), (near, cut))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["stage=metric", "model.max_depth=null"], r"model\.max_depth=None: .*max_depth must be metres"),
        (["stage=teacher", "model.max_depth=80"], r"model\.max_depth=80.*max_depth must be null"),
    ],
)
def test_a_head_that_does_not_fit_the_stage_is_refused(tiny_config, tmp_path: Path, settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config("teacher", tmp_path, *settings))


def test_a_kept_decoder_needs_a_bundle():
    with pytest.raises(ConfigError, match=r"stage\.decoder_weights=True: must be false, or stage\.encoder_weights"):
        MetricConfig(decoder_weights=True)
