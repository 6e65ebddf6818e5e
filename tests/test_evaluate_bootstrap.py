"""Intervals of means and of differences between models on the same images."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_evaluate import PROTOCOL

from depthkit.evaluation.bootstrap import MAX_DRAWS, interval, resampled_means
from depthkit.evaluation.outputs import latex_table, results
from depthkit.evaluation.results import Evaluation, ScoredImage
from depthkit.evaluation.settings import Aggregation


class Data:
    """Stands for an `EvaluationSet`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.manifest = self

    def digest(self) -> str:
        return "0" * 64


class Named:
    kind, sha256, name = "disparity", "", "x"


def evaluation_of(
    values: dict[str, np.ndarray], num_pixels: np.ndarray | None = None, **settings: object
) -> Evaluation:
    """One with the metric abs_rel (images,) of each model; the second half of the images is of another data set."""
    sets = Data("a/test"), Data("b/test")
    count = len(next(iter(values.values())))
    images = [
        ScoredImage(
            dataset=sets[2 * n // count],
            shard=0,
            index=n,
            key=str(n),
            scores={model: {settings.get("metric", "abs_rel"): float(column[n])} for model, column in values.items()},
            order=dict.fromkeys(values, 1.0),
            num_pixels=1 if num_pixels is None else int(num_pixels[n]),
        )
        for n in range(count)
    ]
    protocol = replace(
        PROTOCOL,
        metrics=[settings.get("metric", "abs_rel")],
        aggregation=Aggregation.images if num_pixels is None else Aggregation.pixels,
    )
    predictors = {model: Named() for model in values}
    return Evaluation(protocol=protocol, predictors=predictors, images=images, skipped=[], seconds=1.0)


def plain_bootstrap(statistic, num_images: int) -> tuple[float, float]:
    """An own loop, with draws of its own."""
    generator = np.random.default_rng(12345)
    values = [statistic(generator.choice(num_images, num_images)) for _ in range(20_000)]
    return float(np.percentile(values, 2.5)), float(np.percentile(values, 97.5))


def test_intervals_are_those_of_a_plain_bootstrap():
    values = np.random.default_rng(0).gamma(2.0, 0.1, 80)
    found = evaluation_of({"a": values})
    low, high = plain_bootstrap(lambda rows: values[rows].mean(), 80)
    assert found.interval("a", "abs_rel") == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.interval("a", "abs_rel") == evaluation_of({"a": values}).interval("a", "abs_rel"), "seeded"


def test_intervals_of_a_data_set_are_over_its_own_images():
    values = np.concatenate([np.full(10, 0.5), np.linspace(0, 1, 10)])
    found = evaluation_of({"a": values})
    assert found.interval("a", "abs_rel", "a/test") == (0.5, 0.5)
    low, high = plain_bootstrap(lambda rows: values[10:][rows].mean(), 10)
    assert found.interval("a", "abs_rel", "b/test") == pytest.approx((low, high), abs=0.05 * (high - low))


def test_ninety_five_of_a_hundred_intervals_hold_the_true_mean():
    generator = np.random.default_rng(1)
    samples = generator.exponential(1.0, (400, 100))
    held = [low <= 1.0 <= high for low, high in (interval(means) for means in resampled_means_of(samples))]
    assert 0.90 <= np.mean(held) <= 0.98


def resampled_means_of(samples: np.ndarray) -> np.ndarray:
    return resampled_means(samples.T, np.ones(samples.shape[1])).T


def test_differences_are_paired():
    """Two models that differ little beside what images differ: means overlap, the difference is clear."""
    generator = np.random.default_rng(2)
    images = generator.gamma(2.0, 0.2, 60)
    worse = images + 0.02 + generator.normal(0, 0.01, 60)
    found = evaluation_of({"a": images, "b": worse})
    difference = found.difference("b", "a", "abs_rel")
    assert difference.mean == pytest.approx((worse - images).mean())
    low, high = plain_bootstrap(lambda rows: (worse - images)[rows].mean(), 60)
    assert difference[1:] == pytest.approx((low, high), abs=0.05 * (high - low))
    assert difference.is_clear
    assert found.interval("a", "abs_rel")[1] > found.interval("b", "abs_rel")[0]
    backwards = found.difference("a", "b", "abs_rel")
    assert (backwards.low, backwards.high) == pytest.approx((-difference.high, -difference.low))


def test_pooled_pixels_weigh_images_by_their_number_also_in_the_bootstrap():
    generator = np.random.default_rng(3)
    values, num_pixels = generator.gamma(2.0, 0.5, 50), generator.integers(10, 1000, 50)
    found = evaluation_of({"a": values}, num_pixels, metric="rmse")

    def pooled(rows: np.ndarray) -> float:
        return math.sqrt((values[rows] ** 2 * num_pixels[rows]).sum() / num_pixels[rows].sum())

    assert found.means("a")["rmse"] == pytest.approx(pooled(np.arange(50)))
    low, high = plain_bootstrap(pooled, 50)
    assert found.interval("a", "rmse") == pytest.approx((low, high), abs=0.06 * (high - low))


def test_an_image_without_a_value_is_left_out_for_all_models():
    a, b = np.array([1.0, 2.0, 3.0, np.nan]), np.array([1.0, np.nan, 5.0, 7.0])
    found = evaluation_of({"a": a, "b": b})
    assert found.means("a") == {"abs_rel": 2.0}
    assert found.means("b") == {"abs_rel": 3.0}
    assert found.difference("b", "a", "abs_rel").mean == 1.0
    assert found.num_undefined() == {"abs_rel": 2}


def test_an_infinite_value_is_not_hidden():
    found = evaluation_of({"a": np.array([1.0, np.inf, 1.0, 1.0])})
    assert found.means("a")["abs_rel"] == np.inf
    assert np.isnan(found.interval("a", "abs_rel")).all()
    assert results(found)["models"]["a"]["overall"] == {"abs_rel": None}


def test_one_image_says_nothing_of_others():
    found = evaluation_of({"a": np.array([1.0])})
    assert found.means("a") == {"abs_rel": 1.0}
    assert np.isnan(found.interval("a", "abs_rel")).all()
    assert r"a & 1.0000 \\" in latex_table(found)


def test_many_images_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(4).random((50, 2))
    whole = resampled_means(values, np.ones(50))
    monkeypatch.setattr("depthkit.evaluation.bootstrap.MAX_DRAWS", 1000)
    assert MAX_DRAWS > 1000
    np.testing.assert_array_equal(resampled_means(values, np.ones(50)), whole)


def test_files_hold_intervals_and_differences():
    generator = np.random.default_rng(5)
    found = evaluation_of({"first_model": generator.random(20), "b": generator.random(20)})
    found.warnings.append("LEAKAGE: 100 % of it")
    stored = results(found)
    assert stored["models"]["b"]["intervals"]["overall"]["abs_rel"] == list(found.interval("b", "abs_rel"))
    assert stored["models"]["b"]["intervals"]["datasets"]["a/test"]["abs_rel"] == list(
        found.interval("b", "abs_rel", "a/test")
    )
    (difference,) = stored["differences"]
    assert (difference["model"], difference["minus"]) == ("first_model", "b")
    expected = found.difference("first_model", "b", "abs_rel", "b/test")
    assert difference["datasets"]["b/test"]["abs_rel"] == expected._asdict()
    table = latex_table(found)
    assert table.count(r"\midrule") == 3
    assert r"first\_model" in table
    assert stored["protocol"]["id"] in table.replace("\\", "")
    assert r"Warning: LEAKAGE: 100 \% of it." in table
    assert f"{found.interval('b', 'abs_rel')[0]:.4f}" in table
