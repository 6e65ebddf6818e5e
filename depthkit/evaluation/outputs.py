"""The results of an evaluation as files and tables. No number leaves without the id of its protocol."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from depthkit import __version__
from depthkit.evaluation.bootstrap import LEVEL, NUM_RESAMPLES, SEED
from depthkit.evaluation.models import Model, provenance_of
from depthkit.evaluation.protocols import protocol_fields, protocol_id
from depthkit.evaluation.results import Difference, Evaluation, arrow, best_model, dataset_facts
from depthkit.evaluation.settings import Aggregation
from depthkit.files import atomic_write

AGGREGATION = {
    Aggregation.images: "per image, then mean over images",
    Aggregation.pixels: "over the evaluated pixels (or pairs) of all images together",
}
TEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)

TEX_ARROWS = {"↓": r"$\downarrow$", "↑": r"$\uparrow$"}


def save(evaluation: Evaluation, out: Path) -> None:
    """Write `results.json`, `results.tex`, `per_image.csv` and, where pyarrow is installed, `per_image.parquet`."""
    out.mkdir(parents=True, exist_ok=True)
    header, rows = per_image(evaluation)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([header, *rows])
    files = {
        "per_image.csv": table.getvalue().encode(),
        "results.tex": latex_table(evaluation).encode(),
        "results.json": json.dumps(results(evaluation), indent=2, allow_nan=False).encode() + b"\n",
    }
    if find_spec("pyarrow") is not None:
        files = {"per_image.parquet": encode_parquet(header, rows)} | files
    for name, content in files.items():
        with atomic_write(out / name) as file:
            file.write(content)


def per_image(evaluation: Evaluation) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of `per_image.csv`: one row per image and model."""
    metrics = evaluation.protocol.metrics
    header = ["protocol", "dataset", "key", "model", *metrics, "num_pixels", "rank_correlation"]
    name = protocol_id(evaluation.protocol)
    rows = [
        [
            *(name, image.dataset.name, image.key, model),
            *(scores[metric] for metric in metrics),
            *(image.num_pixels, image.order[model]),
        ]
        for image in evaluation.images
        for model, scores in image.scores.items()
    ]
    return header, rows


