"""Multiple-gradient descent: weights of least norm, by formula and by iteration, and no loss rises along the step."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from depthkit.pareto import frank_wolfe, gradient_rows, min_norm_weights, mixing_weights, two_task_weights


def gram_of(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows @ rows.T)


def least_norm(gram: np.ndarray) -> float:
    """The smallest squared norm in the convex hull, by a general solver in float64."""
    num = len(gram)
    found = minimize(
        lambda w: w @ gram @ w,
        np.full(num, 1 / num),
        jac=lambda w: 2 * gram @ w,
        bounds=[(0, 1)] * num,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(found.fun)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1, 0], [0, 1], [0.5, 0.5]),
        ([1, 0], [0, 2], [0.8, 0.2]),  # the foot of the perpendicular from 0 is (0.8, 0.4)
        ([1, 1], [3, 2], [1, 0]),  # 0 lies beyond the first end
        ([4, 0], [1, 0], [0, 1]),
        ([1, 0], [-3, 0], [0.75, 0.25]),  # they cancel
        ([2, 1], [2, 1], [0.5, 0.5]),
        ([0, 0], [0, 0], [0.5, 0.5]),
    ],
)
def test_two_tasks_by_hand(first: list[float], second: list[float], expected: list[float]):
    gram = gram_of(np.array([first, second], float))
    np.testing.assert_allclose(two_task_weights(gram), expected, atol=1e-6)
    np.testing.assert_allclose(min_norm_weights(gram), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_iteration_agrees_with_the_formula_for_two_tasks(seed: int):
    gram = gram_of(np.random.default_rng(seed).normal(size=(2, 5)) * [[1], [3]])
    np.testing.assert_allclose(frank_wolfe(gram), two_task_weights(gram), atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_more_tasks_reach_the_least_norm(seed: int):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(3, 8))
    rows = rng.normal(size=(num, 40)) + rng.normal(size=40)
    gram = gram_of(rows)
    weights = min_norm_weights(gram)
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    reached = float(weights.double() @ gram @ weights.double())
    assert reached == pytest.approx(least_norm(gram.numpy()), rel=1e-2)


def test_the_scale_of_gradients_does_not_matter():
    gram = gram_of(np.random.default_rng(0).normal(size=(4, 9)))
    for factor in (1e-12, 1e12):
        torch.testing.assert_close(frank_wolfe(factor * gram), frank_wolfe(gram), atol=1e-4, rtol=1e-4)
    assert torch.equal(frank_wolfe(torch.zeros(3, 3)), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_half_precision_around_it_does_not_reach_the_weights(num_tasks: int):
    """Gradients of much the same direction, as those of data sets are, differ in what bfloat16 drops."""
    rng = np.random.default_rng(num_tasks)
    rows = 3 * rng.normal(size=(1, 1000)) + 0.3 * np.arange(1, num_tasks + 1)[:, None] * rng.normal(
        size=(num_tasks, 1000)
    )
    expected = min_norm_weights(gram_of(rows))
    with torch.autocast("cpu", torch.bfloat16):
        found = mixing_weights(torch.from_numpy(rows).float())
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_task_without_a_gradient_has_no_say(silent: int):
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    expected = torch.tensor([0.8, 0.2])
    where = [task for task in range(3) if task != silent]
    with_silent = torch.zeros(3, 2)
    with_silent[where] = rows
    found = mixing_weights(with_silent)
    assert found[silent] < 1e-4
    torch.testing.assert_close(found[where], expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(mixing_weights(torch.zeros(2, 4)), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(mixing_weights(torch.stack([rows[0], 0 * rows[0]])), torch.tensor([1.0, 0.0]))


def test_rows_are_the_gradients_of_each_loss():
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    losses = torch.stack([(a * a).sum(), a[0] * b, torch.zeros(()) * b])
    rows = gradient_rows(losses, [a, b])
    assert rows.tolist() == [[2, 4, 0], [3, 0, 1], [0, 0, 0]]
    losses.sum().backward()  # the graph is still there
    assert a.grad.tolist() == [5, 4]


@pytest.mark.parametrize("num_tasks", [2, 4])
def test_no_loss_rises_along_the_direction(num_tasks: int):
    """Quadratic bowls with different bottoms and steepness: the step of the mean would raise the flat ones."""
    generator = torch.Generator().manual_seed(num_tasks)
    bottoms = torch.randn(num_tasks, 6, generator=generator)
    steepness = torch.logspace(0, 2, num_tasks)
    point = torch.randn(6, generator=generator, requires_grad=True)

    def losses(at: torch.Tensor) -> torch.Tensor:
        return steepness * ((at - bottoms) ** 2).sum(1)

    rows = gradient_rows(losses(point), [point])
    direction = min_norm_weights(rows @ rows.T) @ rows
    assert (rows @ direction >= -1e-3 * rows.norm(dim=1) * direction.norm()).all()
    assert (losses(point - 1e-4 * direction) <= losses(point) + 1e-6).all()
