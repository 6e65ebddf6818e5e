"""Protocols: against a numpy float64 reference, and what must not change a number."""

from dataclasses import fields, replace

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from depthkit.evaluation.protocols import (
    aggregate,
    compare,
    evaluated_pixels,
    protocol_id,
    rank_correlation,
    score,
)
from depthkit.evaluation.settings import (
    IN_DISPARITY,
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
    kind_refusal,
)
from depthkit.metrics import METRICS
from depthkit.types import Kind

DISPARITY = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)
DEPTH = ProtocolConfig(name="depth", max_depth=80, alignment=Alignment.depth_least_squares)
RELATIVE = replace(DISPARITY, name="relative", unit=DepthUnit.image_maximum, max_depth=1)
METRIC = replace(DISPARITY, name="metric", alignment=Alignment.none)
PAIRS = ProtocolConfig(
    name="pairs",
    ground_truth=GroundTruth.pairs,
    max_depth=None,
    alignment=Alignment.none,
    metrics=["pair_accuracy"],
    aggregation=Aggregation.pixels,
)


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
    assert protocol_id(replace(DISPARITY, max_jump=1)) == protocol_id(replace(DISPARITY, max_jump=1.0))
    assert protocol_id(replace(DISPARITY, name="mine")) == f"mine@{digest}"


@pytest.mark.parametrize(
    ("protocol", "field", "value"),
    [
        (DISPARITY, "max_depth", 0.0),
        (DISPARITY, "min_depth", -1.0),
        (DISPARITY, "metrics", ["absrel"]),
        (DISPARITY, "metrics", []),
        (DISPARITY, "metrics", ["pair_accuracy"]),
        (DISPARITY, "crop", [0.5, 0.2, 0, 1]),
        (DISPARITY, "crop", [0, 1]),
        (DISPARITY, "window", [352]),
        (DISPARITY, "max_jump", 0.0),
        (DEPTH, "floor", Floor.none),
        (METRIC, "clip", Clip.before_alignment),
        (RELATIVE, "max_depth", 80.0),
        (RELATIVE, "alignment", Alignment.none),
        (PAIRS, "metrics", ["abs_rel"]),
        (PAIRS, "crop", [0, 1, 0, 0.5]),
        (PAIRS, "alignment", Alignment.disparity_least_squares),
    ],
)
def test_impossible_settings_name_the_field(protocol: ProtocolConfig, field: str, value: object):
    with pytest.raises(ValueError, match=f"protocol.{field}"):
        replace(protocol, **{field: value})


def test_what_excludes_each_other_names_both():
    with pytest.raises(ValueError, match=r"protocol.floor='cap': must be image_maximum or none without a cap"):
        replace(DISPARITY, max_depth=None)
    with pytest.raises(ValueError, match=r"protocol.metrics=\['boundary_f1'\]: must be among .* aggregation=pixels"):
        replace(DISPARITY, metrics=["boundary_f1"], aggregation=Aggregation.pixels)
    with pytest.raises(ValueError, match=r"protocol.clip='before_alignment': must be another with unit=image_maximum"):
        replace(DISPARITY, unit=DepthUnit.image_maximum, max_depth=1, clip=Clip.before_alignment)


@pytest.mark.parametrize("protocol", [replace(DEPTH, alignment=a) for a in Alignment if a not in IN_DISPARITY])
def test_disparity_is_refused_where_depth_is_compared_and_metres_are_not(protocol: ProtocolConfig):
    assert "the model predicts disparity" in str(kind_refusal(protocol, "disparity"))
    assert kind_refusal(protocol, "depth") is None


def test_disparity_cannot_be_clipped_to_metres_before_it_is_aligned():
    early = replace(DISPARITY, clip=Clip.before_alignment)
    depth, mask = scene()
    with pytest.raises(ValueError, match=r"protocol\.clip=after_alignment"):
        score(1 / depth, depth, mask, early)
    assert score(depth, depth, mask, early, kind="depth")["abs_rel"].max() < 1e-4
    assert kind_refusal(PAIRS, "disparity") is None


