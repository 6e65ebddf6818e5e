"""Ground truth that is annotated pairs of points."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_evaluate import PERFECT, SIZE, Stub, npy, sample, write_dataset
from test_evaluate_models import depth_of, load, store, stored

from depthkit.evaluation.evaluate import evaluate
from depthkit.evaluation.settings import Aggregation, ProtocolConfig


def compose_protocol(compose, name: str) -> ProtocolConfig:
    settings = ["models=[x]", "datasets=[x]", f"protocol={name}", "protocol.datasets=null"]
    return compose(*settings, config_name="evaluate").protocol


def with_pairs(n: int, pairs: list[list[float]]) -> dict[str, bytes]:
    return {"png": sample(n)["png"], "json": json.dumps({"pairs": pairs}).encode()}


def ordered_pairs(n: int, count: int, wrong: int) -> list[list[int]]:
    """`count` pairs of pixels that differ in depth, the first `wrong` of them annotated the wrong way round."""
    depth, rng, pairs = depth_of(sample(n)), np.random.default_rng(n), []
    while len(pairs) < count:
        row, col, other_row, other_col = rng.integers(0, SIZE * 2).tolist()
        if depth[row, col] != depth[other_row, other_col]:
            is_second = bool(depth[row, col] > depth[other_row, other_col]) ^ (len(pairs) < wrong)
            pairs.append([row, col, other_row, other_col, 1 + is_second])
    return pairs


def test_pairs_are_counted_over_all_images(tmp_path, compose):
    protocol = compose_protocol(compose, "da2k")
    samples = [with_pairs(0, ordered_pairs(0, 4, wrong=1)), with_pairs(1, ordered_pairs(1, 12, wrong=0))]
    manifest = write_dataset(tmp_path / "da2k", samples, target=None)
    metric = Stub(lambda depth: depth, kind="depth", unit="metres")
    found = evaluate({"perfect": PERFECT, "metric": metric}, [manifest], protocol)
    assert [image.scores["perfect"]["pair_accuracy"] for image in found.images] == [0.75, 1.0]
    assert found.means("perfect") == found.means("metric") == {"pair_accuracy": pytest.approx(15 / 16)}
    rates = evaluate({"perfect": PERFECT}, [manifest], compose_protocol(compose, "whdr"))
    assert rates.means("perfect") == {"whdr": pytest.approx(1 / 16)}


def test_broken_pairs_are_named(tmp_path, compose):
    height, width = SIZE
    samples = [
        with_pairs(0, ordered_pairs(0, 3, wrong=0)),
        {"png": sample(1)["png"]},
        with_pairs(2, [[0, 0, height, 0, 1]]),
        with_pairs(3, [[0, 0, 1, 1, 0]]),
        with_pairs(4, [[0, 0, 1]]),
        with_pairs(5, [[0, 0, 1, 1, 1, -1.0]]),
        with_pairs(6, [[0, 0, 1, 1, 1, float("nan")]]),
        with_pairs(7, [[0, 0, 1, 1, 1, 1.0, 1.0]]),
    ]
    manifest = write_dataset(tmp_path / "da2k", samples, target=None)
    found = evaluate({"perfect": PERFECT}, [manifest], compose_protocol(compose, "da2k"))
    assert [image.num_pixels for image in found.images] == [3]
    reasons = {rejection.key: rejection.reason for rejection in found.skipped}
    assert "hold no pairs" in reasons["image_1"]
    assert f"lies outside its image of {height}x{width}" in reasons["image_2"]
    for number in range(3, 8):
        assert "closer 1 or 2" in reasons[f"image_{number}"]


def test_weights_of_pairs_enter_the_rate_of_an_image_and_no_rate_over_all_pairs(tmp_path, compose):
    weighted = [[*pair, 1.0 + 2 * (n == 0)] for n, pair in enumerate(ordered_pairs(0, 4, wrong=1))]
    manifest = write_dataset(tmp_path / "data", [with_pairs(0, weighted)], target=None)
    pooled = compose_protocol(compose, "whdr")
    with pytest.raises(ValueError, match="these pairs have weights"):
        evaluate({"perfect": PERFECT}, [manifest], pooled)
    by_image = replace(pooled, aggregation=Aggregation.images)
    assert evaluate({"perfect": PERFECT}, [manifest], by_image).means("perfect") == {"whdr": pytest.approx(3 / 6)}
    assert evaluate({"perfect": PERFECT}, [manifest], compose_protocol(compose, "da2k")).means("perfect") == {
        "pair_accuracy": pytest.approx(3 / 4)
    }


def test_ties_are_no_reversed_order(tmp_path, compose):
    manifest = write_dataset(tmp_path / "data", [with_pairs(0, ordered_pairs(0, 4, wrong=1))], target=None)
    models = {"flat": Stub(np.ones_like), "reversed": Stub(lambda depth: depth), "right": PERFECT}
    found = evaluate(models, [manifest], compose_protocol(compose, "da2k"))
    assert found.images[0].order == {"flat": 0.0, "reversed": -0.5, "right": 0.5}
    assert [warning.split()[0] for warning in found.warnings] == ["reversed"]


def test_a_stored_prediction_of_another_size_is_resized_to_the_annotated_image(tmp_path, compose):
    manifest = write_dataset(tmp_path / "data", [with_pairs(0, ordered_pairs(0, 30, wrong=0))], target=None)
    doubled = {"image_0": np.kron(1 / depth_of(sample(0)), np.ones((2, 2)))}
    folder = stored(store(tmp_path / "p", doubled, npy, "npy"), kind="disparity")
    assert evaluate(load(folder), [manifest], compose_protocol(compose, "da2k")).means("stored") == {"pair_accuracy": 1}
