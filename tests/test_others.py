"""The same numbers as from independent implementations: scikit-learn, SciPy, torchmetrics, OpenCV, transformers."""

from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from depthkit.alignment import (
    align_least_squares,
    align_log_least_squares,
    align_scale_least_squares,
    fit_least_absolute,
)
from depthkit.bundle import BundleFacts
from depthkit.config import DPTConfig
from depthkit.data.windows import normalize
from depthkit.evaluation.protocols import rank_correlation, score
from depthkit.evaluation.settings import Alignment, ProtocolConfig
from depthkit.inference.predictor import Predictor
from depthkit.metrics import METRICS
from depthkit.metrics_edges import BOUNDARY_RATIOS, EDGE_RATIO, mask_boundary_recall
from depthkit.metrics_pairs import pair_accuracy, whdr
from depthkit.metrics_video import ate, temporal_consistency

SAME = 1e-6
DISPARITY = ProtocolConfig(name="disparity", max_depth=80, alignment=Alignment.disparity_least_squares)


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="scikit-learn is not installed (dev extra)")


@pytest.fixture
def stats():
    return pytest.importorskip("scipy.stats", reason="SciPy is not installed (dev extra)")


@pytest.fixture
def ndimage():
    return pytest.importorskip("scipy.ndimage", reason="SciPy is not installed (dev extra)")


@pytest.fixture
def scene():
    """Prediction, target, mask of one image, (1, H, W) each: depths of 1 m to 60 m, errors of about 20 %, holes."""
    rng = np.random.default_rng(3)
    target = np.exp(rng.uniform(0, np.log(60), (1, 37, 53))).astype(np.float32)
    prediction = (target * np.exp(rng.normal(0, 0.2, target.shape))).astype(np.float32)
    return torch.from_numpy(prediction), torch.from_numpy(target), torch.from_numpy(rng.random(target.shape) < 0.6)


def valid(scene):
    """Prediction and target at the valid pixels, float64."""
    prediction, target, mask = scene
    return prediction[mask].double().numpy(), target[mask].double().numpy()


# --- alignment and metrics ------------------------------------------------------------------------------------------


def test_scikit_learn_fits_the_same_lines(sklearn, scene):
    from sklearn.linear_model import LinearRegression

    prediction, target, mask = scene
    p, t = valid(scene)
    everywhere = prediction.double().numpy().reshape(-1, 1)
    fits = {
        align_least_squares: LinearRegression().fit(p[:, None], t).predict(everywhere),
        align_scale_least_squares: LinearRegression(fit_intercept=False).fit(p[:, None], t).predict(everywhere),
        align_log_least_squares: np.exp(
            LinearRegression().fit(np.log(p)[:, None], np.log(t)).predict(np.log(everywhere))
        ),
    }
    for align, expected in fits.items():
        np.testing.assert_allclose(align(prediction, target, mask).flatten(), expected, rtol=SAME, atol=SAME)


def test_scikit_learn_finds_no_smaller_absolute_error(sklearn, scene):
    """Its quantile regression is a linear program, ours reweights least squares."""
    from sklearn.linear_model import QuantileRegressor

    p, t = valid(scene)
    exact = QuantileRegressor(quantile=0.5, alpha=0, solver="highs").fit(p[:, None], t)
    scale, shift = fit_least_absolute(*scene)
    ours = np.abs(scale.item() * p + shift.item() - t).mean()
    assert ours == pytest.approx(np.abs(exact.predict(p[:, None]) - t).mean(), rel=1e-4)


def test_scikit_learn_scores_the_same(sklearn, scene):
    from sklearn import metrics
    from sklearn.preprocessing import StandardScaler

    p, t = valid(scene)
    e = np.log(p) - np.log(t)
    log_error = metrics.mean_squared_error(np.log(t), np.log(p))
    expected = {
        "abs_rel": metrics.mean_absolute_percentage_error(t, p),
        "sq_rel": metrics.mean_squared_error(t, p, sample_weight=1 / t) * (1 / t).mean(),
        "rmse": metrics.root_mean_squared_error(t, p),
        "rmse_log": np.sqrt(log_error),
        "log10": metrics.mean_absolute_error(np.log10(t), np.log10(p)),
        "scale_invariant_error": StandardScaler().fit(e[:, None]).var_.item(),
        "rmse_log_scale_invariant": np.sqrt(log_error - e.mean() ** 2),
        "silog": 100 * np.sqrt(log_error - e.mean() ** 2),
        "silog_half": np.sqrt(log_error - 0.5 * e.mean() ** 2),
    }
    for name, value in expected.items():
        assert METRICS[name].function(*scene).item() == pytest.approx(value, rel=SAME), name


