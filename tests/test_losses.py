"""The losses of maps against float64 loops and hand-computed values, and the promises of their docstrings."""

import functools

import numpy as np
import pytest
import torch

from depthkit.losses import (
    affine_invariant_loss,
    cutmix_loss,
    gradient_matching_loss,
    scale_shift_invariant_loss,
    scale_shift_invariant_mse,
)

HEIGHT, WIDTH = 17, 25  # one more than a multiple of 8, so that all strides of gradient matching are symmetric
UNTRIMMED_LOSSES = {
    "affine_invariant": affine_invariant_loss,
    "scale_shift_invariant_untrimmed": functools.partial(scale_shift_invariant_loss, trim_fraction=0.0),
    "scale_shift_invariant_mse": scale_shift_invariant_mse,
    "gradient_matching": gradient_matching_loss,
}
LOSSES = UNTRIMMED_LOSSES | {
    "affine_invariant_dropping": functools.partial(affine_invariant_loss, drop_fraction=0.1),
    "scale_shift_invariant": scale_shift_invariant_loss,
}


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture(params=UNTRIMMED_LOSSES)
def untrimmed_loss(request):
    return UNTRIMMED_LOSSES[request.param]


@pytest.fixture
def scene():
    """Three images: prediction, related target, and masks of different density."""
    generator = torch.Generator().manual_seed(2)
    target = torch.rand(3, HEIGHT, WIDTH, generator=generator) * torch.tensor([1.0, 0.05, 200.0])[:, None, None]
    noise = torch.rand(3, HEIGHT, WIDTH, generator=generator)
    prediction = target / target.amax((1, 2), keepdim=True) + 0.5 * noise + 1
    valid_mask = torch.rand(3, HEIGHT, WIDTH, generator=generator) < torch.tensor([1.0, 0.8, 0.4])[:, None, None]
    return prediction, target, valid_mask


def value_and_gradient(loss, prediction, *others):
    prediction = prediction.detach().clone().requires_grad_()
    value = loss(prediction, *others)
    return value.detach(), torch.autograd.grad(value.sum(), prediction)[0]


# --- references: one image, float64, loops


