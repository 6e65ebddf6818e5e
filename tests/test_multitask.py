import math

import pytest
import torch

from depthkit.multitask import uncertainty_weighted_sum


def test_by_hand():
    losses, log_variances = torch.tensor([2.0, 0.5]), torch.tensor([math.log(4), 0.0])
    assert float(uncertainty_weighted_sum(losses, log_variances)) == pytest.approx((2 / 4 + 0.5 + math.log(4)) / 2)


def test_the_best_variance_is_the_loss_itself():
    losses = torch.tensor([3.0, 0.02])
    log_variances = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([log_variances], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        uncertainty_weighted_sum(losses, log_variances).backward()
        optimizer.step()
    torch.testing.assert_close(log_variances.detach().exp(), losses, rtol=1e-2, atol=0)


def test_gradients():
    losses = torch.tensor([2.0, 0.5, 0.0], requires_grad=True)
    log_variances = torch.tensor([0.3, -0.7, 0.1], requires_grad=True)
    uncertainty_weighted_sum(losses, log_variances).backward()
    assert losses.grad is not None
    assert log_variances.grad is not None
    torch.testing.assert_close(losses.grad, (-log_variances).exp().detach() / 2)
    torch.testing.assert_close(log_variances.grad, ((1 - (-log_variances).exp() * losses) / 2).detach())
