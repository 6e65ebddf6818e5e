"""Alignment against float64 numpy, and what must not change it."""

import numpy as np
import pytest
import torch

from depthkit.alignment import (
    align_least_absolute,
    align_least_squares,
    align_log_least_squares,
    align_median_scale,
    align_scale_least_squares,
    fit_least_absolute,
    fit_least_squares,
    fit_median_scale,
    masked_mean,
    masked_median,
    normalize_median_mad,
    zero_invalid,
)

HEIGHT, WIDTH = 11, 13
STATISTICS = {
    "mean": lambda prediction, target, valid_mask: masked_mean(prediction, valid_mask),
    "median": lambda prediction, target, valid_mask: masked_median(prediction, valid_mask),
    "normalized": lambda prediction, target, valid_mask: normalize_median_mad(prediction, valid_mask),
    "scale": lambda prediction, target, valid_mask: fit_least_squares(prediction, target, valid_mask)[0],
    "shift": lambda prediction, target, valid_mask: fit_least_squares(prediction, target, valid_mask)[1],
    "median_scale": fit_median_scale,
    "robust": lambda prediction, target, valid_mask: zero_invalid(
        align_least_absolute(zero_invalid(prediction, valid_mask), target, valid_mask), valid_mask
    ),
}


@pytest.fixture
def scene():
    """Three images of different level, spread and number of valid pixels."""
    generator = torch.Generator().manual_seed(1)
    level = torch.tensor([1.0, 20.0, 300.0])[:, None, None]
    prediction = level * (1 + torch.rand(3, HEIGHT, WIDTH, generator=generator))
    target = 0.5 * prediction + torch.rand(3, HEIGHT, WIDTH, generator=generator)
    valid_mask = torch.rand(3, HEIGHT, WIDTH, generator=generator) < torch.tensor([0.9, 0.5, 0.2])[:, None, None]
    return prediction, target, valid_mask


@pytest.fixture(params=STATISTICS)
def statistic(request):
    return STATISTICS[request.param]


def valid_values(values, valid_mask):
    """The valid pixels of each image as a list of float64 arrays."""
    return [image[mask] for image, mask in zip(values.double().numpy(), valid_mask.numpy(), strict=True)]


def reference_median(values):
    return sorted(values)[(len(values) - 1) // 2]


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 3.0, 2.0], 2.0), ([7.0], 7.0), ([0.0, 0.0, 5.0], 0.0)]
)
def test_median_by_hand(values, expected):
    values = torch.tensor(values)[None, None]
    assert masked_median(values, torch.ones_like(values, dtype=torch.bool)).tolist() == [expected]


def test_median_and_normalization_equal_the_reference(scene):
    prediction, _, valid_mask = scene
    medians = masked_median(prediction, valid_mask)
    normalized = normalize_median_mad(prediction, valid_mask)
    for i, values in enumerate(valid_values(prediction, valid_mask)):
        median = reference_median(values)
        assert medians[i].item() == median
        spread = sum(abs(v - median) for v in values) / len(values)
        np.testing.assert_allclose(normalized[i][valid_mask[i]], [(v - median) / spread for v in values], atol=1e-5)
        assert (normalized[i][~valid_mask[i]] == 0).all()


def test_median_passes_its_gradient_to_the_median_pixel():
    values = torch.tensor([[[5.0, 1.0, 3.0, 0.0]]], requires_grad=True)
    masked_median(values, torch.tensor([[[True, True, True, False]]])).sum().backward()
    assert values.grad.tolist() == [[[0, 0, 1, 0]]]


def test_normalization_ignores_scale_and_shift(scene):
    prediction, _, valid_mask = scene
    expected = normalize_median_mad(prediction, valid_mask)
    torch.testing.assert_close(normalize_median_mad(0.3 * prediction + 7, valid_mask), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, 1.0, 12345.678])
@pytest.mark.parametrize("rounding_error", [0.0, 1e-7])
def test_constant_map_normalizes_to_zero_without_gradient(level, rounding_error):
    noise = torch.randn(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    values = (level * (1 + rounding_error * noise)).requires_grad_()
    valid_mask = torch.ones_like(values, dtype=torch.bool)
    normalized = normalize_median_mad(values, valid_mask)
    (normalized * torch.rand(2, HEIGHT, WIDTH)).sum().backward()
    assert (normalized == 0).all()
    assert (values.grad == 0).all()


def test_a_small_spread_is_not_taken_for_a_constant():
    values = torch.linspace(0.001, 0.002, HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH)  # inverse depth of 500 m to 1000 m
    normalized = normalize_median_mad(values, torch.ones_like(values, dtype=torch.bool))
    assert normalized.abs().mean().item() == pytest.approx(1, abs=1e-5)


def test_least_squares_equals_lstsq(scene):
    prediction, target, valid_mask = scene
    scale, shift = fit_least_squares(prediction, target, valid_mask)
    pairs = zip(valid_values(prediction, valid_mask), valid_values(target, valid_mask), strict=True)
    for i, (p, t) in enumerate(pairs):
        expected = np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), t, rcond=None)[0]
        np.testing.assert_allclose([scale[i], shift[i]], expected, rtol=1e-4)


