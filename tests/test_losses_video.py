"""The losses of video against float64 references, by hand, and their gradients."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from depthkit import losses_video as losses


def images(seed: int, size: tuple[int, int] = (7, 9), count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def mask(seed: int, size: tuple[int, int] = (7, 9), count: int = 2) -> torch.Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed)) < 0.7


def windows(values: np.ndarray) -> np.ndarray:
    """(..., H - 2, W - 2, 9): the pixels of every 3 x 3 window."""
    found = np.lib.stride_tricks.sliding_window_view(values, (3, 3), axis=(-2, -1))
    return found.reshape(*found.shape[:-2], 9)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over windows, from the definition of mean, variance and covariance, float64: (B, H - 2, W - 2)."""
    a, b = windows(a.astype(np.float64)), windows(b.astype(np.float64))
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    covariance = ((a - mean_a[..., None]) * (b - mean_b[..., None])).mean(-1)
    value = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    value /= (mean_a**2 + mean_b**2 + 1e-4) * (a.var(-1) + b.var(-1) + 9e-4)
    return np.clip((1 - value) / 2, 0, 1).mean(1)


def test_ssim_is_that_of_its_definition():
    a, b = images(0), images(1)
    np.testing.assert_allclose(losses.ssim_error(a, b), reference_ssim(a.numpy(), b.numpy()), atol=1e-5)


def test_reconstruction_and_ssim_losses_against_the_reference():
    a, b, valid = images(0), images(1), mask(2)
    weight = valid.double().numpy()
    error = np.abs(a.double().numpy() - b.double().numpy()).mean(1)
    np.testing.assert_allclose(losses.reconstruction_loss(a, b, valid), (error * weight).mean((1, 2)), atol=1e-6)
    filled = np.where(valid.numpy()[:, None], a.numpy(), b.numpy())
    expected = reference_ssim(filled, b.numpy()) * windows(weight).mean(-1)
    np.testing.assert_allclose(losses.ssim_loss(a, b, valid), expected.mean((1, 2)), atol=1e-6)


def test_smoothness_against_the_reference():
    disparity, image = torch.rand(2, 7, 9), images(3)
    d, i = disparity.double().numpy(), image.double().numpy()
    expected = sum(
        (np.abs(np.diff(d, axis=axis)) * np.exp(-np.abs(np.diff(i, axis=axis)).mean(1))).mean((1, 2))
        for axis in (-1, -2)
    )
    np.testing.assert_allclose(losses.smoothness_loss(disparity, image), expected, atol=1e-6)


def test_smoothness_forgives_a_jump_at_an_edge():
    disparity = torch.zeros(1, 4, 4)
    disparity[..., 2:] = 1
    edge = disparity[:, None].expand(1, 3, 4, 4)
    blank = torch.zeros(1, 3, 4, 4)
    torch.testing.assert_close(losses.smoothness_loss(disparity, blank), torch.tensor([4 / 12]))
    torch.testing.assert_close(losses.smoothness_loss(disparity, edge), torch.tensor([4 / 12]) * np.exp(-1))


def test_normalised_disparity_does_not_see_the_unit():
    disparity = torch.rand(2, 5, 5)
    torch.testing.assert_close(losses.mean_normalized(disparity), losses.mean_normalized(disparity * 1e-3))
    torch.testing.assert_close(losses.mean_normalized(disparity).mean((1, 2)), torch.ones(2))


def test_photometric_error_by_parts():
    a, b = images(0), images(1)
    error = losses.photometric_error(a, b, ssim_weight=0.85)
    inner = 0.85 * losses.ssim_error(a, b) + 0.15 * losses.reconstruction_error(a, b)[:, 1:-1, 1:-1]
    torch.testing.assert_close(error[:, 1:-1, 1:-1], inner)
    assert error.shape == (2, 7, 9)
    assert (losses.photometric_error(a, a) < 1e-6).all()