def encode_parquet(header: list[str], rows: list[list[Any]]) -> bytes:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    columns = {name: list(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


# --- JSON ------------------------------------------------------------------------------------------------------------


def results(evaluation: Evaluation) -> dict[str, Any]:
    """The content of `results.json`: means by model, how sure they are, and everything needed to know what they mean.

    A number that is not defined, or not finite, is null.
    """
    content = {
        "protocol": {"id": protocol_id(evaluation.protocol), **protocol_fields(evaluation.protocol)},
        "aggregation": AGGREGATION[evaluation.protocol.aggregation],
        "bootstrap": {"over": "images", "interval": "percentile", "level": LEVEL}
        | {"resamples": NUM_RESAMPLES, "seed": SEED},
        "warnings": evaluation.warnings,
        "notes": evaluation.notes,
        "models": {name: _model(evaluation, name, model) for name, model in evaluation.predictors.items()},
        "differences": [
            {"model": a, "minus": b}
            | _by_scope(evaluation, lambda *where, a=a, b=b: _difference(evaluation, a, b, *where))
            for a, b in combinations(evaluation.predictors, 2)
        ],
        "datasets": dataset_facts(evaluation),
        "num_images": len(evaluation.images),
        "skipped": [asdict(rejection) for rejection in evaluation.skipped],
        "seconds": round(evaluation.seconds, 3),
        "depthkit_version": __version__,
    }
    plain: dict[str, Any] = _without_nan(content)
    return plain


def _model(evaluation: Evaluation, name: str, model: Model) -> dict[str, Any]:
    facts = provenance_of(model)
    return {
        "path": model.name,
        "sha256": model.sha256,
        "kind": model.kind,
        "run_name": facts.get("run_name"),
        "seed": facts.get("seed"),
        **_by_scope(evaluation, lambda metric, dataset: evaluation.means(name, dataset)[metric]),
        "intervals": _by_scope(evaluation, lambda metric, dataset: evaluation.interval(name, metric, dataset)),
    }


def _difference(evaluation: Evaluation, a: str, b: str, metric: str, dataset: str | None) -> dict[str, float]:
    return evaluation.difference(a, b, metric, dataset)._asdict()


def _by_scope(evaluation: Evaluation, value: Callable[[str, str | None], Any]) -> dict[str, Any]:
    """`value(metric, data set)` of every metric, over all images and for each data set."""

    def of(dataset: str | None) -> dict[str, Any]:
        return {metric: value(metric, dataset) for metric in evaluation.protocol.metrics}

    return {"overall": of(None), "datasets": {dataset: of(dataset) for dataset in evaluation.dataset_names}}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- tables ----------------------------------------------------------------------------------------------------------


def summary_table(evaluation: Evaluation) -> Table:
    """Metric x model over all images, the best of each metric in bold; the title carries the protocol id."""
    table = Table(title=f"{protocol_id(evaluation.protocol)}, {_over(evaluation)}", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for model in evaluation.predictors:
        table.add_column(Text(model), justify="right", overflow="fold")
    for metric in evaluation.protocol.metrics:
        best = best_model(evaluation, metric)
        cells = [Text(_cell(evaluation, model, metric), "bold" * (model == best)) for model in evaluation.predictors]
        table.add_row(f"{metric} {arrow(metric)}", *cells)
    return table


def difference_table(evaluation: Evaluation) -> Table:
    """Metric x model: every later model minus the first on the same images, bold where the interval leaves out 0."""
    first, *others = evaluation.predictors
    title = f"{protocol_id(evaluation.protocol)}, difference to {first} on the same images"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("metric", no_wrap=True)
    for model in others:
        table.add_column(Text(model), justify="right", overflow="fold")
    for metric in evaluation.protocol.metrics:
        found = [evaluation.difference(model, first, metric) for model in others]
        table.add_row(f"{metric} {arrow(metric)}", *(Text(_signed(each), "bold" * each.is_clear) for each in found))
    return table


def latex_table(evaluation: Evaluation) -> str:
    """A table for a paper (package booktabs): model x metric, for all images and each data set, best in bold."""
    metrics, names = evaluation.protocol.metrics, evaluation.dataset_names
    scopes = names if len(names) == 1 else [*names, None]
    columns = " & ".join(f"{_tex(metric)} {TEX_ARROWS[arrow(metric)]}" for metric in metrics)
    lines = [
        rf"% depthkit {__version__}, {protocol_id(evaluation.protocol)}; needs \usepackage{{booktabs}}",
        *(f"% {note}" for note in evaluation.notes),
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}",
        r"\toprule",
        rf"model & {columns} \\",
    ]
    for dataset in scopes:
        title = "all images" if dataset is None else dataset
        lines += [r"\midrule", rf"\multicolumn{{{1 + len(metrics)}}}{{l}}{{{_tex(title)}}} \\"]
        best = {metric: best_model(evaluation, metric, dataset) for metric in metrics}
        for model in evaluation.predictors:
            means = evaluation.means(model, dataset)
            cells = [
                (rf"\textbf{{{means[m]:.4f}}}" if best[m] == model else f"{means[m]:.4f}")
                + _tex_interval(*evaluation.interval(model, m, dataset))
                for m in metrics
            ]
            lines.append(rf"{_tex(model)} & {' & '.join(cells)} \\")
    caption = f"Protocol {protocol_id(evaluation.protocol)}, {_over(evaluation)}."
    caption += "".join(f" Warning: {warning.rstrip('.')}." for warning in evaluation.warnings)
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_tex(caption)}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _tex_interval(low: float, high: float) -> str:
    return "" if math.isnan(low) else rf" {{\scriptsize [{low:.4f}, {high:.4f}]}}"


def _over(evaluation: Evaluation) -> str:
    pooled = evaluation.protocol.aggregation is Aggregation.pixels
    what = "over all pixels of" if pooled else "mean over"
    return f"{what} {len(evaluation.images)} images [{LEVEL:.0%} interval by bootstrap over images]"


def _cell(evaluation: Evaluation, model: str, metric: str) -> str:
    low, high = evaluation.interval(model, metric)
    mean = f"{evaluation.means(model)[metric]:.4f}"
    return mean if math.isnan(low) else f"{mean} [{low:.4f}, {high:.4f}]"


def _signed(difference: Difference) -> str:
    known = "" if math.isnan(difference.low) else f" [{difference.low:+.4f}, {difference.high:+.4f}]"
    return f"{difference.mean:+.4f}{known}"


def _tex(text: str) -> str:
    return text.replace("\n", " ").translate(TEX_SPECIAL)
