"""Edges: Depth Pro's boundary metrics against loops over pixels in float64, and what must not change them."""

import numpy as np
import pytest
import torch

from depthkit.metrics import METRICS, compute_metrics
from depthkit.metrics_edges import BOUNDARY_RATIOS, mask_boundary_recall

RATIOS = np.linspace(1.05, 1.25, 10)
STEPS = [(0, 1), (0, -1), (1, 0), (-1, 0)]


@pytest.fixture
def scene():
    """Three images of surfaces in steps of a few percent, the predictions with errors of a few percent, holes."""
    rng = np.random.default_rng(0)
    target = np.exp(np.cumsum(rng.normal(0, 0.08, (3, 11, 14)), axis=2) + np.cumsum(rng.normal(0, 0.06, (3, 11, 1)), 1))
    prediction = target * np.exp(rng.normal(0, np.array([0.01, 0.04, 0.2])[:, None, None], target.shape))
    return prediction, target, rng.random(target.shape) < np.array([1.0, 0.8, 0.5])[:, None, None]


def tensors(scene):
    return tuple(torch.from_numpy(values) for values in scene)


def occlusions(depth, valid, ratio):
    """Per direction, the pixels whose neighbour there is farther by more than the ratio."""
    cells = set(zip(*(axis.tolist() for axis in np.nonzero(valid)), strict=True))
    found = []
    for down, right in STEPS:
        there = {(row, col): (row + down, col + right) for row, col in cells}
        found.append({cell for cell in cells if there[cell] in cells and depth[there[cell]] / depth[cell] > ratio})
    return found


def reference_boundary(prediction, target, valid):
    """Weighted F1 and recall of one image."""
    f1, recalls = [], []
    for ratio in RATIOS:
        pairs = list(zip(occlusions(prediction, valid, ratio), occlusions(target, valid, ratio), strict=True))
        precision = np.mean([len(p & t) / max(len(p), 1) for p, t in pairs])
        recall = np.mean([len(p & t) / max(len(t), 1) for p, t in pairs])
        f1.append(0 if precision + recall == 0 else 2 * precision * recall / (precision + recall))
        recalls.append(recall)
    return np.average(f1, weights=RATIOS), np.average(recalls, weights=RATIOS)


def test_equals_the_reference(scene):
    expected = [reference_boundary(*image) for image in zip(*scene, strict=True)]
    values = compute_metrics(*tensors(scene), names=["boundary_f1", "boundary_recall"])
    np.testing.assert_allclose(values["boundary_f1"], [f1 for f1, _ in expected], rtol=1e-6)
    np.testing.assert_allclose(values["boundary_recall"], [recall for _, recall in expected], rtol=1e-6)
    assert values["boundary_f1"][0] > values["boundary_f1"][1] > values["boundary_f1"][2] > 0.1


def score(name, prediction, target, valid=None):
    maps = torch.tensor([prediction]), torch.tensor([target])
    mask = torch.ones_like(maps[0], dtype=torch.bool) if valid is None else torch.tensor([valid])
    return METRICS[name].function(*maps, mask).item()


def test_a_step_counts_for_the_ratios_below_it():
    """Truth 1.00 | 1.12 exceeds the ratios up to 1.1167, the first four; the prediction 1.00 | 1.08 the first two."""
    f1 = score("boundary_f1", [[1.0, 1.08]], [[1.0, 1.12]])
    assert f1 == pytest.approx(0.25 * RATIOS[:2].sum() / RATIOS.sum())
    assert score("boundary_recall", [[1.0, 1.3]], [[1.0, 1.12]]) == pytest.approx(
        0.25 * RATIOS[:4].sum() / RATIOS.sum()
    )


def test_precision_and_recall_by_hand():
    """One step right in the truth; the prediction has it and another: precision 1/2, recall 1, of one direction."""
    f1 = score("boundary_f1", [[1.0, 2.0, 4.0]], [[1.0, 2.0, 2.0]])
    assert f1 == pytest.approx(2 * (0.5 / 4) * (1 / 4) / (0.5 / 4 + 1 / 4))
    assert score("boundary_recall", [[1.0, 2.0, 4.0]], [[1.0, 2.0, 2.0]]) == pytest.approx(0.25)


def test_the_wrong_side_in_front_is_no_boundary_found():
    assert score("boundary_f1", [[2.0, 1.0]], [[1.0, 2.0]]) == 0
    assert score("boundary_f1", [[1.0], [2.0]], [[1.0], [2.0]]) == pytest.approx(0.25)


def test_an_image_without_boundaries_scores_0_as_published_and_one_without_neighbours_nothing():
    assert score("boundary_f1", [[1.0, 1.0]], [[1.0, 1.0]]) == 0
    assert np.isnan(score("boundary_f1", [[1.0, 2.0, 1.0]], [[1.0, 2.0, 1.0]], [[True, False, True]]))


def test_a_boundary_of_nan_or_nothing_is_not_found():
    """A prediction of NaN does not hide the boundary of the truth."""
    target = [[1.0, 2.0], [1.0, 2.0]]
    assert score("boundary_recall", [[1.0, float("nan")], [1.0, 2.0]], target) == pytest.approx(0.125)