# --- the steps, by hand ----------------------------------------------------------------------------------------------


def row(*values: float, times: int = 4) -> Tensor:
    """(1, times, W): every row alike, so that enough pixels are scored."""
    return torch.tensor(values, dtype=torch.float32).expand(1, times, len(values)).clone()


EVERYWHERE = torch.ones(1, 4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("alignment", "kind", "prediction", "depth", "expected"),
    [
        # scale 4 and shift 3 by least squares over -1, 0, 0, 1
        (Alignment.depth_least_squares, "depth", (-1, 0, 0, 1), (1, 1, 1, 9), (-1, 3, 3, 7)),
        # all but the second lie on 2 p + 1
        (Alignment.depth_robust, "depth", (0, 1, 2, 3), (1, 60, 5, 7), (1, 3, 5, 7)),
        (Alignment.disparity_robust, "disparity", (0, 1, 2, 3), (1, 1 / 60, 1 / 5, 1 / 7), (1, 1 / 3, 1 / 5, 1 / 7)),
        # ln d = 2 ln p + ln 3
        (Alignment.log_least_squares, "depth", (1, 2, 3, 4), (3, 12, 27, 48), (3, 12, 27, 48)),
        # (1 + 4 + 9 + 16 * 2) / (1 + 4 + 9 + 16)
        (Alignment.scale_least_squares, "depth", (1, 2, 3, 4), (1, 2, 3, 8), tuple(46 / 30 * x for x in (1, 2, 3, 4))),
        # medians 2.5 and 5, each the mean of the middle two
        (Alignment.scale_median, "depth", (1, 2, 3, 40), (1, 4, 6, 7), (2, 4, 6, 80)),
        (Alignment.none, "depth", (1, 2, 3, 4), (4, 3, 2, 1), (1, 2, 3, 4)),
    ],
)
def test_each_alignment_by_hand(alignment: Alignment, kind: Kind, prediction, depth, expected):
    protocol = replace(DISPARITY, alignment=alignment, clip=Clip.none)
    aligned = compare(row(*prediction), row(*depth), EVERYWHERE, protocol, kind).prediction
    torch.testing.assert_close(aligned, row(*expected), rtol=1e-4, atol=1e-4)


def test_an_alignment_looks_at_evaluated_pixels_alone():
    protocol = replace(DEPTH, crop=[0.0, 1.0, 0.0, 0.75])
    aligned = compare(row(0, 1, 2, 50), row(1, 3, 5, 1), EVERYWHERE, protocol, "depth").prediction
    torch.testing.assert_close(aligned, row(1, 3, 5, 80))


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        (Resize.bilinear, (1, 1.5, 2.5, 3)),  # pixel centres on pixel centres
        (Resize.bilinear_corners, (1, 5 / 3, 7 / 3, 3)),  # the outer pixels on the outer pixels
        (Resize.nearest, (1, 1, 3, 3)),
    ],
)
def test_a_small_prediction_grows_as_the_protocol_says(resize: Resize, expected):
    comparison = compare(row(1, 3, times=2), row(1, 2, 3, 4), EVERYWHERE, replace(METRIC, resize=resize), "depth")
    torch.testing.assert_close(comparison.prediction, row(*expected))


def test_jumps_in_depth_are_left_out_with_both_sides():
    depth, mask = row(10, 10, 10, 10.9, 12, 12, 12), torch.ones(1, 4, 7, dtype=torch.bool)
    counted = evaluated_pixels(depth, mask, replace(METRIC, max_jump=0.1))[1]
    # 10.9 - 10 spans 0.9 around the third pixel (9 %), 2 around the fourth (18 %) and 1.1 around the fifth (9.2 %)
    assert counted[0, 0].tolist() == [True, True, True, False, True, True, True]
    mask[..., 4:] = False
    assert evaluated_pixels(depth, mask, replace(METRIC, max_jump=0.1))[1][0, 0].tolist() == [True] * 4 + [False] * 3
    too_far = evaluated_pixels(row(10, 10, 100), mask[..., :3], replace(METRIC, max_jump=0.1, max_depth=80))[1]
    assert too_far[0, 0].tolist() == [True, False, False], "a neighbour beyond the cap is a jump all the same"


