"""Several losses in one: weights that are learned with the network."""

from torch import Tensor


def uncertainty_weighted_sum(losses: Tensor, log_variances: Tensor) -> Tensor:
    """`sum(exp(-s) L / 2 + s / 2)` over the losses L (N,) >= 0, s = `log_variances` (N,), which are learned; a scalar.

    For a fixed L the minimum over s is at `exp(s) = L`: every loss comes to count in units of its own size, and s keeps
    a loss from being weighed down to nothing. Source: Kendall, Gal and Cipolla 2018, section 3.2 (regression, with
    s = log sigma^2).
    """
    return ((-log_variances).exp() * losses.float() + log_variances).sum() / 2