def reference_normalized(values, mask):
    """Median/MAD-normalised values as a dict from valid (row, col)."""
    valid = {(r, c): float(values[r, c]) for r, c in np.ndindex(values.shape) if mask[r, c]}
    median = sorted(valid.values())[(len(valid) - 1) // 2]
    spread = sum(abs(v - median) for v in valid.values()) / len(valid)
    return {at: (v - median) / spread for at, v in valid.items()}


def reference_residual(prediction, target, mask):
    p, t = reference_normalized(prediction, mask), reference_normalized(target, mask)
    return {at: p[at] - t[at] for at in p}


def reference_kept(prediction, target, mask, drop_fraction):
    """Sorted absolute residuals without the largest ones, and the number of valid pixels."""
    residuals = sorted(abs(r) for r in reference_residual(prediction, target, mask).values())
    return residuals[: len(residuals) - int(len(residuals) * drop_fraction)], len(residuals)


def reference_affine_invariant(prediction, target, mask, drop_fraction):
    kept, _ = reference_kept(prediction, target, mask, drop_fraction)
    return sum(kept) / len(kept)


def reference_scale_shift_invariant(prediction, target, mask, trim_fraction):
    kept, num_valid = reference_kept(prediction, target, mask, trim_fraction)
    return sum(kept) / (2 * num_valid)


def reference_mse(prediction, target, mask):
    p, t = prediction[mask], target[mask]
    t = (t - t.min()) / (t.max() - t.min())
    scale = abs(np.linalg.lstsq(np.stack([p, np.ones_like(p)], axis=1), t, rcond=None)[0][0])
    shift = (t - scale * p).mean()
    return ((scale * p + shift - t) ** 2).sum() / (2 * len(p))


def reference_gradient_matching(prediction, target, mask, num_scales):
    residual = reference_residual(prediction, target, mask)
    total = 0.0
    for step in [1, 2, 4, 8][:num_scales]:
        at_scale = {(r, c): v for (r, c), v in residual.items() if r % step == 0 and c % step == 0}
        right = sum(abs(at_scale[r, c + step] - v) for (r, c), v in at_scale.items() if (r, c + step) in at_scale)
        below = sum(abs(at_scale[r + step, c] - v) for (r, c), v in at_scale.items() if (r + step, c) in at_scale)
        total += (right + below) / len(at_scale)
    return total


@pytest.mark.parametrize(
    ("loss", "reference", "options"),
    [
        (affine_invariant_loss, reference_affine_invariant, {"drop_fraction": 0.0}),
        (affine_invariant_loss, reference_affine_invariant, {"drop_fraction": 0.1}),
        (scale_shift_invariant_loss, reference_scale_shift_invariant, {"trim_fraction": 0.2}),
        (scale_shift_invariant_mse, reference_mse, {}),
        (gradient_matching_loss, reference_gradient_matching, {"num_scales": 1}),
        (gradient_matching_loss, reference_gradient_matching, {"num_scales": 4}),
    ],
)
def test_equals_the_reference(scene, loss, reference, options):
    images = zip(*(x.numpy() for x in scene), strict=True)
    expected = [reference(p.astype(np.float64), t.astype(np.float64), mask, **options) for p, t, mask in images]
    np.testing.assert_allclose(loss(*scene, **options), expected, rtol=2e-5)


def test_by_hand():
    """Target normalises to (-5/3, -5/6, 0, 5/6, 5/3), prediction to (-10/11, -5/11, 0, 5/11, 35/11)."""
    target = torch.tensor([[[0.0, 1, 2, 3, 4]]])
    prediction = torch.tensor([[[0.0, 1, 2, 3, 9]]])
    case = (prediction, target, torch.ones(1, 1, 5, dtype=torch.bool))
    assert affine_invariant_loss(*case).item() == pytest.approx(100 / 33 / 5)
    assert affine_invariant_loss(*case, drop_fraction=0.2).item() == pytest.approx(50 / 33 / 4)
    assert scale_shift_invariant_loss(*case).item() == pytest.approx(50 / 33 / 10)
    # 33 * residual is (25, 12.5, 0, -12.5, 50), then (25, 0, 50), then (25, 50): steps of 100, 75 and 25 in all.
    assert gradient_matching_loss(*case, num_scales=1).item() == pytest.approx(100 / 33 / 5)
    assert gradient_matching_loss(*case, num_scales=3).item() == pytest.approx((100 / 5 + 75 / 3 + 25 / 2) / 33)


def test_mse_by_hand():
    """The best line through (0, 0), (1, 1), (2, 0) is the constant 1/3: squares 1/9 + 4/9 + 1/9, over 2 * 3 pixels."""
    case = (torch.tensor([[[0.0, 1, 2]]]), torch.tensor([[[5.0, 7, 5]]]), torch.ones(1, 1, 3, dtype=torch.bool))
    assert scale_shift_invariant_mse(*case).item() == pytest.approx(6 / 9 / 6)


@pytest.mark.parametrize("sign", [1, -1])
def test_mse_gradient_passes_through_scale_and_shift(scene, sign):
    prediction, target, valid_mask = scene
    prediction = sign * prediction
    _, gradient = value_and_gradient(scale_shift_invariant_mse, prediction, target, valid_mask)
    p, t, mask = prediction[0].double().numpy(), target[0].double().numpy(), valid_mask[0].numpy()
    for at in [(0, 0), (3, 7), (16, 24)]:
        step = np.zeros_like(p)
        step[at] = 1e-4
        difference = reference_mse(p + step, t, mask) - reference_mse(p - step, t, mask)
        assert gradient[0][at].item() == pytest.approx(difference / 2e-4, rel=1e-3, abs=1e-8)


# --- invariances


@pytest.mark.parametrize(("scale", "shift"), [(0.2, 0.0), (1.0, 5.0), (30.0, -2.0)])
def test_unchanged_by_scale_and_shift_of_the_prediction(scene, loss, scale, shift):
    prediction, target, valid_mask = scene
    changed = loss(scale * prediction + shift, target, valid_mask)
    torch.testing.assert_close(changed, loss(*scene), rtol=1e-4, atol=1e-6)


def test_unchanged_by_scale_and_shift_of_the_target(scene, loss):
    prediction, target, valid_mask = scene
    changed = loss(prediction, 3 * target + 1, valid_mask)
    torch.testing.assert_close(changed, loss(*scene), rtol=1e-3, atol=1e-6)


def test_zero_if_and_only_if_equal_up_to_scale_and_shift(scene, untrimmed_loss):
    _, target, valid_mask = scene
    assert (untrimmed_loss(0.7 * target + 0.2, target, valid_mask) < 2e-4).all()
    spread = target.std((1, 2))
    one_pixel_off = target.clone()
    one_pixel_off[:, 8, 8] += 10 * spread
    at_the_pixel = torch.ones_like(valid_mask)
    assert (untrimmed_loss(one_pixel_off, target, at_the_pixel) > 1e-3).all()
    assert (untrimmed_loss(target**3, target, valid_mask) > 1e-3).all()


def test_an_inverted_prediction_is_worse_than_a_constant_one(scene, loss):
    _, target, valid_mask = scene
    constant = loss(torch.ones_like(target), target, valid_mask)
    assert (loss(-target, target, valid_mask) > 1.2 * constant).all()


def test_an_inverted_prediction_is_turned_round(scene, loss):
    _, target, valid_mask = scene
    target = target / target.amax((1, 2), keepdim=True)
    noise = torch.rand(target.shape, generator=torch.Generator().manual_seed(4))
    prediction = -target + 0.3 * noise
    before, gradient = value_and_gradient(loss, prediction, target, valid_mask)
    step = 1e-3 / gradient.flatten(1).norm(dim=1)[:, None, None]
    assert (loss(prediction - step * gradient, target, valid_mask) < before).all()


def test_flip_commutes(scene, loss):
    value, gradient = value_and_gradient(loss, *scene)
    for dim in (1, 2):
        flipped_value, flipped_gradient = value_and_gradient(loss, *(x.flip(dim) for x in scene))
        torch.testing.assert_close(flipped_value, value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(flipped_gradient.flip(dim), gradient, rtol=1e-4, atol=1e-6)


def test_images_do_not_influence_each_other(scene, loss):
    """So nothing, trimming included, is decided over the batch."""
    alone = torch.cat([loss(*(x[i : i + 1] for x in scene)) for i in range(3)])
    torch.testing.assert_close(loss(*scene), alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_impossible_share_is_refused(scene, fraction):
    with pytest.raises(ValueError, match=str(fraction)):
        affine_invariant_loss(*scene, drop_fraction=fraction)


# --- masks, constants, precision


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_pixels_outside_the_mask_do_not_matter(scene, loss, garbage):
    prediction, target, valid_mask = scene
    dirty = [torch.where(valid_mask, x, garbage) for x in (prediction, target)]
    value, gradient = value_and_gradient(loss, *dirty, valid_mask)
    clean = [torch.where(valid_mask, x, 0.5) for x in (prediction, target)]
    clean_value, clean_gradient = value_and_gradient(loss, *clean, valid_mask)
    assert torch.equal(value, clean_value)
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~valid_mask] == 0).all()
    assert (gradient[valid_mask] != 0).any()


def test_empty_mask_gives_zero_and_no_gradient(scene, loss):
    prediction, target, valid_mask = scene
    expected, expected_gradient = value_and_gradient(loss, *scene)
    valid_mask[1] = False
    value, gradient = value_and_gradient(loss, prediction, target, valid_mask)
    assert value[1] == 0
    assert (gradient[1] == 0).all()
    assert torch.equal(value[[0, 2]], expected[[0, 2]])
    assert torch.equal(gradient[[0, 2]], expected_gradient[[0, 2]])


@pytest.mark.parametrize("num_valid", [1, 2])
def test_very_few_valid_pixels_stay_finite(scene, loss, num_valid):
    prediction, target, _ = scene
    valid_mask = (torch.arange(HEIGHT * WIDTH) < num_valid).reshape(1, HEIGHT, WIDTH).expand(3, -1, -1)
    value, gradient = value_and_gradient(loss, prediction, target, valid_mask)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("constant", ["prediction", "target", "both"])
@pytest.mark.parametrize("level", [0.0, 0.3, 1000.1])
def test_constant_maps_stay_finite(scene, loss, constant, level):
    prediction, target, valid_mask = scene
    if constant != "target":
        prediction = torch.full_like(prediction, level)
    if constant != "prediction":
        target = torch.full_like(target, level)
    value, gradient = value_and_gradient(loss, prediction, target, valid_mask)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10
    if constant == "both":
        assert (value == 0).all()


def test_nan_at_a_valid_pixel_is_not_hidden(scene, loss):
    prediction, target, valid_mask = scene
    prediction[1, 2, 3] = float("nan")
    valid_mask[1, 2, 3] = True
    assert loss(prediction, target, valid_mask).isfinite().tolist() == [True, False, True]


def test_float32_under_autocast_and_for_bfloat16_input(scene, loss):
    prediction, target, valid_mask = scene
    expected = loss(*scene)
    assert expected.shape == (3,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(*scene), expected)
    from_bfloat16 = loss(prediction.bfloat16(), target, valid_mask)
    assert from_bfloat16.dtype == torch.float32
    assert torch.equal(from_bfloat16, loss(prediction.bfloat16().float(), target, valid_mask))


def test_shapes_that_would_broadcast_are_refused(scene, loss):
    prediction, target, valid_mask = scene
    with pytest.raises(AssertionError):
        loss(prediction[:, None], target, valid_mask)


# --- CutMix


@pytest.mark.parametrize("is_pasted", [True, False])
def test_cutmix_with_full_or_empty_region_is_the_plain_loss(scene, loss, is_pasted):
    region = torch.full((3, HEIGHT, WIDTH), is_pasted)
    value, gradient = value_and_gradient(functools.partial(cutmix_loss, loss), *scene, region)
    plain_value, plain_gradient = value_and_gradient(loss, *scene)
    assert torch.equal(value, plain_value)
    assert torch.equal(gradient, plain_gradient)


def test_cutmix_weights_the_two_sides_by_area(scene, loss):
    prediction, target, valid_mask = scene
    region = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    region[:, 2:12, 5:20] = True  # 150 of 425 pixels
    inside, outside = loss(prediction, target, valid_mask & region), loss(prediction, target, valid_mask & ~region)
    expected = 150 / 425 * inside + 275 / 425 * outside
    torch.testing.assert_close(cutmix_loss(loss, prediction, target, valid_mask, region), expected)


def test_cutmix_gives_each_side_its_own_scale_and_shift(scene, untrimmed_loss):
    _, target, valid_mask = scene
    region = torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    region[:, 2:12, 5:20] = True
    prediction = torch.where(region, 3 * target + 1, 0.5 * target)
    assert (cutmix_loss(untrimmed_loss, prediction, target, valid_mask, region) < 2e-4).all()
    assert (untrimmed_loss(prediction, target, valid_mask) > 1e-3).all()
