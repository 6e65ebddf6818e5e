"""The feature alignment loss against a float64 loop, and its margin."""

import numpy as np
import pytest
import torch

from depthkit.losses import feature_alignment_loss


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(3)
    frozen = torch.randn(2, 8, 4, 5, generator=generator)
    return frozen + 0.7 * torch.randn(2, 8, 4, 5, generator=generator), frozen


def value_and_gradient(student, frozen):
    student = student.detach().clone().requires_grad_()
    value = feature_alignment_loss(student, frozen)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.5])
def test_feature_loss_equals_the_reference(features, margin):
    expected = []
    for student, frozen in zip(*(x.double().numpy() for x in features), strict=True):
        distances = []
        for r, c in np.ndindex(student.shape[1:]):
            a, b = student[:, r, c], frozen[:, r, c]
            distances.append(1 - a @ b / np.sqrt((a @ a) * (b @ b)))
        expected.append(sum(d for d in distances if d >= margin) / len(distances))
    np.testing.assert_allclose(feature_alignment_loss(*features, tolerance_margin=margin), expected, rtol=1e-5)


def test_feature_loss_is_silent_inside_the_margin_only():
    """Angles of 0, 30, 33 and 90 degrees: 1 - cos is 0, 0.134, 0.161 and 1."""
    angles = torch.tensor([0.0, 30.0, 33.0, 90.0]).deg2rad()
    student = torch.stack([angles.cos(), angles.sin()])[None, :, None]
    frozen = torch.tensor([1.0, 0.0])[None, :, None, None].expand_as(student)
    value, gradient = value_and_gradient(student, frozen)
    assert value.item() == pytest.approx((1 - np.cos(np.deg2rad(33)) + 1) / 4)
    assert (gradient[..., :2] == 0).all()
    assert (gradient[..., 2:].abs().amax(1) > 0).all()


def test_feature_at_the_margin_counts():
    student = torch.tensor([1.0, 0, 0, 0])[None, :, None, None]
    frozen = torch.full((1, 4, 1, 1), 0.5)  # cos is exactly 0.5
    assert feature_alignment_loss(student, frozen, tolerance_margin=0.5).item() == 0.5
    assert feature_alignment_loss(student, frozen, tolerance_margin=0.5001).item() == 0


def test_feature_loss_ignores_length_and_leaves_the_frozen_side_alone(features):
    student, frozen = features
    frozen = frozen.clone().requires_grad_()
    value = feature_alignment_loss(student.clone().requires_grad_(), frozen)
    torch.testing.assert_close(feature_alignment_loss(7 * student, 0.1 * frozen), value)
    value.sum().backward()
    assert frozen.grad is None


def test_feature_loss_is_finite_for_zero_features_and_loud_for_nan(features):
    student, frozen = features
    student[0, :, 0, 0] = 0
    value, gradient = value_and_gradient(student, frozen)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    student[1, 3, 2, 2] = float("nan")
    assert feature_alignment_loss(student, frozen).isnan().tolist() == [False, True]


def test_feature_loss_is_float32_under_autocast_and_commutes_with_flip(features):
    expected = feature_alignment_loss(*features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feature_alignment_loss(*features), expected)
    torch.testing.assert_close(feature_alignment_loss(*(x.flip(3) for x in features)), expected)
    low, high = (x.bfloat16() for x in features), (x.bfloat16().float() for x in features)
    assert torch.equal(feature_alignment_loss(*low), feature_alignment_loss(*high))