@pytest.mark.parametrize(("scale", "shift"), [(2.0, 0.5), (0.01, -3.0), (-4.0, 10.0)])
def test_least_squares_recovers_scale_and_shift(scene, scale, shift):
    prediction, _, valid_mask = scene
    target = scale * prediction + shift
    found_scale, found_shift = fit_least_squares(prediction, target, valid_mask)
    torch.testing.assert_close(found_scale, torch.full((3,), scale), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_shift, torch.full((3,), shift), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(align_least_squares(prediction, target, valid_mask), target, rtol=1e-5, atol=1e-4)


def test_least_squares_survives_a_large_offset():
    """The determinant of the normal equations, sum(p^2) * n - sum(p)^2, has no correct digit here in float32."""
    ramp = torch.linspace(0, 1, HEIGHT * WIDTH).reshape(1, HEIGHT, WIDTH)
    prediction = 4096 + ramp
    scale, shift = fit_least_squares(prediction, 3 * ramp, torch.ones_like(ramp, dtype=torch.bool))
    assert scale.item() == pytest.approx(3, rel=1e-3)
    assert (scale * prediction + shift - 3 * ramp).abs().max() < 5e-3


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_least_squares_works_at_any_magnitude(scene, factor):
    prediction, target, valid_mask = scene
    scale, shift = fit_least_squares(prediction, target, valid_mask)
    scaled_scale, scaled_shift = fit_least_squares(factor * prediction, target, valid_mask)
    torch.testing.assert_close(scaled_scale * factor, scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(scaled_shift, shift, rtol=1e-4, atol=1e-4)


def test_least_squares_does_not_fit_rounding_errors():
    noise = torch.randn(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    scale, shift = fit_least_squares(300 * (1 + 1e-7 * noise), noise, torch.ones_like(noise, dtype=torch.bool))
    assert scale.item() == 0
    assert shift.item() == pytest.approx(noise.mean().item())


@pytest.mark.parametrize("num_valid", [1, HEIGHT * WIDTH])
@pytest.mark.parametrize("level", [0.0, 0.3, 12345.678])
def test_least_squares_of_a_constant_prediction_is_the_mean_of_the_target(num_valid, level):
    prediction = torch.full((1, HEIGHT, WIDTH), level, requires_grad=True)
    target = torch.rand(1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    valid_mask = (torch.arange(HEIGHT * WIDTH) < num_valid).reshape(1, HEIGHT, WIDTH)
    scale, shift = fit_least_squares(prediction, target, valid_mask)
    assert scale.item() == 0
    assert shift.item() == pytest.approx(target[valid_mask].mean().item())
    (scale + shift).sum().backward()
    assert (prediction.grad == 0).all()


def test_median_scale(scene):
    prediction, target, valid_mask = scene
    scale = fit_median_scale(prediction, target, valid_mask)
    pairs = zip(valid_values(prediction, valid_mask), valid_values(target, valid_mask), strict=True)
    expected = [np.median(t) / np.median(p) for p, t in pairs]
    np.testing.assert_allclose(scale, expected, rtol=1e-6)
    torch.testing.assert_close(align_median_scale(prediction, 2.5 * prediction, valid_mask), 2.5 * prediction)


def test_median_scale_of_a_prediction_without_positive_median_is_zero():
    target = torch.ones(1, 2, 3)
    assert fit_median_scale(torch.zeros(1, 2, 3), target, target > 0).tolist() == [0]
    assert fit_median_scale(-target, target, target > 0).tolist() == [0]


def test_robust_fit_is_the_best_line_through_two_of_the_pixels(scene):
    """The sum of absolute residuals has its minimum at a line through two points: here the best of all of them."""
    prediction, target, valid_mask = scene
    target = target + (torch.rand(target.shape, generator=torch.Generator().manual_seed(2)) < 0.2) * 50
    scale, shift = fit_least_absolute(prediction, target, valid_mask)
    pairs = zip(valid_values(prediction, valid_mask), valid_values(target, valid_mask), strict=True)
    for i, (p, t) in enumerate(pairs):
        first, second = np.triu_indices(len(p), 1)
        slopes = (t[second] - t[first]) / (p[second] - p[first])
        lines = slopes[:, None] * (p - p[first][:, None]) + t[first][:, None]
        best = np.abs(lines - t).sum(1).min()
        assert np.abs(scale[i].item() * p + shift[i].item() - t).sum() == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_robust_fit_finds_what_most_pixels_agree_on(share):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.rand(1, HEIGHT, WIDTH, generator=generator)
    is_outlier = torch.rand(1, HEIGHT, WIDTH, generator=generator) < share
    target = 2 * prediction + 1 + is_outlier * 5 * torch.rand(1, HEIGHT, WIDTH, generator=generator)
    everywhere = torch.ones_like(is_outlier)
    aligned = align_least_absolute(prediction, target, everywhere)
    torch.testing.assert_close(aligned, 2 * prediction + 1, rtol=1e-3, atol=1e-3)
    assert (align_least_squares(prediction, target, everywhere) - aligned).abs().max() > 0.1


def test_robust_fit_of_a_constant_is_the_median_of_the_target():
    target = torch.tensor([[[1.0, 2.0, 3.0, 50.0, 60.0]]])
    scale, shift = fit_least_absolute(torch.ones_like(target), target, target > 0)
    assert scale.item() == 0
    assert shift.item() == pytest.approx(3, rel=1e-3)


def test_log_fit_equals_lstsq(scene):
    prediction, target, valid_mask = scene
    aligned = align_log_least_squares(prediction, target, valid_mask)
    pairs = zip(valid_values(prediction, valid_mask), valid_values(target, valid_mask), strict=True)
    for i, (p, t) in enumerate(pairs):
        columns = np.stack([np.log(p), np.ones_like(p)], axis=1)
        expected = np.exp(columns @ np.linalg.lstsq(columns, np.log(t), rcond=None)[0])
        np.testing.assert_allclose(aligned[i][valid_mask[i]], expected, rtol=1e-4)
    assert align_log_least_squares(-prediction, target, valid_mask).isfinite().all()


@pytest.mark.parametrize("factor", [1e-25, 1.0, 1e25])
def test_scale_fit_equals_lstsq_at_any_magnitude(scene, factor):
    prediction, target, valid_mask = scene
    aligned = align_scale_least_squares(factor * prediction, target, valid_mask)
    pairs = zip(valid_values(prediction, valid_mask), valid_values(target, valid_mask), strict=True)
    for i, (p, t) in enumerate(pairs):
        np.testing.assert_allclose(aligned[i][valid_mask[i]], (p @ t) / (p @ p) * p, rtol=1e-5)
    assert (align_scale_least_squares(torch.zeros_like(prediction), target, valid_mask) == 0).all()


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_pixels_outside_the_mask_do_not_matter(scene, statistic, garbage):
    prediction, target, valid_mask = scene
    dirty = [torch.where(valid_mask, x, garbage) for x in (prediction, target)]
    clean = [torch.where(valid_mask, x, 0.5) for x in (prediction, target)]
    gradients = []
    for p, t in (dirty, clean):
        p.requires_grad_()
        statistic(p, t, valid_mask).square().sum().backward()
        gradients.append(p.grad)
    assert torch.equal(statistic(*dirty, valid_mask), statistic(*clean, valid_mask))
    assert torch.equal(*gradients)
    assert (gradients[0][~valid_mask] == 0).all()


def test_empty_mask_gives_zero_and_no_gradient(scene, statistic):
    prediction, target, valid_mask = scene
    valid_mask[1] = False
    prediction.requires_grad_()
    result = statistic(prediction, target, valid_mask)
    result.sum().backward()
    assert (result[1] == 0).all()
    assert result.isfinite().all()
    assert (prediction.grad[1] == 0).all()
    assert prediction.grad.isfinite().all()


def test_images_do_not_influence_each_other(scene, statistic):
    """To rounding: alone, an image is reduced to its valid pixels, and sums over them round differently."""
    together = statistic(*scene)
    alone = torch.cat([statistic(*(x[i : i + 1] for x in scene)) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


def test_flip_commutes(scene, statistic):
    flipped = statistic(*(x.flip(2) for x in scene))
    flipped = flipped.flip(2) if flipped.ndim == 3 else flipped
    torch.testing.assert_close(flipped, statistic(*scene), rtol=1e-4, atol=1e-5)


def test_computes_in_float32_under_autocast_and_for_bfloat16_input(scene, statistic):
    prediction, target, valid_mask = scene
    expected = statistic(*scene)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(statistic(*scene), expected)
    from_bfloat16 = statistic(prediction.bfloat16(), target.bfloat16(), valid_mask)
    assert from_bfloat16.dtype == torch.float32
    assert torch.equal(from_bfloat16, statistic(prediction.bfloat16().float(), target.bfloat16().float(), valid_mask))


def test_shapes_that_would_broadcast_are_refused(scene, statistic):
    prediction, target, valid_mask = scene
    with pytest.raises(AssertionError):
        statistic(prediction[:, None], target, valid_mask)
