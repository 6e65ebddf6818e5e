"""The report of an evaluation: one HTML file that needs nothing beside it, and its pictures as `grid.png`."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.colors import to_hex

from depthkit import __version__
from depthkit.evaluation.ground_truth import compare_case
from depthkit.evaluation.protocols import protocol_fields, protocol_id
from depthkit.evaluation.results import Evaluation, ScoredImage, arrow, best_model, dataset_facts
from depthkit.evaluation.settings import DepthUnit
from depthkit.files import atomic_write
from depthkit.metrics import METRICS
from depthkit.visualize import (
    ColorScale,
    PictureRow,
    Tile,
    colorize,
    depth_scale,
    error_scale,
    picture_grid,
    relative_error,
    render,
)

MAX_TILE_WIDTH = 560
"""Pixels of a picture in the HTML file."""

UNIT_LABELS = {DepthUnit.metres: "metres, planar z", DepthUnit.image_maximum: "share of the largest depth"}


@dataclass(frozen=True, kw_only=True)
class ModelMaps:
    """What one model made of an image: aligned depth and relative error, (H, W)."""

    aligned: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the report: why it was chosen, its ground truth, and each model's maps."""

    reason: str
    scored: ScoredImage
    image: np.ndarray
    target: np.ndarray
    valid_mask: np.ndarray
    models: dict[str, ModelMaps]


def write_report(evaluation: Evaluation, out: Path, num_pictures: int) -> None:
    """Write `report.html` and `grid.png`; the pictures are read and predicted once more."""
    chosen = choose_images(evaluation, num_pictures)
    pictures = [make_picture(evaluation, image, reason) for reason, images in chosen.items() for image in images]
    errors = error_scale(shared_error_limit(pictures))
    with atomic_write(out / "grid.png") as file:
        rows = [picture_row(picture, picture_scale(picture, evaluation), errors) for picture in pictures]
        file.write(encode(render(picture_grid(rows)), ".png"))
    with atomic_write(out / "report.html") as file:
        file.write(render_html(evaluation, pictures, errors).encode())


