"""`depthkit evaluate model=A,B dataset=MANIFEST,... protocol=NAME out=DIR`: score models on the same images.

Writes `results.json` (means and what made them), `per_image.csv`, `report.html` and `grid.png` to `out`. Every metric
is a value per image; means are over images. An image that cannot be used is listed with its reason and skipped for all
models.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from depthkit.data.quarantine import SampleError
from depthkit.evaluation.ground_truth import Case, EvaluationSet, check_enough_pixels, score_case
from depthkit.evaluation.report import write_report
from depthkit.evaluation.results import Evaluation, ScoredImage, Scores, save, summary_table
from depthkit.evaluation.settings import EvaluateConfig, ProtocolConfig
from depthkit.hydra_entry import hydra_main
from depthkit.inference.loading import load
from depthkit.inference.predictor import Predictor
from depthkit.types import Rejection


def evaluate(
    predictors: Mapping[str, Predictor], manifests: Sequence[Path | str], protocol: ProtocolConfig
) -> Evaluation:
    """Score every model on every usable image of the data sets.

    ValueError when nothing can be scored, when the protocol is not defined for a model's kind, and when a prediction is
    not finite: skipping that image would reward the model that failed on it.
    """
    start = time.monotonic()
    datasets, skipped = usable_datasets(manifests, protocol)
    images: list[ScoredImage] = []
    for dataset, shard, index, key in _images(datasets, skipped):
        try:
            case = dataset.read(shard, index)
            check_enough_pixels(case, protocol)
        except SampleError as error:
            skipped.append(dataset.rejection(shard, key, str(error)))
            continue
        scores = {name: _score(name, predictor, case, key, protocol) for name, predictor in predictors.items()}
        images.append(ScoredImage(dataset=dataset, shard=shard, index=index, key=key, scores=scores))
    if not images:
        raise ValueError("no image could be evaluated:\n" + describe_skipped(skipped))
    seconds = time.monotonic() - start
    return Evaluation(protocol=protocol, predictors=predictors, images=images, skipped=skipped, seconds=seconds)


def _score(model: str, predictor: Predictor, case: Case, key: str, protocol: ProtocolConfig) -> Scores:
    prediction = predictor.predict(case.image)
    if not np.isfinite(prediction.values).all():
        raise ValueError(f"model {model}: its prediction for {key} is not finite; it cannot be evaluated")
    try:
        return score_case(case, prediction, protocol)
    except ValueError as error:
        raise ValueError(f"model {model}: {error}") from error


def usable_datasets(
    manifests: Sequence[Path | str], protocol: ProtocolConfig
) -> tuple[list[EvaluationSet], list[Rejection]]:
    """The data sets that the protocol can use, and an entry without shard and key for each one that it cannot."""
    usable: list[EvaluationSet] = []
    refused: list[Rejection] = []
    for dataset in map(EvaluationSet, manifests):
        if dataset.name in {other.name for other in usable}:
            raise ValueError(f"two of the manifests are called {dataset.name}: {', '.join(map(str, manifests))}")
        reason = dataset.refusal(protocol)
        if reason is None:
            usable.append(dataset)
        else:
            refused.append(Rejection(dataset=dataset.name, shard="", key="", reason=reason))
    if not usable:
        raise ValueError(f"{protocol.name} cannot use any of the data sets:\n" + describe_skipped(refused))
    return usable, refused


def describe_skipped(skipped: Iterable[Rejection]) -> str:
    return "\n".join(f"  {' '.join(filter(None, (r.dataset, r.shard, r.key)))}: {r.reason}" for r in skipped)


def _images(
    datasets: Sequence[EvaluationSet], skipped: list[Rejection]
) -> Iterator[tuple[EvaluationSet, int, int, str]]:
    """Every image as (data set, shard, index, key), with a progress bar; those of a broken shard go to `skipped`."""
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(dataset.manifest.num_samples for dataset in datasets))
        for dataset in datasets:
            for shard, facts in enumerate(dataset.manifest.shards):
                try:
                    keys = dataset.keys(shard)
                except SampleError as error:
                    numbers = range(facts.num_samples)
                    skipped += [dataset.rejection(shard, f"sample {number}", str(error)) for number in numbers]
                    progress.advance(task, facts.num_samples)
                    continue
                for index, key in enumerate(keys):
                    yield dataset, shard, index, key
                    progress.advance(task)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ, without a last part `bundle`; ValueError if a path is given twice."""
    parts = [Path(path).resolve().parts for path in paths]
    parts = [path[:-1] if path[-1] == "bundle" else path for path in parts]
    if len(set(parts)) < len(parts):
        raise ValueError(f"model={','.join(paths)}: one of them is given twice")
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def as_lists(overrides: Sequence[str]) -> list[str]:
    """`model=A,B` as `models=["A", "B"]`, `dataset=` alike.

    Hydra would read the comma as a sweep, and `model` and `dataset` as the config groups that training chooses from.
    """
    listed = []
    for override in overrides:
        key, _, value = override.partition("=")
        is_plain = key in ("model", "dataset")
        listed.append(f"{key}s={json.dumps(value.split(','), ensure_ascii=False)}" if is_plain else override)
    return listed


def main(argv: list[str]) -> int:
    return hydra_main("evaluate", as_lists(argv), run)


def run(config: EvaluateConfig) -> None:
    """Evaluate, write everything to `config.out` and print the means."""
    names = short_names(config.models)
    predictors = {name: load(path, config.device) for name, path in zip(names, config.models, strict=True)}
    evaluation = evaluate(predictors, config.datasets, config.protocol)
    out = Path(config.out)
    save(evaluation, out)
    write_report(evaluation, out, config.num_pictures)
    console = Console()
    console.print(summary_table(evaluation))
    if evaluation.skipped:
        console.print(f"{len(evaluation.skipped)} skipped; the reasons are in the report", style="yellow")
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
