"""The metrics against float64 loops and hand-computed values."""

import math

import numpy as np
import pytest
import torch

from depthkit.evaluation.settings import PAIR_METRICS
from depthkit.metrics import IS_LOWER_BETTER, METRICS, compute_metrics

ALL_VALID = torch.ones(1, 1, 2, dtype=torch.bool)
REFERENCES = {
    "abs_rel": lambda p, t: np.mean([abs(a - b) / b for a, b in zip(p, t, strict=True)]),
    "sq_rel": lambda p, t: np.mean([(a - b) ** 2 / b for a, b in zip(p, t, strict=True)]),
    "rmse": lambda p, t: math.sqrt(np.mean([(a - b) ** 2 for a, b in zip(p, t, strict=True)])),
    "rmse_log": lambda p, t: math.sqrt(np.mean([math.log(a / b) ** 2 for a, b in zip(p, t, strict=True)])),
    "log10": lambda p, t: np.mean([abs(math.log10(a / b)) for a, b in zip(p, t, strict=True)]),
    "silog": lambda p, t: reference_silog([math.log(a / b) for a, b in zip(p, t, strict=True)]),
    "silog_half": lambda p, t: half_centred([math.log(a / b) for a, b in zip(p, t, strict=True)]),
    "rmse_log_scale_invariant": lambda p, t: np.std(np.log(p) - np.log(t)),
    "scale_invariant_error": lambda p, t: pairwise_error(np.log(p) - np.log(t)),
    "delta_1_05": lambda p, t: np.mean([max(a / b, b / a) < 1.05 for a, b in zip(p, t, strict=True)]),
    "delta_1_10": lambda p, t: np.mean([max(a / b, b / a) < 1.10 for a, b in zip(p, t, strict=True)]),
    "delta1": lambda p, t: np.mean([max(a / b, b / a) < 1.25 for a, b in zip(p, t, strict=True)]),
    "delta2": lambda p, t: np.mean([max(a / b, b / a) < 1.25**2 for a, b in zip(p, t, strict=True)]),
    "delta3": lambda p, t: np.mean([max(a / b, b / a) < 1.25**3 for a, b in zip(p, t, strict=True)]),
}
BY_HAND = {  # prediction (1, 4), target (2, 4)
    "abs_rel": 0.25,
    "sq_rel": 0.25,
    "rmse": math.sqrt(0.5),
    "rmse_log": math.log(2) / math.sqrt(2),
    "log10": math.log10(2) / 2,
    "silog": 50 * math.log(2),
    "silog_half": math.sqrt(0.375) * math.log(2),
    "rmse_log_scale_invariant": math.log(2) / 2,
    "scale_invariant_error": math.log(2) ** 2 / 4,
    "delta_1_05": 0.5,
    "delta_1_10": 0.5,
    "delta1": 0.5,
    "delta2": 0.5,
    "delta3": 0.5,
    "boundary_f1": 0.25,  # one of four directions has a boundary, which is found
    "boundary_recall": 0.25,
    "edge_abs_rel": 0.25,
    "ordinal_accuracy": 1.0,
}


def reference_silog(errors):
    return 100 * math.sqrt(np.mean([e**2 for e in errors]) - np.mean(errors) ** 2)


def half_centred(errors):
    return math.sqrt(np.mean([e**2 for e in errors]) - 0.5 * np.mean(errors) ** 2)


def pairwise_error(errors):
    """Eigen et al. 2014, equation 2: half the mean squared difference over all pairs of pixels."""
    return np.mean([(a - b) ** 2 for a in errors for b in errors]) / 2


@pytest.fixture(params=METRICS)
def name(request):
    return request.param


@pytest.fixture
def scene():
    """Three images with depths of 1 m to 80 m and relative errors of about 20, 60 and 180 percent."""
    generator = torch.Generator().manual_seed(5)
    target = 1 + 79 * torch.rand(3, 9, 11, generator=generator)
    error = torch.tensor([0.2, 0.6, 1.8])[:, None, None] * torch.rand(3, 9, 11, generator=generator)
    valid_mask = torch.rand(3, 9, 11, generator=generator) < torch.tensor([1.0, 0.7, 0.3])[:, None, None]
    return target * (1 + error), target, valid_mask