def test_a_pixel_of_nan_is_no_boundary():
    """Truth and prediction have a step down and a step up; the NaN beside them is not taken for a third."""
    f1 = score("boundary_f1", [[1.0, 2.0, 1.0, float("nan")]], [[1.0, 2.0, 1.0, 1.0]])
    assert f1 == pytest.approx(0.5)


def test_a_step_of_exactly_a_ratio_does_not_exceed_it():
    steps = [[1.0, 1.05]], [[1.05, 1.0]]
    assert [score("boundary_f1", step, step) for step in steps] == [0, 0]


@pytest.mark.parametrize("name", ["boundary_f1", "boundary_recall"])
def test_scale_does_not_matter(scene, name):
    prediction, target, valid_mask = tensors(scene)
    values = METRICS[name].function(prediction, target, valid_mask)
    assert torch.equal(METRICS[name].function(4 * prediction, target / 8, valid_mask), values)


def test_edge_error_by_hand():
    """A step of 2 between columns 4 and 5 of 10: columns 2 to 7 count. Errors of 1 outside them do not."""
    target = torch.ones(1, 6, 10)
    target[..., 5:] = 2
    prediction = target.clone()
    prediction[..., [0, 1, 8, 9]] *= 2
    everywhere = torch.ones_like(target, dtype=torch.bool)
    edge = METRICS["edge_abs_rel"].function
    assert edge(prediction, target, everywhere).item() == 0
    prediction[..., 2] *= 1.6
    prediction[..., 7] *= 1.3
    assert edge(prediction, target, everywhere).item() == pytest.approx((0.6 + 0.3) / 6)
    assert edge(prediction.mT, target.mT, everywhere.mT).item() == pytest.approx((0.6 + 0.3) / 6)
    hidden = everywhere.clone()
    hidden[..., 7] = False
    assert edge(prediction, target, hidden).item() == pytest.approx(0.6 / 5)


def test_edges_are_steps_of_more_than_15_percent():
    assert np.isnan(score("edge_abs_rel", [[2.0, 2.0]], [[1.0, 1.14]]))
    assert score("edge_abs_rel", [[2.0, 2.32]], [[1.0, 1.16]]) == pytest.approx(1)
    assert score("edge_abs_rel", [[2.32, 2.0]], [[1.16, 1.0]]) == pytest.approx(1)


def test_edge_error_is_nan_where_nothing_jumps():
    smooth = torch.linspace(1, 3, 30).expand(1, 5, 30)
    everywhere = torch.ones_like(smooth, dtype=torch.bool)
    assert METRICS["edge_abs_rel"].function(2 * smooth, smooth, everywhere).isnan().all()
    assert METRICS["edge_abs_rel"].function(2 * smooth**9, smooth**9, everywhere).item() == pytest.approx(1)


def reference_mask_recall(depth, foreground):
    """Runs as lists of cells, from the definition."""

    def found(depth, inside, ratio):
        """Share of the pairs (inside left, outside right) whose quotient is the largest of its run."""
        hits, borders = 0, 0
        for line, is_inside in zip(depth, inside, strict=True):
            quotient = [line[i + 1] / line[i] for i in range(len(line) - 1)]
            runs, run = [], []
            for i, value in enumerate(quotient):
                run = [*run, i] if value > ratio else []
                if run and (i + 1 == len(quotient) or quotient[i + 1] <= ratio):
                    runs.append(run)
            peaks = {max(run, key=lambda i: quotient[i]) for run in runs}
            border = {i for i in range(len(quotient)) if is_inside[i] and not is_inside[i + 1]}
            hits, borders = hits + len(peaks & border), borders + len(border)
        return hits / max(borders, 1)

    views = [lambda x: x, lambda x: x[:, ::-1], lambda x: x.T, lambda x: x.T[:, ::-1]]
    recalls = [np.mean([found(view(depth), view(foreground), ratio) for view in views]) for ratio in RATIOS]
    return np.average(recalls, weights=RATIOS)


def test_mask_boundary_recall_equals_its_definition(scene):
    prediction = scene[0]
    rng = np.random.default_rng(1)
    foreground = np.stack([rng.random((11, 14)) < 0.5, np.arange(14)[None] < np.arange(11)[:, None], prediction[2] < 1])
    expected = [reference_mask_recall(p, f) for p, f in zip(prediction, foreground, strict=True)]
    values = mask_boundary_recall(torch.from_numpy(prediction), torch.from_numpy(foreground))
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert min(expected) > 0.02


def test_mask_boundary_recall_keeps_the_first_of_the_sharpest_steps():
    """Steps 1.1, 1.5, 1.5 are one run: the second is its peak, so a border elsewhere is not found."""
    depth = torch.tensor([[[1.0, 1.1, 1.65, 2.475, 2.475]]])
    borders = [torch.arange(5)[None, None] < column for column in (1, 2, 3, 4)]
    recalls = [mask_boundary_recall(depth, border).item() for border in borders]
    assert recalls == pytest.approx([0, 0.25, 0, 0])


def test_ratios_are_the_published_ones():
    np.testing.assert_allclose(BOUNDARY_RATIOS, RATIOS, rtol=1e-7)