def test_torchmetrics_scores_the_same(scene):
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed (comes with lightning)")
    p, t = map(torch.from_numpy, valid(scene))
    functional = torchmetrics.functional
    expected = {
        "abs_rel": functional.mean_absolute_percentage_error(p, t),
        "rmse": functional.mean_squared_error(p, t, squared=False),
        "rmse_log": functional.mean_squared_error(p.log(), t.log(), squared=False),
        "log10": functional.mean_absolute_error(p.log10(), t.log10()),
    }
    worse = torch.maximum(p / t, t / p)
    for name, limit in {"delta_1_05": 1.05, "delta_1_10": 1.1, "delta1": 1.25, "delta2": 1.25**2}.items():
        everything = torch.ones_like(worse, dtype=torch.int)
        expected[name] = functional.accuracy((worse < limit).int(), everything, task="binary")
    for name, value in expected.items():
        assert METRICS[name].function(*scene).item() == pytest.approx(value.item(), rel=SAME), name


def test_a_whole_protocol_from_parts_of_others(sklearn, scene):
    """Fit in disparity, clamp, invert, score, with scikit-learn and NumPy alone."""
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

    prediction, target, mask = scene
    p, t = valid((3 / prediction + 0.5, target, mask))
    aligned = LinearRegression().fit(p[:, None], 1 / t).predict(p[:, None])
    depth = np.clip(1 / np.maximum(aligned, 1 / 80), 1e-3, 80)
    values = score(3 / prediction + 0.5, target, mask, DISPARITY)
    assert values["abs_rel"].item() == pytest.approx(mean_absolute_percentage_error(t, depth), rel=SAME)
    assert values["rmse"].item() == pytest.approx(root_mean_squared_error(t, depth), rel=SAME)


# --- order ----------------------------------------------------------------------------------------------------------


def test_scipy_ranks_the_same(stats, scene):
    prediction, target, mask = scene
    p, t = valid(scene)
    expected = stats.spearmanr(-p, -t).statistic
    assert rank_correlation(prediction, target, mask, "depth").item() == pytest.approx(expected, abs=SAME)
    coarse = (prediction / 5).round()  # ties
    expected = stats.spearmanr(valid((coarse, target, mask))[0], -t).statistic
    assert rank_correlation(coarse, target, mask, "disparity").item() == pytest.approx(expected, abs=SAME)


def test_kendalls_tau_counts_the_same_pairs(stats, sklearn):
    """Over all pairs without a tie, accuracy is (tau + 1) / 2."""
    from sklearn.metrics import zero_one_loss

    rng = np.random.default_rng(0)
    nearness, truth = rng.random((5, 6)), rng.random((5, 6))
    cells = list(np.ndindex(5, 6))
    pairs = [(first, second) for first, second in combinations(cells, 2)]
    closer = np.array([int(truth[second] > truth[first]) for first, second in pairs])
    predicted = np.array([int(nearness[second] > nearness[first]) for first, second in pairs])
    arguments = torch.from_numpy(nearness), torch.tensor(pairs).flatten(1), torch.from_numpy(closer)
    tau = stats.kendalltau(nearness.ravel(), truth.ravel()).statistic
    assert pair_accuracy(*arguments).item() == pytest.approx((tau + 1) / 2, abs=SAME)
    weights = rng.random(len(pairs))
    expected = zero_one_loss(closer, predicted, sample_weight=weights)
    assert whdr(*arguments, torch.from_numpy(weights)).item() == pytest.approx(expected, abs=SAME)


# --- edges ----------------------------------------------------------------------------------------------------------


