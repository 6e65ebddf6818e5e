"""Mixing data sets by multiple-gradient descent: the step that lowers the loss of each (Sener and Koltun 2018).

Each of n data sets is a task with one gradient. The direction is the shortest vector in the convex hull of the
gradients: where it is not zero, a small step along it raises no loss. Source of its use for depth: MiDaS (Ranftl et al.
2020), section 6.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_ITERATIONS = 250
"""Of Frank and Wolfe's algorithm, as in the released code of Sener and Koltun."""


def gradient_rows(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradients of n `losses` (n,) with respect to P numbers in `parameters`, (n, P); the graph is kept."""
    rows = losses.new_empty(len(losses), sum(parameter.numel() for parameter in parameters), dtype=torch.float32)
    for row, loss in zip(rows, losses, strict=True):
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        torch.cat([gradient.flatten() for gradient in gradients], out=row)  # in place: rows are n times the model
    return rows


def mixing_weights(rows: Tensor) -> Tensor:
    """`min_norm_weights` of n gradients (n, P), in float32 whatever autocast says: half precision does not see
    where similar gradients differ.

    A task whose gradient is 0, such as a data set without a valid pixel in this batch, has no say: otherwise it would
    take all the weight, and the step would teach nothing.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.float()
        gram = rows @ rows.T
        squares = gram.diagonal()
        return min_norm_weights(gram + torch.diag(torch.where(squares > 0, 0.0, 1e6 * squares.amax())))


def min_norm_weights(gram: Tensor) -> Tensor:
    """Weights (n,) >= 0 with sum 1 that minimise `weights @ gram @ weights`, gram (n, n) of the gradients.

    Exact for two tasks, by `NUM_ITERATIONS` of Frank and Wolfe's algorithm for more. The scale of `gram` is irrelevant.
    """
    return two_task_weights(gram) if len(gram) == 2 else frank_wolfe(gram)


def two_task_weights(gram: Tensor) -> Tensor:
    """The closed form for n = 2: the point of a segment that is nearest to 0; the middle where its ends are one."""
    gram = gram.float()
    toward_first = gram[1, 1] - gram[0, 1]
    length = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    is_point = length <= 0
    share = torch.where(is_point, 0.5, toward_first / torch.where(is_point, 1.0, length)).clamp(0, 1)
    return torch.stack([share, 1 - share])


def frank_wolfe(gram: Tensor, num_iterations: int = NUM_ITERATIONS) -> Tensor:
    """From equal weights on, move toward the task whose gradient points least along the mixture, by exact line search
    (Jaggi 2013)."""
    gram = gram.float()
    scale = gram.diagonal().amax()
    gram = gram / torch.where(scale > 0, scale, 1.0)
    weights = torch.full_like(gram[0], 1 / len(gram))
    tasks = torch.arange(len(gram), device=gram.device)
    for _ in range(num_iterations):
        slope = gram @ weights
        direction = (tasks == slope.argmin()).float() - weights
        curvature = direction @ gram @ direction
        step = -(direction @ slope) / torch.where(curvature > 0, curvature, 1.0)
        weights = weights + step.clamp(0, 1) * direction
    return weights