def test_minimum_and_automask_by_hand():
    errors = torch.tensor([[[[1.0, 5.0, 9.0, 9.0]]], [[[4.0, 2.0, 4.0, 9.0]]]])  # (S=2, B=1, 1, 4)
    valid = torch.tensor([[[[True, True, False, False]]], [[[True, True, True, False]]]])
    torch.testing.assert_close(losses.minimum_reprojection_loss(errors, valid), torch.tensor([(1.0 + 2 + 4) / 3]))
    static = torch.tensor([[[[2.0, 2.0, 9.0, 9.0]]], [[[1.5, 9.0, 9.0, 9.0]]]])
    # Standing still explains the second pixel as well: it does not count.
    torch.testing.assert_close(losses.minimum_reprojection_loss(errors, valid, static), torch.tensor([(1.0 + 4) / 2]))


def test_a_static_camera_teaches_nothing():
    image = images(0)
    error = losses.photometric_error(image, image)[None]
    loss = losses.minimum_reprojection_loss(error, torch.ones_like(error, dtype=torch.bool), error)
    assert (loss == 0).all()


@pytest.mark.parametrize("name", ["reconstruction_loss", "ssim_loss"])
def test_what_is_outside_the_mask_is_not_seen(name):
    loss = getattr(losses, name)
    warped, image, valid = images(0), images(1), mask(2)
    broken = torch.where(valid[:, None], warped, torch.nan).requires_grad_()
    value = loss(broken, image, valid)
    torch.testing.assert_close(value, loss(warped, image, valid))
    value.sum().backward()
    assert broken.grad is not None
    assert (broken.grad[~valid[:, None].expand_as(broken)] == 0).all()
    assert broken.grad.isfinite().all()
    assert broken.grad.abs().sum() > 0


def test_empty_masks_give_zero_with_zero_gradient():
    image = images(1)
    nothing = torch.zeros(2, 7, 9, dtype=torch.bool)
    for loss in (losses.reconstruction_loss, losses.ssim_loss):
        warped = images(0).requires_grad_()
        value = loss(warped, image, nothing)
        value.sum().backward()
        assert (value == 0).all()
        assert (warped.grad == 0).all()
    errors = torch.rand(1, 2, 7, 9, requires_grad=True)
    value = losses.minimum_reprojection_loss(errors, nothing[None])
    value.sum().backward()
    assert (value == 0).all()
    assert (errors.grad == 0).all()


def test_nan_at_a_valid_pixel_is_not_hidden():
    warped, image = images(0), images(1)
    warped[0, 1, 3, 3] = torch.nan
    everywhere = torch.ones(2, 7, 9, dtype=torch.bool)
    for loss in (losses.reconstruction_loss, losses.ssim_loss):
        value = loss(warped, image, everywhere)
        assert value[0].isnan()
        assert value[1].isfinite()
    error = losses.photometric_error(warped, image)[None]
    assert losses.minimum_reprojection_loss(error, everywhere[None])[0].isnan()


def test_gradients(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # float32 inside would limit the precision
    image, valid = images(1).double(), mask(2)
    warped = images(0).double().requires_grad_()
    disparity = torch.rand(2, 7, 9, dtype=torch.float64, requires_grad=True)
    for loss in (losses.reconstruction_loss, losses.ssim_loss):
        assert gradcheck(lambda values, loss=loss: loss(values, image, valid), (warped,), atol=1e-4)
    assert gradcheck(lambda values: losses.photometric_error(values, image), (warped,), atol=1e-4)
    assert gradcheck(lambda d: losses.smoothness_loss(losses.mean_normalized(d), image), (disparity,), atol=1e-4)
    errors = torch.rand(2, 2, 7, 9, dtype=torch.float64, requires_grad=True)
    valid = torch.stack([mask(2), mask(3)])
    assert gradcheck(lambda values: losses.minimum_reprojection_loss(values, valid), (errors,), atol=1e-4)
