"""Scoring images one after the other: the next ones are read, and the last ones scored, while a network predicts.

A process scores a share of the images, every one of them exactly once among all processes, and holds a few at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from depthkit.data.quarantine import SampleError
from depthkit.evaluation.depth_errors import depth_edges, error_by_depth
from depthkit.evaluation.ground_truth import Case, EvaluationSet, check_enough_pixels, compare_case, cut, metrics_of
from depthkit.evaluation.models import Model, StoredPredictions
from depthkit.evaluation.pairs import PairCase, count_pairs, read_pairs, score_pairs
from depthkit.evaluation.protocols import rank_correlation
from depthkit.evaluation.settings import GroundTruth, ProtocolConfig
from depthkit.inference.depth_files import ahead
from depthkit.inference.predictor import Predictor
from depthkit.types import Prediction

Scores = dict[str, float]
"""Metric name -> value."""


class Place(NamedTuple):
    """An image among all of an evaluation: its number, and those of its data set, shard and sample."""

    number: int
    dataset: int
    shard: int
    sample: int


@dataclass(frozen=True, kw_only=True)
class Reading:
    """An image with its ground truth, cut as the protocol says, and predictions for it; or the reason for none."""

    place: Place
    key: str
    case: Case | PairCase | None = None
    num_pixels: int = 0
    predictions: dict[str, Prediction] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an image: what is known of each model by name, or the reason why it cannot be used.

    `num_pixels` is the number of evaluated pixels, or pairs.
    """

    place: Place
    key: str
    num_pixels: int = 0
    scored: dict[str, "Scored"] = field(default_factory=dict)
    reason: str = ""


