"""The report of an evaluation: one HTML file that needs nothing beside it, and its pictures as `grid.png`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from depthkit import __version__
from depthkit.evaluation.depth_errors import depth_edges
from depthkit.evaluation.describe import describe
from depthkit.evaluation.protocols import protocol_fields, protocol_id
from depthkit.evaluation.report_pictures import (
    ASSUMED_FIELD_OF_VIEW,
    UNIT_LABELS,
    Picture,
    bar,
    cloud_context,
    data_uri,
    encode,
    make_picture,
)
from depthkit.evaluation.report_tables import (
    badness,
    depth_chart,
    difference_rows,
    headline,
    image_table,
    mean_groups,
    metric_facts,
    number,
)
from depthkit.evaluation.results import Evaluation, dataset_facts
from depthkit.evaluation.settings import GroundTruth
from depthkit.files import atomic_write
from depthkit.visualize import ColorScale, PictureRow, Tile, colorize, depth_scale, error_scale, picture_grid, render

SCRIPTS = ("report_tables.js", "report_clouds.js", "report_viewer.js")


def write_report(evaluation: Evaluation, out: Path, num_pictures: int) -> None:
    """Write `report.html` and, where there are maps to show, `grid.png`; the pictures are read and predicted again."""
    chosen = {} if evaluation.protocol.ground_truth is GroundTruth.pairs else choose_images(evaluation, num_pictures)
    pictures = {
        place: make_picture(evaluation, evaluation.images[place], reason)
        for reason, places in chosen.items()
        for place in places
    }
    errors = error_scale(shared_error_limit(list(pictures.values())))
    if pictures:
        with atomic_write(out / "grid.png") as file:
            rows = [picture_row(picture, picture_scale(picture, evaluation), errors) for picture in pictures.values()]
            file.write(encode(render(picture_grid(rows)), ".png"))
    with atomic_write(out / "report.html") as file:
        file.write(render_html(evaluation, pictures, errors).encode())


def choose_images(evaluation: Evaluation, count: int) -> dict[str, list[int]]:
    """Reason -> places in `evaluation.images`: a quarter each for the worst and the best, the rest evenly spread over
    each data set, the data sets taking turns.

    By the mean over the models of the first metric; an image on which it is not defined is neither worst nor best.
    """
    values = badness(evaluation)
    ranked = [place for place in np.argsort(values, kind="stable").tolist() if np.isfinite(values[place])]
    num_extreme = min(count // 4, len(ranked) // 3)
    best, worst = ranked[:num_extreme], ranked[len(ranked) - num_extreme :][::-1]
    extremes = {*best, *worst}
    others = [place for place in range(len(values)) if place not in extremes]
    sets: dict[str, list[int]] = {}
    for place in others:
        sets.setdefault(evaluation.images[place].dataset.name, []).append(place)
    turns = sorted((turn, name) for name, places in sets.items() for turn in range(len(places)))
    shares = Counter(name for _, name in turns[: count - 2 * num_extreme])
    picks = {name: np.linspace(0, len(sets[name]) - 1, share).round().astype(int) for name, share in shares.items()}
    spread = sorted(sets[name][pick] for name, picked in picks.items() for pick in picked)
    return {"worst": worst, "best": best, "evenly spread": spread}


def shared_error_limit(pictures: Sequence[Picture]) -> float:
    """The red end of all error maps: the 95th percentile of the errors shown, rounded up to a plain number."""
    errors = [maps.error[picture.valid_mask] for picture in pictures for maps in picture.models.values()]
    limit = np.percentile(np.concatenate(errors), 95) if errors else 1.0
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


def render_html(evaluation: Evaluation, pictures: dict[int, Picture], errors: ColorScale) -> str:
    """The page; `pictures` by their place in `evaluation.images`."""
    loader = PackageLoader("depthkit.evaluation", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)

    def source(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    shown = {place: index for index, place in enumerate(pictures)}
    data = {
        "models": list(evaluation.predictors),
        "metrics": metric_facts(evaluation),
        "images": image_table(evaluation, shown),
        "clouds": [cloud_context(picture) for picture in pictures.values()],
        "unit": UNIT_LABELS[evaluation.protocol.unit],
        "error_limit": errors.high,
        "assumed_field_of_view": ASSUMED_FIELD_OF_VIEW,
    }
    return environment.get_template("report.html.j2").render(
        style=source("report.css"),
        scripts=[source(name) for name in SCRIPTS],
        data=data,
        protocol_id=protocol_id(evaluation.protocol),
        sentence=describe(evaluation.protocol),
        protocol={key: value for key, value in protocol_fields(evaluation.protocol).items() if value is not None},
        metrics=data["metrics"],
        headline=headline(evaluation),
        groups=mean_groups(evaluation),
        differences=difference_rows(evaluation),
        chart=depth_chart(
            depth_edges(evaluation.protocol).tolist(),
            evaluation.depth_errors,
            UNIT_LABELS[evaluation.protocol.unit],
        ),
        datasets=dataset_facts(evaluation),
        num_images=len(evaluation.images),
        models=evaluation.predictors,
        skipped=evaluation.skipped,
        warnings=evaluation.warnings,
        notes=evaluation.notes,
        seconds=evaluation.seconds,
        pictures=[picture_context(picture, evaluation, errors) for picture in pictures.values()],
        error_bar=bar(errors),
        version=__version__,
    )


def picture_context(picture: Picture, evaluation: Evaluation, errors: ColorScale) -> dict[str, Any]:
    """What the template shows of one image; pictures as data URIs."""
    metric = evaluation.protocol.metrics[0]
    depths = picture_scale(picture, evaluation)
    return {
        "key": picture.scored.key,
        "dataset": picture.scored.dataset.name,
        "reason": picture.reason,
        "aspect": picture.image.shape[1] / picture.image.shape[0],
        "image": data_uri(picture.image, ".jpg"),
        "target": data_uri(colorize(picture.target, picture.valid_mask, depths), ".png"),
        "models": [
            {
                "name": name,
                "score": f"{metric} {number(picture.scored.scores[name][metric])}",
                "aligned": data_uri(colorize(maps.aligned, None, depths), ".png"),
                "error": data_uri(colorize(maps.error, picture.valid_mask, errors), ".png"),
            }
            for name, maps in picture.models.items()
        ],
        "bar": bar(depths),
    }
