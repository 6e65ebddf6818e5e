"""Protocols: against a numpy float64 reference, and what must not change a number."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch import Tensor

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR
from depthkit.data.facts import known_datasets
from depthkit.evaluation.protocols import compare, protocol_id, score
from depthkit.evaluation.settings import (
    METRIC_NAMES,
    STANDARD_METRICS,
    Aggregation,
    Alignment,
    Clip,
    DepthUnit,
    Floor,
    GroundTruth,
    ProtocolConfig,
    Resize,
)
from depthkit.metrics import METRICS

DISPARITY = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)
DEPTH = ProtocolConfig(name="depth", max_depth=80, alignment=Alignment.depth_least_squares)
RELATIVE = replace(DISPARITY, name="relative", unit=DepthUnit.image_maximum, max_depth=1)
PAIRS = ProtocolConfig(
    name="pairs",
    ground_truth=GroundTruth.pairs,
    max_depth=None,
    alignment=Alignment.none,
    metrics=["pair_accuracy"],
    aggregation=Aggregation.pixels,
)
SHIPPED = sorted(path.stem for path in (CONF_DIR / "protocol").glob("*.yaml"))


def scene(seed: int = 0, size: tuple[int, int, int] = (2, 12, 16)) -> tuple[Tensor, Tensor]:
    """Depth with values below and above the cap, and a mask with holes."""
    rng = np.random.default_rng(seed)
    depth = np.exp(rng.uniform(np.log(0.5), np.log(120), size)).astype(np.float32)
    return torch.from_numpy(depth), torch.from_numpy(rng.random(size) < 0.7)


def reference_abs_rel(
    prediction: np.ndarray, depth: np.ndarray, valid: np.ndarray, cap: float, clamp: bool = True
) -> tuple[float, float]:
    """abs_rel and delta1 of one image in float64: fit in disparity, clamp at 1 / cap, invert."""
    mask = valid & (depth > 1e-3) & (depth <= cap)
    target, values = depth[mask].astype(np.float64), prediction[mask].astype(np.float64)
    columns = np.stack([values, np.ones_like(values)], axis=1)
    aligned = columns @ np.linalg.lstsq(columns, 1 / target, rcond=None)[0]
    aligned = 1 / (np.maximum(aligned, 1 / cap) if clamp else aligned)
    ratio = np.maximum(aligned / target, target / aligned)
    return float(np.mean(np.abs(aligned - target) / target)), float(np.mean(ratio < 1.25))


def shipped(name: str) -> ProtocolConfig:
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(hydra_compose(f"protocol/{name}").protocol)


def test_a_scaled_and_shifted_disparity_is_perfect():
    depth, mask = scene()
    values = score(3.0 / depth + 0.5, depth, mask, DISPARITY)
    assert list(values) == STANDARD_METRICS
    assert list(METRICS) == METRIC_NAMES
    assert values["abs_rel"].max() < 1e-4
    assert values["delta1"].tolist() == [1, 1]


def test_a_scaled_and_shifted_depth_is_perfect_in_depth_and_not_in_disparity():
    depth, mask = scene()
    prediction = 0.2 * depth + 3.0
    assert score(prediction, depth, mask, DEPTH, kind="depth")["abs_rel"].max() < 1e-4
    assert score(prediction, depth, mask, DISPARITY, kind="depth")["abs_rel"].min() > 0.1


def test_metric_depth_is_inverted_for_a_disparity_protocol():
    depth, mask = scene()
    assert score(1.7 * depth, depth, mask, DISPARITY, kind="depth")["abs_rel"].max() < 1e-4


def test_agrees_with_a_float64_reference():
    depth, mask = scene()
    prediction = 1 / depth + 0.05 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(1))
    values = score(prediction, depth, mask, DISPARITY)
    for image in range(2):
        abs_rel, delta1 = reference_abs_rel(prediction[image].numpy(), depth[image].numpy(), mask[image].numpy(), 80)
        assert values["abs_rel"][image].item() == pytest.approx(abs_rel, rel=1e-3)
        assert values["delta1"][image].item() == pytest.approx(delta1, abs=1e-6)


def test_the_clamp_bounds_what_inversion_would_blow_up():
    depth, mask = scene()
    prediction = 1 / depth + 0.05 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(1))
    unclamped, _ = reference_abs_rel(prediction[0].numpy(), depth[0].numpy(), mask[0].numpy(), 80, clamp=False)
    aligned = compare(prediction, depth, mask, DISPARITY).prediction
    assert unclamped > 2 * score(prediction, depth, mask, DISPARITY)["abs_rel"][0].item()
    assert aligned.min() > 0
    assert aligned.max() == 80, "an aligned disparity <= 0 gives the cap"


def test_pixels_outside_range_crop_and_mask_do_not_count():
    depth, mask = scene()
    prediction = 1 / depth
    cropped = replace(DISPARITY, crop=[0.25, 0.75, 0.0, 1.0])
    spoilt = torch.where(mask & (depth <= 80), prediction, 1e4)
    spoilt[:, :3], spoilt[:, 9:] = 1e4, 1e4
    assert score(spoilt, depth, mask, cropped)["abs_rel"].max() < 1e-4
    assert score(spoilt, depth, mask, DISPARITY)["abs_rel"].min() > 0.1
    unmeasured = torch.where(mask, depth, torch.nan)
    torch.testing.assert_close(
        score(prediction, unmeasured, torch.ones_like(mask), cropped), score(prediction, depth, mask, cropped)
    )


def test_the_nyu_crop_is_the_published_box():
    depth = torch.full((1, 480, 640), 2.0)
    mask = compare(1 / depth, depth, torch.ones_like(depth, dtype=torch.bool), shipped("nyu_eigen")).valid_mask[0]
    rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (45, 471, 41, 601)


def test_the_garg_crop_is_the_published_box():
    depth = torch.full((1, 375, 1242), 2.0)
    mask = compare(1 / depth, depth, torch.ones_like(depth, dtype=torch.bool), shipped("kitti_garg")).valid_mask[0]
    rows, cols = mask.any(1).nonzero(), mask.any(0).nonzero()
    assert (rows.min(), rows.max() + 1, cols.min(), cols.max() + 1) == (153, 371, 44, 1197)


def test_the_prediction_is_resized_and_the_ground_truth_is_not():
    depth, mask = scene(size=(2, 24, 32))
    comparison = compare(torch.rand(2, 6, 8), depth, mask, DISPARITY)
    assert comparison.prediction.shape == depth.shape
    assert torch.equal(comparison.target[comparison.valid_mask], depth[comparison.valid_mask])


def test_relative_ground_truth_needs_no_unit():
    depth, mask = scene()
    prediction = 1 / depth + 0.01
    small, large = (score(prediction, depth * unit, mask, RELATIVE) for unit in (0.01, 1000))
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    assert compare(prediction, depth, mask, RELATIVE).prediction.max() <= 1


def test_a_disparity_model_is_refused_in_depth_space():
    depth, mask = scene()
    with pytest.raises(ValueError, match=r"predicts disparity.*use an affine_disparity protocol"):
        score(1 / depth, depth, mask, DEPTH, kind="disparity")


def test_too_few_pixels_give_nan_and_leave_the_other_image_alone():
    depth, mask = scene()
    mask[0] = False
    mask[0, 0, :9] = True
    values = score(1 / depth, depth.clamp(max=50), mask, DISPARITY)["abs_rel"]
    assert values[0].isnan()
    assert values[1] >= 0


def test_the_id_changes_with_every_setting_that_changes_a_number():
    changed = {
        "window": [10, 10],
        "min_depth": 0.1,
        "max_depth": 10,
        "crop": [0.0, 1.0, 0.0, 0.5],
        "max_jump": 0.1,
        "flip": True,
        "resize": Resize.nearest,
        "alignment": Alignment.depth_least_squares,
        "floor": Floor.image_maximum,
        "clip": Clip.none,
        "aggregation": Aggregation.pixels,
    }
    others = [replace(DISPARITY, **{name: value}) for name, value in changed.items()]
    others += [
        replace(DISPARITY, unit=DepthUnit.image_maximum, max_depth=1.0),
        replace(DISPARITY, max_depth=1.0),
        PAIRS,
    ]
    assert len({protocol_id(protocol).split("@")[1] for protocol in [DISPARITY, *others]}) == 1 + len(others)
    told = {field.name for field in fields(ProtocolConfig)} - {"name", "datasets", "metrics"}
    assert changed.keys() | {"unit", "ground_truth"} == told


def test_the_id_is_the_same_for_what_computes_the_same():
    name, digest = protocol_id(DISPARITY).split("@")
    assert name == "disparity"
    assert len(digest) == 8
    assert protocol_id(replace(DISPARITY, max_depth=80.0, metrics=["rmse"])) == protocol_id(DISPARITY)
    assert protocol_id(replace(DISPARITY, name="mine")) == f"mine@{digest}"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_protocols_carry_the_name_of_their_file(name: str):
    assert shipped(name).name == name


def test_shipped_protocols_are_all_different():
    """MiDaS's are those of affine_disparity with a cap and data sets of their own, and rightly have the same hash."""
    protocols = [(shipped(name), protocol_id(shipped(name)).split("@")[1]) for name in SHIPPED]
    assert len({(digest, str(protocol.datasets)) for protocol, digest in protocols}) == len(SHIPPED) > 3


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_protocols_name_data_sets_that_there_are(name: str):
    assert set(shipped(name).datasets or []) <= set(known_datasets())


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_depth", 0.0), ("metrics", ["absrel"]), ("metrics", []), ("crop", [0.5, 0.2, 0, 1]), ("crop", [0, 1])],
)
def test_impossible_settings_name_the_field(field: str, value: object):
    with pytest.raises(ValueError, match=f"protocol.{field}"):
        replace(DISPARITY, **{field: value})