def surfaces():
    """Depth of smooth surfaces with jumps, a prediction of it, and a mask; float64 (H, W)."""
    rng = np.random.default_rng(1)
    target = np.exp(np.cumsum(rng.normal(0, 0.07, (40, 50)), axis=1))
    return target * np.exp(rng.normal(0, 0.03, target.shape)), target, rng.random(target.shape) < 0.9


def test_scikit_learn_counts_the_same_boundaries(sklearn):
    from sklearn.metrics import f1_score, precision_score, recall_score

    prediction, target, mask = surfaces()
    turns = range(4)  # every direction is a step to the right of a turned image
    f1, recalls = [], []
    for ratio in BOUNDARY_RATIOS.tolist():
        precision, recall = [], []
        for turn in turns:
            p, t, m = (np.rot90(values, turn) for values in (prediction, target, mask))
            is_pair = m[:, 1:] & m[:, :-1]
            found, true = ((d[:, 1:] / d[:, :-1] > ratio)[is_pair] for d in (p, t))
            precision.append(precision_score(true, found, zero_division=0))
            recall.append(recall_score(true, found, zero_division=0))
            assert f1_score(true, found, zero_division=0) > 0
        f1.append(2 * np.mean(precision) * np.mean(recall) / (np.mean(precision) + np.mean(recall)))
        recalls.append(np.mean(recall))
    maps = [torch.from_numpy(values)[None] for values in (prediction, target, mask)]
    expected = np.average(f1, weights=BOUNDARY_RATIOS)
    assert METRICS["boundary_f1"].function(*maps).item() == pytest.approx(expected, rel=SAME)
    expected = np.average(recalls, weights=BOUNDARY_RATIOS)
    assert METRICS["boundary_recall"].function(*maps).item() == pytest.approx(expected, rel=SAME)


def test_scipy_dilates_to_the_same_edges(ndimage):
    prediction, target, mask = surfaces()
    target = target**0.2
    edges = np.zeros_like(mask)
    for turn in range(4):
        t, m, out = (np.rot90(values, turn) for values in (target, mask, edges))  # `out` is a view
        is_jump = (np.maximum(t[:, 1:] / t[:, :-1], t[:, :-1] / t[:, 1:]) > EDGE_RATIO) & m[:, 1:] & m[:, :-1]
        out[:, 1:] |= is_jump
        out[:, :-1] |= is_jump
    near = ndimage.binary_dilation(edges, np.ones((5, 5))) & mask
    assert 0.1 < near.mean() < 0.8
    expected = np.mean(np.abs(prediction[near] - target[near]) / target[near])
    maps = [torch.from_numpy(values)[None] for values in (prediction, target, mask)]
    assert METRICS["edge_abs_rel"].function(*maps).item() == pytest.approx(expected, rel=SAME)


def test_scipy_labels_the_same_runs(ndimage):
    """Non-maximum suppression of a mask's boundaries: runs are connected components of a row."""
    prediction, _, _ = surfaces()
    foreground = np.add.outer(np.arange(40), np.arange(50)) % 17 < 9
    expected = []
    for ratio in BOUNDARY_RATIOS.tolist():
        recalls = []
        for turn in range(4):
            d, inside = np.rot90(prediction, turn), np.rot90(foreground, turn)
            quotient = d[:, 1:] / d[:, :-1]
            runs, count = ndimage.label(quotient > ratio, [[0, 0, 0], [1, 1, 1], [0, 0, 0]])
            peaks = np.zeros_like(inside[:, 1:])
            for peak in ndimage.maximum_position(quotient, runs, range(1, count + 1)):
                peaks[peak] = True
            border = inside[:, :-1] & ~inside[:, 1:]
            recalls.append((peaks & border).sum() / border.sum())
        expected.append(np.mean(recalls))
    value = mask_boundary_recall(torch.from_numpy(prediction)[None], torch.from_numpy(foreground)[None])
    assert value.item() == pytest.approx(np.average(expected, weights=BOUNDARY_RATIOS), rel=SAME)


# --- video ----------------------------------------------------------------------------------------------------------


