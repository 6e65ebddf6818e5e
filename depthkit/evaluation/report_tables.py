"""The numbers of the report: means with intervals, differences between models, error over depth, every image."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from depthkit.evaluation.results import Evaluation, arrow, best_model
from depthkit.metrics import IS_LOWER_BETTER

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
MAX_ROWS = 20_000
"""Images in the table of the page; of more, those with the worst first metric. `per_image.csv` holds all."""


def number(value: float) -> str:
    """Four decimals, fewer for large numbers: "0.1820", "23.46", "1234"."""
    if not math.isfinite(value):
        return DASH
    return f"{value:.{4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def metric_facts(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {"name": name, "arrow": arrow(name), "lower": IS_LOWER_BETTER[name]} for name in evaluation.protocol.metrics
    ]


def mean_groups(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For all images and, of several data sets, for each: a row per model, a cell per metric."""
    names = evaluation.dataset_names
    if len(names) == 1:
        return [_mean_group(evaluation, None, names[0], len(evaluation.images))]
    counts = {name: sum(image.dataset.name == name for image in evaluation.images) for name in names}
    groups = [_mean_group(evaluation, name, name, counts[name]) for name in names]
    return [_mean_group(evaluation, None, "all images", len(evaluation.images)), *groups]


def _mean_group(evaluation: Evaluation, dataset: str | None, title: str, num_images: int) -> dict[str, Any]:
    metrics = evaluation.protocol.metrics
    best = {metric: best_model(evaluation, metric, dataset) for metric in metrics}
    rows = []
    for index, model in enumerate(evaluation.predictors):
        means = evaluation.means(model, dataset)
        cells = [
            {
                "value": means[metric],
                "text": number(means[metric]),
                "interval": interval_text(evaluation.interval(model, metric, dataset)),
                "best": best[metric] == model,
            }
            for metric in metrics
        ]
        rows.append({"model": model, "index": index, "cells": cells})
    return {"title": title, "num_images": num_images, "rows": rows}


def interval_text(interval: tuple[float, float]) -> str:
    """Both ends as `number`s; empty when it is not known, as of a single image."""
    return f"{number(interval[0])} {DASH} {number(interval[1])}" if np.isfinite(interval).all() else ""


