"""What an evaluation found: means over images, how far they could be off, and how models differ on the same images."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from depthkit.evaluation.bootstrap import interval, resampled_means
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.models import Model
from depthkit.evaluation.protocols import aggregate
from depthkit.evaluation.scoring import Place, Reading, Scores, Scoring
from depthkit.evaluation.settings import POOLING_POWER, Aggregation, ProtocolConfig
from depthkit.metrics import IS_LOWER_BETTER
from depthkit.types import Rejection


class Difference(NamedTuple):
    """The mean of one model's values minus another's on the same images, and its interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """The scores of every model on one image, and where to find the image again.

    `num_pixels` is the number of evaluated pixels, or pairs; `order` the rank correlation of each model's prediction
    with the ground truth (`protocols.rank_correlation`).
    """

    dataset: EvaluationSet
    shard: int
    index: int
    key: str
    scores: dict[str, Scores]  # model name -> metric -> value
    num_pixels: int = 1
    order: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models compared by one protocol on the same images.

    A metric that is undefined (NaN) for one of the models on an image is left out for all of them there, so that their
    means are over the same images; `warnings` says how many. Only numbers are held, no maps.
    """

    protocol: ProtocolConfig
    predictors: Mapping[str, Model]
    images: list[ScoredImage]
    skipped: list[Rejection]
    seconds: float
    depth_errors: Mapping[str, np.ndarray] = field(default_factory=dict)  # `depth_errors.error_by_depth` of all images
    warnings: list[str] = field(default_factory=list)  # what every output must say beside the numbers
    notes: list[str] = field(default_factory=list)  # what a careful reader may want to know: what was not checked

    @cached_property
    def dataset_names(self) -> list[str]:
        return list(dict.fromkeys(image.dataset.name for image in self.images))

    @cached_property
    def values(self) -> np.ndarray:
        """(models, metrics, images), NaN for all models where one has no value."""
        metrics = self.protocol.metrics
        rows = [[[image.scores[name][m] for image in self.images] for m in metrics] for name in self.predictors]
        values = np.array(rows, np.float64)
        return np.where(np.isnan(values).any(axis=0), np.nan, values)

    @cached_property
    def num_pixels(self) -> np.ndarray:
        """(images,)."""
        return np.array([image.num_pixels for image in self.images], np.float64)

    def rows(self, dataset: str | None) -> np.ndarray:
        """Numbers (n,) of the images of one data set, or of all."""
        return np.array([n for n, image in enumerate(self.images) if dataset in (None, image.dataset.name)])

    def means(self, model: str, dataset: str | None = None) -> Scores:
        """Each metric over the images of one data set, or over all, by the protocol's aggregation."""
        return dict(zip(self.protocol.metrics, self._means[dataset][self._place(model)].tolist(), strict=True))

    def interval(self, model: str, metric: str, dataset: str | None = None) -> tuple[float, float]:
        """95 % interval of a mean by bootstrap over images; NaN for a single image, which says nothing of others."""
        return interval(self._resampled[dataset][:, self._place(model), self.protocol.metrics.index(metric)])

    def difference(self, model_a: str, model_b: str, metric: str, dataset: str | None = None) -> Difference:
        """The mean of `model_a` minus that of `model_b`, and its 95 % interval by the same draws of images for both."""
        places, column = [self._place(model_a), self._place(model_b)], self.protocol.metrics.index(metric)
        mean = self._means[dataset][places, column]
        resampled = self._resampled[dataset][:, places, column]
        return Difference(float(mean[0] - mean[1]), *interval(resampled[:, 0] - resampled[:, 1]))

    def num_undefined(self) -> dict[str, int]:
        """Metric -> number of images that its means leave out, where there are some."""
        counts = np.isnan(self.values[0]).sum(axis=1).tolist()
        return {metric: count for metric, count in zip(self.protocol.metrics, counts, strict=True) if count}

    def predict(self, image: ScoredImage) -> Reading:
        """An image once more: its ground truth, cut as the protocol says, and the prediction of every model."""
        scoring = Scoring(models=self.predictors, datasets=[image.dataset], protocol=self.protocol)
        return scoring.predict(scoring.read(Place(0, 0, image.shard, image.index)))

    def _place(self, model: str) -> int:
        return list(self.predictors).index(model)

    @cached_property
    def _means(self) -> dict[str | None, np.ndarray]:
        """Data set, None for all -> (models, metrics)."""
        means: dict[str | None, np.ndarray] = {}
        for name in (None, *self.dataset_names):
            values, num_pixels = self.values[..., self.rows(name)], self.num_pixels[self.rows(name)]
            columns = [
                aggregate(self.protocol, metric, values[:, column], num_pixels)
                for column, metric in enumerate(self.protocol.metrics)
            ]
            means[name] = np.stack(columns, axis=1)
        return means

    @cached_property
    def _resampled(self) -> dict[str | None, np.ndarray]:
        """Data set, None for all -> (resamples, models, metrics)."""
        return {name: self._resample(self.rows(name)) for name in (None, *self.dataset_names)}

    def _resample(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) < 2:
            return np.full((1, *self.values.shape[:2]), np.nan)
        is_pooled = self.protocol.aggregation is Aggregation.pixels
        powers = np.array([[POOLING_POWER[name] if is_pooled else 1] for name in self.protocol.metrics])
        weights = self.num_pixels[rows] if is_pooled else np.ones(len(rows))
        means = resampled_means((self.values[..., rows] ** powers).reshape(-1, len(rows)).T, weights)
        return means.reshape(-1, *self.values.shape[:2]) ** (1 / powers[:, 0])


def best_model(evaluation: Evaluation, metric: str, dataset: str | None = None) -> str | None:
    """The model with the best mean, the first of equals; None when there is nothing to compare."""
    means = {model: evaluation.means(model, dataset)[metric] for model in evaluation.predictors}
    means = {model: mean for model, mean in means.items() if not np.isnan(mean)}
    if len(evaluation.predictors) < 2 or not means:
        return None
    return (min if IS_LOWER_BETTER[metric] else max)(means, key=lambda model: means[model])


def arrow(metric: str) -> str:
    return "↓" if IS_LOWER_BETTER[metric] else "↑"


def dataset_facts(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Data set name -> digest of its manifest, number of images scored and skipped."""
    return {
        dataset.name: {
            "manifest_digest": dataset.manifest.digest(),
            "num_images": sum(image.dataset is dataset for image in evaluation.images),
            "num_skipped": sum(rejection.dataset == dataset.name for rejection in evaluation.skipped),
        }
        for dataset in {image.dataset.name: image.dataset for image in evaluation.images}.values()
    }