def test_opencv_projects_to_the_same_pixels():
    rng = np.random.default_rng(2)
    depth = rng.uniform(2, 3, (2, 20, 30)).astype(np.float32)
    fx, fy, cx, cy = 31.0, 33.0, 14.2, 9.7
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    poses = np.stack([np.eye(4)] * 2)
    poses[1, :3, :3] = cv2.Rodrigues(np.array([0.02, -0.05, 0.01]))[0]
    poses[1, :3, 3] = 0.1, 0.05, 0.2

    def one_way(i, j):
        there = np.linalg.inv(poses[j]) @ poses[i]
        rows, cols = np.indices(depth[i].shape).reshape(2, -1) + 0.5
        z = depth[i].ravel().astype(np.float64)
        points = np.stack([(cols - cx) / fx * z, (rows - cy) / fy * z, z], axis=1)
        places = cv2.projectPoints(points, cv2.Rodrigues(there[:3, :3])[0], there[:3, 3], matrix, None)[0][:, 0]
        col, row = np.floor(places).astype(int).T
        z = (points @ there[:3, :3].T + there[:3, 3])[:, 2]
        lands = (row >= 0) & (row < 20) & (col >= 0) & (col < 30)
        moved = np.full((20, 30), np.inf)
        np.minimum.at(moved, (row[lands], col[lands]), z[lands])
        seen = np.isfinite(moved)
        return np.mean(np.abs(depth[j][seen] - moved[seen]) / depth[j][seen])

    maps = torch.from_numpy(depth), torch.from_numpy(poses)
    value = temporal_consistency(*maps, (fx, fy, cx, cy), torch.ones(depth.shape, dtype=torch.bool))
    assert value.item() == pytest.approx((one_way(0, 1) + one_way(1, 0)) / 2, rel=SAME)


def test_scikit_learn_scales_the_same_path(sklearn):
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import mean_squared_error

    rng = np.random.default_rng(4)
    poses = np.stack([np.stack([np.eye(4)] * 5)] * 2)
    poses[:, 1:, :3, 3] = rng.normal(0, 1, (2, 4, 3))
    predicted, true = (path[:, :3, 3].reshape(-1, 1) for path in poses)
    fitted = LinearRegression(fit_intercept=False).fit(predicted, true).predict(predicted)
    expected = np.sqrt(mean_squared_error(true, fitted) * 15) / 5
    assert ate(*map(torch.from_numpy, poses)).item() == pytest.approx(expected, rel=SAME)


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (dev extra)")


def test_transformers_resizes_and_inverts_to_the_same_numbers(transformers, scene):
    """Depth Pro's inverse depth, resized (bilinear) and inverted there, scores as the inverse depth does here."""
    _, target, mask = scene
    small = torch.from_numpy(np.random.default_rng(5).uniform(0.05, 1, (1, 17, 23))).float()
    processor = transformers.DepthProImageProcessor(resample=2)  # bilinear
    outputs = SimpleNamespace(predicted_depth=small, field_of_view=None)
    depth = processor.post_process_depth_estimation(outputs, [tuple(target.shape[1:])])[0]["predicted_depth"]
    theirs, ours = score(depth[None], target, mask, DISPARITY, "depth"), score(small, target, mask, DISPARITY)
    for name, value in ours.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=SAME), name


def test_transformers_averages_flips_the_same(transformers):
    """ZoeDepth's post-processing, for a network whose answer depends on the side."""

    def network(image):
        return (image.mean(1) * torch.linspace(1, 2, image.shape[3])).exp()

    model = DPTConfig(encoder="fake", tap_layers=[0, 1, 2, 3], features=2, out_channels=[1, 1, 1, 1])
    facts = BundleFacts(content="depth_model", model=model, kind="depth", short_side=24)
    predictor = Predictor(network, facts, name="fake", multiple=8, device=torch.device("cpu"))
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    batch = normalize(torch.from_numpy(image).permute(2, 0, 1)[None].float(), facts.mean, facts.std)
    outputs, flipped = (SimpleNamespace(predicted_depth=network(each)) for each in (batch, batch.flip(-1)))
    processor = transformers.ZoeDepthImageProcessor(do_pad=False)
    expected = processor.post_process_depth_estimation(outputs, outputs_flipped=flipped)[0]["predicted_depth"]
    np.testing.assert_allclose(predictor.predict(image, flip=True).values, expected, rtol=SAME)
    assert not np.allclose(predictor.predict(image).values, expected, rtol=0.01)