def choose_images(evaluation: Evaluation, count: int) -> dict[str, list[ScoredImage]]:
    """Reason -> images: a quarter each for the worst and the best by the first metric, the rest evenly spread."""
    metric = evaluation.protocol.metrics[0]
    sign = 1 if METRICS[metric].is_lower_better else -1
    images = evaluation.images

    def badness(image: ScoredImage) -> float:
        return sign * float(np.mean([scores[metric] for scores in image.scores.values()]))

    ranked = sorted(images, key=badness)
    num_extreme = min(count // 4, len(images) // 3)
    best, worst = ranked[:num_extreme], ranked[len(ranked) - num_extreme :][::-1]
    taken = {id(image) for image in best + worst}
    others = [image for image in images if id(image) not in taken]
    places = np.linspace(0, len(others) - 1, min(count - 2 * num_extreme, len(others))).round().astype(int)
    return {"evenly spread": [others[place] for place in places], "worst": worst, "best": best}


def make_picture(evaluation: Evaluation, scored: ScoredImage, reason: str) -> Picture:
    case = scored.dataset.read(scored.shard, scored.index)
    models: dict[str, ModelMaps] = {}
    for name, predictor in evaluation.predictors.items():
        comparison = compare_case(case, predictor.predict(case.image), evaluation.protocol)
        aligned, target, valid_mask = (tensor[0].numpy() for tensor in comparison)
        error = relative_error(aligned, target, valid_mask)
        everywhere = np.ones_like(valid_mask)
        models[name] = ModelMaps(aligned=shrink(aligned, everywhere)[0], error=shrink(error, valid_mask)[0])
    target, valid_mask = shrink(target, valid_mask)
    return Picture(reason=reason, scored=scored, image=case.image, target=target, valid_mask=valid_mask, models=models)


def shrink(values: np.ndarray, valid_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map at most `MAX_TILE_WIDTH` wide: the mean of the valid pixels, so that sparse lidar stays visible."""
    height, width = values.shape
    if width <= MAX_TILE_WIDTH:
        return values, valid_mask
    size = (MAX_TILE_WIDTH, max(1, round(height * MAX_TILE_WIDTH / width)))
    share = cv2.resize(valid_mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(np.where(valid_mask, values, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return total / np.where(share > 0, share, 1), share > 0


def shared_error_limit(pictures: Sequence[Picture]) -> float:
    """The red end of all error maps: the 95th percentile of the errors shown, rounded up to a plain number."""
    errors = np.concatenate(
        [maps.error[picture.valid_mask] for picture in pictures for maps in picture.models.values()]
    )
    limit = np.percentile(errors, 95)
    return next((step for step in (0.05, 0.1, 0.2, 0.3, 0.5) if limit <= step), 1.0)


def picture_scale(picture: Picture, evaluation: Evaluation) -> ColorScale:
    """One scale for the ground truth and the predictions of an image, taken from its ground truth."""
    return depth_scale(picture.target, picture.valid_mask, UNIT_LABELS[evaluation.protocol.unit])


def picture_row(picture: Picture, depths: ColorScale, errors: ColorScale) -> PictureRow:
    """One line of `grid.png`: image, ground truth, and each model's aligned depth and error."""
    tiles = [
        Tile(f"{picture.scored.key} ({picture.reason})", picture.image),
        Tile("ground truth", colorize(picture.target, picture.valid_mask, depths)),
    ]
    for name, maps in picture.models.items():
        tiles.append(Tile(name, colorize(maps.aligned, None, depths)))
        tiles.append(Tile(f"error of {name}", colorize(maps.error, picture.valid_mask, errors)))
    return PictureRow(tiles, [depths, errors])


def render_html(evaluation: Evaluation, pictures: Sequence[Picture], errors: ColorScale) -> str:
    environment = Environment(loader=PackageLoader("depthkit.evaluation", "."), autoescape=True, trim_blocks=True)
    datasets = dataset_facts(evaluation)
    for name, facts in datasets.items():
        facts["rows"] = table_rows(evaluation, name)
    return environment.get_template("report.html.j2").render(
        protocol_id=protocol_id(evaluation.protocol),
        protocol={key: value for key, value in protocol_fields(evaluation.protocol).items() if value is not None},
        metrics=[f"{metric} {arrow(metric)}" for metric in evaluation.protocol.metrics],
        overall=table_rows(evaluation, None),
        datasets={
            name: facts | {"rows": table_rows(evaluation, name)} for name, facts in dataset_facts(evaluation).items()
        },
        num_images=len(evaluation.images),
        models=evaluation.predictors,
        skipped=evaluation.skipped,
        seconds=evaluation.seconds,
        pictures=[picture_context(picture, evaluation, errors) for picture in pictures],
        error_bar=bar(errors),
        version=__version__,
    )


def table_rows(evaluation: Evaluation, dataset: str | None) -> list[dict[str, Any]]:
    """For each model its name and, for each metric, the mean and whether it is the best."""
    best = {metric: best_model(evaluation, metric, dataset) for metric in evaluation.protocol.metrics}
    rows = []
    for model in evaluation.predictors:
        means = evaluation.means(model, dataset)
        cells = [(f"{mean:.4f}", best[metric] == model) for metric, mean in means.items()]
        rows.append({"model": model, "cells": cells})
    return rows


def picture_context(picture: Picture, evaluation: Evaluation, errors: ColorScale) -> dict[str, Any]:
    """What the template shows of one image; pictures as data URIs."""
    metric = evaluation.protocol.metrics[0]
    depths = picture_scale(picture, evaluation)
    return {
        "key": picture.scored.key,
        "dataset": picture.scored.dataset.name,
        "reason": picture.reason,
        "image": data_uri(picture.image, ".jpg"),
        "target": data_uri(colorize(picture.target, picture.valid_mask, depths), ".png"),
        "models": [
            {
                "name": name,
                "score": f"{metric} {picture.scored.scores[name][metric]:.4f}",
                "aligned": data_uri(colorize(maps.aligned, None, depths), ".png"),
                "error": data_uri(colorize(maps.error, picture.valid_mask, errors), ".png"),
            }
            for name, maps in picture.models.items()
        ],
        "bar": bar(depths),
    }


def bar(scale: ColorScale) -> dict[str, Any]:
    """A colour bar for the template: a CSS gradient from bottom to top, and ticks as (height in percent, text)."""
    colors = [to_hex(color) for color in matplotlib.colormaps[scale.colormap](np.linspace(0, 1, 17))]
    places = 100 * scale.position(np.array(scale.ticks()))
    return {
        "gradient": f"linear-gradient(to top, {', '.join(colors)})",
        "ticks": [(f"{place:.1f}", f"{tick:g}") for place, tick in zip(places, scale.ticks(), strict=True)],
        "label": scale.label,
    }


def data_uri(image: np.ndarray, extension: str) -> str:
    """An RGB image, at most `MAX_TILE_WIDTH` wide, as text for the `src` of an HTML image."""
    height, width = image.shape[:2]
    if width > MAX_TILE_WIDTH:
        size = (MAX_TILE_WIDTH, round(height * MAX_TILE_WIDTH / width))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    mime = {".jpg": "image/jpeg", ".png": "image/png"}[extension]
    return f"data:{mime};base64,{base64.b64encode(encode(image, extension)).decode()}"


def encode(image: np.ndarray, extension: str) -> bytes:
    """An RGB image as the bytes of an image file."""
    written, data = cv2.imencode(extension, image[..., ::-1])
    assert written
    return data.tobytes()