def test_every_metric_has_a_reference():
    """Those of edges and order are in the tests of their modules."""
    assert METRICS.keys() == BY_HAND.keys()
    assert METRICS.keys() - REFERENCES.keys() == {
        "boundary_f1",
        "boundary_recall",
        "edge_abs_rel",
        "ordinal_accuracy",
    }
    assert IS_LOWER_BETTER.keys() == METRICS.keys() | set(PAIR_METRICS)


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_the_reference(scene, name):
    expected = [
        REFERENCES[name](p[mask].astype(np.float64), t[mask].astype(np.float64))
        for p, t, mask in zip(*(x.numpy() for x in scene), strict=True)
    ]
    np.testing.assert_allclose(METRICS[name].function(*scene), expected, rtol=1e-6)


def test_by_hand(name):
    prediction, target = torch.tensor([[[1.0, 4.0]]]), torch.tensor([[[2.0, 4.0]]])
    assert METRICS[name].function(prediction, target, ALL_VALID).item() == pytest.approx(BY_HAND[name])


def test_a_perfect_prediction_scores_0_where_lower_is_better_and_1_otherwise(scene, name):
    _, target, valid_mask = scene
    perfect = METRICS[name].function(target, target, valid_mask)
    assert perfect.tolist() == pytest.approx([0.0 if METRICS[name].is_lower_better else 1.0] * 3)


@pytest.mark.parametrize(
    "name", sorted(METRICS.keys() - {"boundary_f1", "boundary_recall"})
)  # this noise makes boundaries
def test_the_worse_image_scores_worse(scene, name):
    good, _, bad = METRICS[name].function(*scene)
    assert good < bad if METRICS[name].is_lower_better else good > bad


@pytest.mark.parametrize(
    ("name", "factor"),
    [("delta_1_05", 1.05), ("delta_1_10", 1.1), ("delta1", 1.25), ("delta2", 1.5625), ("delta3", 1.953125)],
)
def test_delta_excludes_its_threshold_on_both_sides(name, factor):
    inside = torch.tensor([[[factor - 1e-6, 1.0]]]), torch.tensor([[[1.0, factor - 1e-6]]])
    outside = torch.tensor([[[factor, 1.0]]]), torch.tensor([[[1.0, factor]]])
    assert METRICS[name].function(*inside, ALL_VALID).item() == 1
    assert METRICS[name].function(*outside, ALL_VALID).item() == 0


@pytest.mark.parametrize("value", [0.0, -1.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["delta_1_05", "delta_1_10", "delta1", "delta2", "delta3"])
def test_impossible_depth_is_never_within_delta(name, value):
    prediction = torch.tensor([[[value, 1.0]]])
    assert METRICS[name].function(prediction, torch.ones(1, 1, 2), ALL_VALID).item() == 0.5


def test_silog_ignores_scale(scene):
    prediction, target, valid_mask = scene
    silog = METRICS["silog"].function
    torch.testing.assert_close(silog(3 * prediction, target, valid_mask), silog(*scene), rtol=1e-4, atol=0)
    assert (silog(3 * target, target, valid_mask) < 1e-3).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 0.0, -1.0])
def test_pixels_outside_the_mask_do_not_matter(scene, name, garbage):
    prediction, target, valid_mask = scene
    dirty = (torch.where(valid_mask, x, garbage) for x in (prediction, target))
    assert torch.equal(METRICS[name].function(*dirty, valid_mask), METRICS[name].function(*scene))


def test_image_without_valid_pixel_is_nan(scene, name):
    prediction, target, valid_mask = scene
    expected = METRICS[name].function(*scene)
    valid_mask[1] = False
    values = METRICS[name].function(prediction, target, valid_mask)
    assert values.isnan().tolist() == [False, True, False]
    assert torch.equal(values[[0, 2]], expected[[0, 2]])