def test_a_crop_in_pixels_is_a_crop_in_shares():
    depth, mask = scene(size=(1, 20, 40))
    boxes = ([0.1, 0.9, 0.25, 0.5], [2, 18, 10, 20])
    shares, pixels = (evaluated_pixels(depth, mask, replace(DISPARITY, crop=box))[1] for box in boxes)
    assert torch.equal(shares, pixels)
    assert shares[0, 2:18, 10:20].any()


def test_a_number_over_pixels_is_that_of_all_images_as_one():
    """Also for roots; an image without the metric counts for nothing."""
    depth, mask = scene(size=(3, 12, 16))
    prediction = depth * torch.linspace(0.7, 1.4, 16)
    mask[1, :6] = mask[2, 2:] = False
    names = ["abs_rel", "rmse", "rmse_log", "log10", "delta1"]
    protocol = replace(METRIC, metrics=names, aggregation=Aggregation.pixels)
    values = score(prediction, depth, mask, protocol, "depth")
    num_pixels = evaluated_pixels(depth, mask, protocol)[1].sum((1, 2)).numpy()
    as_one = score(prediction.reshape(1, 36, 16), depth.reshape(1, 36, 16), mask.reshape(1, 36, 16), protocol, "depth")
    for name in names:
        pooled = aggregate(protocol, name, np.append(values[name], np.nan), np.append(num_pixels, 5))
        assert pooled == pytest.approx(as_one[name].item(), rel=1e-5)
        mean = aggregate(METRIC, name, np.append(values[name], np.nan), np.append(num_pixels, 5))
        assert mean == pytest.approx(values[name].mean().item(), rel=1e-6)
    resampled = aggregate(protocol, "abs_rel", np.ones((7, 3)), num_pixels)
    np.testing.assert_allclose(resampled, np.ones(7))
    assert np.isnan(aggregate(protocol, "abs_rel", [np.nan, np.nan], [3, 4]))


# --- order -----------------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans():
    depth, mask = scene(size=(2, 30, 40))
    prediction = (1 / depth + 0.3 * torch.randn(depth.shape, generator=torch.Generator().manual_seed(3))).clamp(min=0)
    assert (prediction == 0).sum() > 100, "equal values too"
    found = rank_correlation(prediction, depth, mask)
    for i in range(2):
        expected = scipy.stats.spearmanr(prediction[i][mask[i]], -depth[i][mask[i]]).statistic
        assert found[i].item() == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(rank_correlation(-prediction, depth, mask, "depth"), found)
    assert rank_correlation(torch.ones_like(depth), depth, mask).isnan().all()
    assert rank_correlation(prediction, depth, torch.zeros_like(mask)).isnan().all()


def test_rank_correlation_of_a_large_image_is_that_of_pixels_all_over_it():
    depth, mask = scene(size=(1, 300, 400))
    half = torch.cat([1 / depth[:, :150], depth[:, 150:]], dim=1)
    assert rank_correlation(1 / depth, depth, mask).item() == pytest.approx(1)
    assert abs(rank_correlation(half, depth, mask).item()) < 0.3
    assert torch.equal(rank_correlation(half, depth, mask), rank_correlation(half, depth, mask))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("marked", [True, False])
def test_no_depth_is_0_and_not_evaluated_whatever_the_mask_says(value, marked):
    depth, mask = torch.full((1, 4, 5), 2.0), torch.ones(1, 4, 5, dtype=torch.bool)
    depth[0, 1, 2], mask[0, 1, 2] = value, marked
    for protocol in (RELATIVE, replace(METRIC, max_depth=None, clip=Clip.none)):
        found, is_evaluated = evaluated_pixels(depth, mask, protocol)
        assert found[0, 1, 2] == 0
        assert not is_evaluated[0, 1, 2]
        assert is_evaluated.sum() == 19
        assert found[is_evaluated].unique().tolist() == [1.0 if protocol.unit is DepthUnit.image_maximum else 2.0]