def headline(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Each model's mean of the first metric over all images, and where it and its interval lie on a line (percent)."""
    metric = evaluation.protocol.metrics[0]
    means = {model: evaluation.means(model)[metric] for model in evaluation.predictors}
    ranges = {model: _finite_or(evaluation.interval(model, metric), mean) for model, mean in means.items()}
    low, high = (extreme(value for ends in ranges.values() for value in ends) for extreme in (min, max))
    margin = 0.08 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    return [
        {
            "model": model,
            "text": number(mean),
            "interval": interval_text(evaluation.interval(model, metric)),
            "place": place(mean),
            "start": place(ranges[model][0]),
            "width": place(ranges[model][1]) - place(ranges[model][0]),
            "best": best_model(evaluation, metric) == model,
        }
        for model, mean in means.items()
        if math.isfinite(mean)
    ]


def _finite_or(interval: tuple[float, float], mean: float) -> tuple[float, float]:
    return interval if np.isfinite(interval).all() else (mean, mean)


def difference_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Every other model minus the first, on the same images: a cell per metric, better, worse or unclear."""
    first, *others = evaluation.predictors
    metrics = evaluation.protocol.metrics
    return [
        {
            "model": model,
            "index": index,
            "first": first,
            "cells": [_difference_cell(evaluation, model, first, metric) for metric in metrics],
        }
        for index, model in enumerate(others, start=1)
    ]


def _difference_cell(evaluation: Evaluation, model: str, first: str, metric: str) -> dict[str, str]:
    difference = evaluation.difference(model, first, metric)
    sign = 1 if IS_LOWER_BETTER[metric] else -1
    low, high = sorted((sign * difference.low, sign * difference.high))
    return {
        "text": signed(difference.mean),
        "interval": f"{signed(difference.low)} to {signed(difference.high)}" if math.isfinite(low + high) else "",
        "verdict": "better" if high < 0 else "worse" if low > 0 else "unclear",
    }


def signed(value: float) -> str:
    """`number` with its sign, a minus that is as wide as a plus."""
    return f"{'+' if value > 0 else ''}{number(value)}".replace("-", MINUS)


def depth_chart(
    edges: Sequence[float], errors: Mapping[str, np.ndarray], unit: str, height: float = 230.0
) -> dict[str, Any] | None:
    """Mean AbsRel over true depth as places in a drawing: x in percent of its width, y in pixels below its top.

    `errors` holds for each model what `error_by_depth` gives, (2, bins), added up. None when nothing was counted.
    """
    counts = next((counts for _, counts in errors.values()), np.zeros(0))
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    shown = range(filled[0], filled[-1] + 1)
    means = {model: np.where(n > 0, sums / np.maximum(n, 1), np.nan) for model, (sums, n) in errors.items()}
    top = nice_ceiling(max(np.nanmax(mean) for mean in means.values()))
    low, high = math.log(edges[shown[0]]), math.log(edges[shown[-1] + 1])

    def place(depth: float) -> float:
        return round(100 * (math.log(depth) - low) / (high - low), 2)

    def centre(number: int) -> float:
        return place(math.sqrt(edges[number] * edges[number + 1]))

    def points(mean: np.ndarray) -> list[dict[str, Any] | None]:
        return [
            {"x": centre(i), "y": round(height * (1 - mean[i] / top), 1), "text": number(mean[i])}
            if counts[i]
            else None
            for i in shown
        ]

    lines = []
    for index, (model, mean) in enumerate(means.items()):
        along = points(mean)
        steps = [pair for pair in pairwise(along) if all(pair)]
        lines.append({"model": model, "index": index, "points": along, "steps": steps})
    bins = [
        {
            "range": f"{edges[i]:.3g} {DASH} {edges[i + 1]:.3g}",
            "x": place(edges[i]),
            "width": place(edges[i + 1]) - place(edges[i]),
            "share": round(100 * counts[i] / counts.max(), 2),
            "count": f"{int(counts[i]):,}",
            "means": [number(mean[i]) for mean in means.values()],
        }
        for i in shown
    ]
    ticks = [tick for tick in np.outer(10.0 ** np.arange(-4, 5), [1, 2, 5]).ravel() if low <= math.log(tick) <= high]
    grid = [{"y": round(height * (1 - share), 1), "text": f"{share * top:.3g}"} for share in (0, 0.25, 0.5, 0.75, 1)]
    return {
        "lines": lines,
        "bins": bins,
        "grid": grid,
        "ticks": [{"x": place(tick), "text": f"{tick:g}"} for tick in ticks],
        "unit": unit,
        "height": height,
        "num_pixels": f"{int(counts.sum()):,}",
    }


def nice_ceiling(value: float) -> float:
    """The smallest of 1, 2, 4, 6, 8 and 10 times a power of ten that is not below `value`; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def image_table(evaluation: Evaluation, shown: Mapping[int, int]) -> dict[str, Any]:
    """The table of all images as the page's script reads it; at most `MAX_ROWS`.

    `shown` maps the place of an image in `evaluation.images` to that of its picture. `scores` are nested as metric,
    model, image; null where a metric is not defined.
    """
    images = evaluation.images
    rows: list[int] = np.sort(np.argsort(-badness(evaluation), kind="stable")[:MAX_ROWS]).tolist()
    names = evaluation.dataset_names
    return {
        "keys": [images[place].key for place in rows],
        "datasets": [names.index(images[place].dataset.name) for place in rows],
        "pictures": [shown.get(place, -1) for place in rows],
        "dataset_names": names,
        "scores": [
            [[_rounded(images[place].scores[model][metric]) for place in rows] for model in evaluation.predictors]
            for metric in evaluation.protocol.metrics
        ],
    }


def badness(evaluation: Evaluation) -> np.ndarray:
    """How bad the models are on each image by the first metric, (images,), larger = worse; -inf where undefined."""
    sign = 1 if IS_LOWER_BETTER[evaluation.protocol.metrics[0]] else -1
    means = sign * evaluation.values[:, 0].mean(axis=0)
    return np.where(np.isfinite(means), means, -np.inf)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