def test_an_image_counts_alone_as_in_a_batch(scene, name):
    """One image on a CPU is reduced to its valid pixels, a batch is not."""
    alone = torch.cat([METRICS[name].function(*(x[i : i + 1] for x in scene)) for i in range(3)])
    torch.testing.assert_close(alone, METRICS[name].function(*scene), rtol=1e-6, atol=0)
    nothing = METRICS[name].function(*(x[:1] for x in scene[:2]), torch.zeros_like(scene[2][:1]))
    assert nothing.isnan().tolist() == [True]


def test_gradients_end_at_a_metric(scene, name):
    prediction, target, valid_mask = scene
    assert not METRICS[name].function(prediction.requires_grad_(), target, valid_mask).requires_grad


@pytest.mark.parametrize(
    "name", sorted(METRICS.keys() - {"ordinal_accuracy"})
)  # its pairs are numbered in reading order
def test_flip_commutes(scene, name):
    flipped = METRICS[name].function(*(x.flip(2) for x in scene))
    torch.testing.assert_close(flipped, METRICS[name].function(*scene), rtol=1e-5, atol=1e-6)


def test_float32_under_autocast_and_for_bfloat16_input(scene, name):
    function = METRICS[name].function
    expected = function(*scene)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(*scene), expected)
    prediction, target, valid_mask = scene
    low = function(prediction.bfloat16(), target, valid_mask)
    assert low.dtype == torch.float32
    assert torch.equal(low, function(prediction.bfloat16().float(), target, valid_mask))


def test_shapes_that_would_broadcast_are_refused(scene, name):
    prediction, target, valid_mask = scene
    with pytest.raises(AssertionError):
        METRICS[name].function(prediction[:, None], target, valid_mask)


def test_compute_metrics_gives_the_named_ones(scene):
    assert compute_metrics(*scene).keys() == METRICS.keys()
    values = compute_metrics(*scene, names=["delta1", "abs_rel"])
    assert list(values) == ["delta1", "abs_rel"]
    assert torch.equal(values["abs_rel"], METRICS["abs_rel"].function(*scene))


def test_metrics_computed_together_are_those_computed_alone(scene):
    """What they share is not changed by any of them."""
    for names in (list(METRICS), list(METRICS)[::-1]):
        for name, values in compute_metrics(*scene, names=names).items():
            assert torch.equal(values, METRICS[name].function(*scene)), name


@pytest.mark.parametrize("name", REFERENCES)
def test_float32_is_enough_for_a_large_image(name):
    """Half a million pixels, errors of one in a thousand: 1e-6 of the float64 value."""
    generator = torch.Generator().manual_seed(0)
    target = 1 + 79 * torch.rand(1, 375, 1242, generator=generator)
    prediction = target * (1.0005 + 1e-3 * torch.randn(target.shape, generator=generator))
    valid_mask = torch.rand(target.shape, generator=generator) < 0.9
    p, t = (x[valid_mask].double() for x in (prediction, target))
    e, ratio = p.log() - t.log(), torch.maximum(p / t, t / p)
    expected = {
        "abs_rel": ((p - t).abs() / t).mean(),
        "sq_rel": ((p - t) ** 2 / t).mean(),
        "rmse": ((p - t) ** 2).mean().sqrt(),
        "rmse_log": (e**2).mean().sqrt(),
        "log10": (p.log10() - t.log10()).abs().mean(),
        "silog": 100 * e.std(correction=0),
        "silog_half": ((e**2).mean() - 0.5 * e.mean() ** 2).sqrt(),
        "rmse_log_scale_invariant": e.std(correction=0),
        "scale_invariant_error": e.var(correction=0),
        "delta_1_05": (ratio < 1.05).double().mean(),
        "delta_1_10": (ratio < 1.10).double().mean(),
        "delta1": (ratio < 1.25).double().mean(),
        "delta2": (ratio < 1.25**2).double().mean(),
        "delta3": (ratio < 1.25**3).double().mean(),
    }
    value = METRICS[name].function(prediction, target, valid_mask).item()
    assert value == pytest.approx(expected[name].item(), rel=1e-6)


def test_unknown_metric_is_refused_by_name(scene):
    with pytest.raises(ValueError, match=r"'a1'.*delta1"):
        compute_metrics(*scene, names=["abs_rel", "a1"])