class Scored(NamedTuple):
    """A model's metrics on an image, the rank correlation of its prediction with the ground truth (at -1 the order is
    reversed), and for maps its error over depth (`depth_errors.error_by_depth`)."""

    scores: Scores
    order: float
    depth_errors: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Models, by name, that are compared by a protocol on data sets."""

    models: Mapping[str, Model]
    datasets: Sequence[EvaluationSet]
    protocol: ProtocolConfig

    @property
    def num_images(self) -> int:
        return sum(dataset.manifest.num_samples for dataset in self.datasets)

    def places(self) -> Iterator[Place]:
        """Every image once, in the order of the manifests."""
        number = 0
        for dataset, manifest in enumerate(each.manifest for each in self.datasets):
            for shard, facts in enumerate(manifest.shards):
                for sample in range(facts.num_samples):
                    yield Place(number, dataset, shard, sample)
                    number += 1

    def outcomes(self, places: Iterable[Place], num_workers: int) -> Iterator[Outcome]:
        """What came of each image, in order, with `num_workers` threads that read and score.

        ValueError when the protocol is not defined for a model's kind, when a prediction is missing on disk, and when
        one is not finite: skipping that image would reward the model that failed on it.
        """
        num_threads = torch.get_num_threads()  # before the pool, whose threads would set the number for this one too
        try:
            # One thread for an operation: a sum that is split in another way is another one in its last digits.
            with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                read = (reading.result() for _, reading in ahead(pool, self.read, places, 2 * num_workers))
                for _, outcome in ahead(pool, self.score, map(self.predict, read), 2 * num_workers):
                    yield outcome.result()
        finally:
            torch.set_num_threads(num_threads)

    def read(self, place: Place) -> Reading:
        """The image, its ground truth, and what predictions lie on disk."""
        dataset = self.datasets[place.dataset]
        key = f"sample {place.sample}"
        try:
            key = dataset.keys(place.shard)[place.sample]
            whole = TRUTHS[self.protocol.ground_truth].read(dataset, place)
            case = cut(whole, self.protocol) if isinstance(whole, Case) else whole
            num_pixels = TRUTHS[self.protocol.ground_truth].count(case, self.protocol)
        except (SampleError, OSError) as error:
            return Reading(place=place, key=key, reason=str(error))
        stored = {}
        for name, model in self.models.items():
            if isinstance(model, StoredPredictions):
                prediction = model.read(dataset.name, key)
                try:
                    check_not_transposed(prediction, whole)
                    stored[name] = windowed(prediction, whole, self.protocol)
                except ValueError as error:
                    raise ValueError(f"model {name}: {key}: {error}") from error
        return Reading(place=place, key=key, case=case, num_pixels=num_pixels, predictions=stored)

    def predict(self, reading: Reading) -> Reading:
        """The same with the predictions of all models."""
        if reading.case is None:
            return reading
        predictions = {
            name: reading.predictions[name]
            if isinstance(model, StoredPredictions)
            else predict_case(model, reading.case, reading.key, self.protocol)
            for name, model in self.models.items()
        }
        for name, prediction in predictions.items():
            if not np.isfinite(prediction.values).all():
                raise ValueError(
                    f"model {name}: its prediction for {reading.key} is not finite; it cannot be evaluated"
                )
        return replace(reading, predictions=predictions)

    def score(self, reading: Reading) -> Outcome:
        scored = {}
        for name, prediction in reading.predictions.items():
            try:
                scored[name] = TRUTHS[self.protocol.ground_truth].score(reading.case, prediction, self.protocol)
            except ValueError as error:
                raise ValueError(f"model {name}: {error}") from error
        return Outcome(
            place=reading.place, key=reading.key, num_pixels=reading.num_pixels, scored=scored, reason=reading.reason
        )

    def check_complete(self) -> None:
        """ValueError that counts the predictions that are missing on disk for images that can be used."""
        for name, model in self.models.items():
            if isinstance(model, StoredPredictions):
                missing = [key for place in self.places() if (key := self._missing(model, place))]
                if missing:
                    some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                    raise ValueError(
                        f"model {name}: {len(missing)} of {self.num_images} predictions are missing: {some}"
                    )

    def _missing(self, model: StoredPredictions, place: Place) -> str:
        """The file that the prediction for a usable image is missing in; empty if it is there, or not needed."""
        dataset = self.datasets[place.dataset]
        try:
            key = dataset.keys(place.shard)[place.sample]
        except (SampleError, OSError):
            return ""
        if model.find(dataset.name, key) is not None or replace(self, models={}).read(place).reason:
            return ""
        return str(model.folder_of(dataset.name) / key)


def predict_case(model: Model, case: Case | PairCase, key: str, protocol: ProtocolConfig) -> Prediction:
    """ValueError where the model needs to know the camera of an image, and the data set does not say it."""
    assert not isinstance(model, StoredPredictions)
    image = np.ascontiguousarray(case.image)
    if not (isinstance(model, Predictor) and model.facts.canonical_focal_px):
        return model.predict(image, flip=protocol.flip)
    if not isinstance(case, Case) or not np.isfinite(case.focal_px):
        raise ValueError(f"model {model.name}: {key} states no focal length (`intrinsics_px`), which the model needs")
    return model.predict(image, flip=protocol.flip, focal_px=case.focal_px)


def check_not_transposed(prediction: Prediction, whole: Case | PairCase) -> None:
    """ValueError for a stored map of width x height. Any other size is resized, and may be out of proportion."""
    height, width = whole.image.shape[:2]
    if height != width and prediction.values.shape == (width, height):
        raise ValueError(f"a map of {width} rows and {height} columns for an image of {height} rows: is it transposed?")


def windowed(prediction: Prediction, whole: Case | PairCase, protocol: ProtocolConfig) -> Prediction:
    """A stored prediction, of the whole image or of the protocol's window, as one of the window; else ValueError."""
    if protocol.window is None or prediction.values.shape == tuple(protocol.window) or isinstance(whole, PairCase):
        return prediction
    try:
        return replace(prediction, values=cut(whole._replace(depth=prediction.values), protocol).depth)
    except SampleError as error:
        raise ValueError(f"prediction of {prediction.values.shape}: {error}") from error


# --- by kind of ground truth -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """How ground truth of one kind is read, how much of it counts, and how a prediction is compared with it."""

    read: Callable[[EvaluationSet, Place], Any]
    count: Callable[[Any, ProtocolConfig], int]
    score: Callable[[Any, Prediction, ProtocolConfig], Scored]


def score_map(case: Case, prediction: Prediction, protocol: ProtocolConfig) -> Scored:
    comparison = compare_case(case, prediction, protocol)
    values, depth, valid_mask = (
        torch.from_numpy(np.ascontiguousarray(m))[None] for m in (prediction.values, case.depth, case.valid_mask)
    )
    order = rank_correlation(values, depth, valid_mask, prediction.kind).item()
    errors = error_by_depth(comparison, depth_edges(protocol)).numpy()
    return Scored(metrics_of(comparison, protocol), order, errors)


TRUTHS = {
    GroundTruth.depth: Truth(lambda data, place: data.read(place.shard, place.sample), check_enough_pixels, score_map),
    GroundTruth.pairs: Truth(
        lambda data, place: read_pairs(data.members(place.shard, place.sample)),
        count_pairs,
        lambda case, prediction, protocol: Scored(*score_pairs(case, prediction, protocol)),
    ),
}
