"""Order: annotated pairs, and pairs of pixels from dense ground truth."""

import numpy as np
import pytest
import torch

from depthkit.metrics import METRICS
from depthkit.metrics_pairs import NUM_ORDINAL_PAIRS, are_ordered, pair_accuracy, whdr

DISPARITY = torch.tensor([[3.0, 1.0, 1.0], [2.0, 5.0, float("nan")]])
PAIRS = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 2], [1, 2, 0, 0]])
CLOSER = torch.tensor([0, 0, 0, 1, 1])  # right, wrong, right, tie, NaN
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 0.5, 0.5])


def test_pairs_by_hand():
    assert are_ordered(DISPARITY, PAIRS, CLOSER).tolist() == [True, False, True, False, False]
    assert pair_accuracy(DISPARITY, PAIRS, CLOSER).item() == pytest.approx(2 / 5)
    assert whdr(DISPARITY, PAIRS, CLOSER, WEIGHTS).item() == pytest.approx(3 / 7)
    assert whdr(DISPARITY, PAIRS, CLOSER, torch.ones(5)).item() == pytest.approx(3 / 5)


def test_depth_is_given_with_a_minus():
    depth = 1 / DISPARITY
    assert torch.equal(are_ordered(-depth, PAIRS, CLOSER), are_ordered(DISPARITY, PAIRS, CLOSER))


def test_pairs_equal_a_loop():
    rng = np.random.default_rng(0)
    disparity, pairs = rng.random((20, 30)), rng.integers(0, [20, 30, 20, 30], (200, 4))
    closer, weights = rng.integers(0, 2, 200), rng.random(200)
    wrong = [
        not (disparity[a, b] > disparity[c, d] if first == 0 else disparity[c, d] > disparity[a, b])
        for (a, b, c, d), first in zip(pairs, closer, strict=True)
    ]
    arguments = [torch.from_numpy(values) for values in (disparity, pairs, closer)]
    assert pair_accuracy(*arguments).item() == pytest.approx(1 - np.mean(wrong))
    assert whdr(*arguments, torch.from_numpy(weights)).item() == pytest.approx(np.average(wrong, weights=weights))


@pytest.mark.parametrize("point", [[2, 0], [0, 3], [-1, 0]])
def test_a_point_outside_the_map_is_named(point):
    with pytest.raises(ValueError, match=rf"\[{point[0]}, {point[1]}\].*2 x 3"):
        are_ordered(DISPARITY, torch.tensor([[0, 0, *point]]), torch.tensor([0]))


def test_no_pairs_are_nan():
    nothing = torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    assert pair_accuracy(DISPARITY, *nothing).isnan()
    assert whdr(DISPARITY, *nothing, torch.zeros(0)).isnan()


def ordinal(prediction, target, valid_mask=None):
    valid_mask = torch.ones_like(target, dtype=torch.bool) if valid_mask is None else valid_mask
    return METRICS["ordinal_accuracy"].function(prediction, target, valid_mask)


def test_ordinal_accuracy_by_hand():
    """Two surfaces at 1 m and 2 m: pairs across them count, those within do not."""
    target = torch.tensor([[[1.0, 1.0, 2.0, 2.0]]])
    assert ordinal(torch.tensor([[[1.0, 9.0, 10.0, 11.0]]]), target).item() == 1
    assert ordinal(torch.tensor([[[3.0, 3.0, 3.0, 3.0]]]), target).item() == 0
    assert ordinal(torch.tensor([[[1.0, 3.0, 2.0, 4.0]]]), target).item() == pytest.approx(0.75, abs=0.002)
    assert ordinal(target, torch.tensor([[[1.0, 1.02, 1.01, 1.0]]])).isnan().all(), "nothing differs by 3 %"


def test_ordinal_accuracy_is_close_to_that_of_all_pairs():
    rng = np.random.default_rng(0)
    target = rng.uniform(1, 3, (2, 24, 30))
    prediction = target + rng.normal(0, [[[0.2]], [[0.8]]], target.shape)
    valid = rng.random(target.shape) < 0.6
    for p, t, mask, value in zip(
        prediction, target, valid, ordinal(*map(torch.from_numpy, (prediction, target, valid))), strict=True
    ):
        p, t = p[mask], t[mask]
        is_clear = np.maximum(t[:, None] / t, t / t[:, None]) >= 1.03
        is_right = (p[:, None] > p) == (t[:, None] > t)
        assert value.item() == pytest.approx(is_right[is_clear].mean(), abs=0.006)


def test_ordinal_pairs_are_spread_over_the_valid_pixels():
    """Every strip of a tenth of the pixels takes part in about a fifth of the pairs."""
    target = torch.ones(1, 100, 100)
    for start in range(0, 100, 10):
        strip = target.clone()
        strip[:, start : start + 10] = 2
        prediction = torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(start))
        assert ordinal(strip + 0.0 * prediction, strip).item() == 1
        assert ordinal(prediction, strip).item() == pytest.approx(0.5, abs=3 * 0.5 / (0.18 * NUM_ORDINAL_PAIRS) ** 0.5)
