"""What an evaluation found, as files and as a table. No number leaves without the id of its protocol."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from depthkit import __version__
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.protocols import protocol_fields, protocol_id
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.files import atomic_write
from depthkit.inference.predictor import Predictor
from depthkit.metrics import METRICS
from depthkit.types import Rejection

Scores = dict[str, float]
"""Metric name -> value."""


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """The scores of every model on one image, and where to find the image again."""

    dataset: EvaluationSet
    shard: int
    index: int
    key: str
    scores: dict[str, Scores]  # model name -> metric -> value


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Models compared by one protocol on the same images."""

    protocol: ProtocolConfig
    predictors: Mapping[str, Predictor]
    images: list[ScoredImage]
    skipped: list[Rejection]
    seconds: float

    @property
    def dataset_names(self) -> list[str]:
        return list(dict.fromkeys(image.dataset.name for image in self.images))

    def means(self, model: str, dataset: str | None = None) -> Scores:
        """Mean of each metric over the images of one data set, or over all images."""
        scores = [image.scores[model] for image in self.images if dataset in (None, image.dataset.name)]
        return {name: float(np.mean([score[name] for score in scores])) for name in self.protocol.metrics}


def results(evaluation: Evaluation) -> dict[str, Any]:
    """The content of `results.json`: means by model, and everything needed to know what they mean."""
    models = {
        name: {
            "sha256": predictor.sha256,
            "kind": predictor.kind,
            "overall": evaluation.means(name),
            "datasets": {dataset: evaluation.means(name, dataset) for dataset in evaluation.dataset_names},
        }
        for name, predictor in evaluation.predictors.items()
    }
    return {
        "protocol": {"id": protocol_id(evaluation.protocol), **protocol_fields(evaluation.protocol)},
        "aggregation": "per image, then mean over images",
        "models": models,
        "datasets": dataset_facts(evaluation),
        "num_images": len(evaluation.images),
        "skipped": [asdict(rejection) for rejection in evaluation.skipped],
        "seconds": round(evaluation.seconds, 3),
        "depthkit_version": __version__,
    }


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


def save(evaluation: Evaluation, out: Path) -> None:
    """Write `per_image.csv` and `results.json`."""
    out.mkdir(parents=True, exist_ok=True)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["protocol", "dataset", "key", "model", *evaluation.protocol.metrics])
    for image in evaluation.images:
        for model, scores in image.scores.items():
            row = [protocol_id(evaluation.protocol), image.dataset.name, image.key, model, *scores.values()]
            writer.writerow(row)
    with atomic_write(out / "per_image.csv") as file:
        file.write(table.getvalue().encode())
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(results(evaluation), indent=2).encode() + b"\n")


def best_model(evaluation: Evaluation, metric: str, dataset: str | None = None) -> str | None:
    """The model with the best mean, the first of equals; None when there is nothing to compare."""
    if len(evaluation.predictors) < 2:
        return None
    sign = 1 if METRICS[metric].is_lower_better else -1
    return min(evaluation.predictors, key=lambda model: sign * evaluation.means(model, dataset)[metric])


def arrow(metric: str) -> str:
    return "↓" if METRICS[metric].is_lower_better else "↑"


def summary_table(evaluation: Evaluation) -> Table:
    """Metric x model over all images, the best of each metric in bold; the title carries the protocol id."""
    title = f"{protocol_id(evaluation.protocol)}, mean over {len(evaluation.images)} images"
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    means = {model: evaluation.means(model) for model in evaluation.predictors}
    for model in means:
        table.add_column(Text(model), justify="right", overflow="fold")
    for metric in evaluation.protocol.metrics:
        best = best_model(evaluation, metric)
        cells = [
            f"[bold]{means[model][metric]:.4f}[/]" if model == best else f"{means[model][metric]:.4f}"
            for model in means
        ]
        table.add_row(f"{metric} {arrow(metric)}", *cells)
    return table
