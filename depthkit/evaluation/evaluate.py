"""`depthkit evaluate model=A,B dataset=MANIFEST,... protocol=NAME out=DIR`: score models on the same images.

A model is whatever `depthkit.load` takes, or a folder of predictions that another program wrote (`models.py`). Writes
`results.json` (means, intervals, differences, and what made them), `results.tex`, `per_image.csv`, `report.html` and
`grid.png` to `out`. An image that cannot be used is listed with its reason and skipped for all models. Started by
torchrun or srun, or with `devices=N`, processes share the images; the numbers are the same for any number of them.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from depthkit.data.remote import is_remote
from depthkit.data.workers import worker_pool
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.leakage import Leakage, find_leakage
from depthkit.evaluation.models import Model, StoredPredictions, load_models, provenance_of, split_options
from depthkit.evaluation.outputs import difference_table, save, summary_table
from depthkit.evaluation.processes import Process, joined, this_process
from depthkit.evaluation.report import write_report
from depthkit.evaluation.results import Evaluation, ScoredImage
from depthkit.evaluation.scoring import Outcome, Scoring
from depthkit.evaluation.settings import EvaluateConfig, ProtocolConfig, kind_refusal
from depthkit.hydra_entry import hydra_main
from depthkit.types import Kind, Rejection

LISTS = {name: name for name in ("models", "datasets", "training")} | {"model": "models", "dataset": "datasets"}
"""What the command line may call a list of paths -> its setting."""

OTHER_KIND: dict[Kind, Kind] = {"disparity": "depth", "depth": "disparity"}
MADE_BY_CHANCE = ("seed", "run_name", "metrics", "validation")
"""What the provenances of two runs of one recipe may differ in."""


def evaluate(
    predictors: Mapping[str, Model], manifests: Sequence[Path | str], protocol: ProtocolConfig, *, num_workers: int = 4
) -> Evaluation:
    """Score every model on every usable image of the data sets.

    ValueError when nothing can be scored, when the protocol is not defined for a model's kind, when predictions are
    missing on disk, and when one is not finite: skipping that image would reward the model that failed on it.
    """
    start = time.monotonic()
    scoring, refused = prepare(predictors, manifests, protocol)
    return collect(scoring, score_share(scoring, Process(), num_workers), refused, seconds=time.monotonic() - start)


def prepare(
    models: Mapping[str, Model], manifests: Sequence[Path | str], protocol: ProtocolConfig
) -> tuple[Scoring, list[Rejection]]:
    """What is to be scored, and the data sets that the protocol cannot use; ValueError for what cannot go together."""
    names: dict[str, str] = {}
    for name, model in models.items():
        if model.sha256 and model.sha256 in names:
            raise ValueError(f"{names[model.sha256]} and {name} are one model (sha256 {model.sha256}): leave one out")
        names[model.sha256] = name
        if refusal := kind_refusal(protocol, model.kind, model.unit):
            raise ValueError(f"model {name}: {refusal}")
    datasets, refused = usable_datasets(manifests, protocol)
    for name, model in models.items():
        if isinstance(model, StoredPredictions):
            try:
                model.check(datasets, protocol)
            except ValueError as error:
                raise ValueError(f"model {name}: {error}") from error
    scoring = Scoring(models=models, datasets=datasets, protocol=protocol)
    scoring.check_complete()
    return scoring, refused


def usable_datasets(
    manifests: Sequence[Path | str], protocol: ProtocolConfig
) -> tuple[list[EvaluationSet], list[Rejection]]:
    """The data sets that the protocol can use, and an entry without shard and key for each one that it cannot."""
    usable: list[EvaluationSet] = []
    refused: list[Rejection] = []
    for manifest in manifests:
        if not is_remote(manifest) and Path(manifest).is_dir():
            raise ValueError(f"dataset={manifest} is a folder; give the manifest in it, {manifest}/manifest.json")
        dataset = EvaluationSet(manifest)
        if dataset.name in {other.name for other in usable}:
            raise ValueError(f"two of the manifests are called {dataset.name}: {', '.join(map(str, manifests))}")
        if missing := dataset.missing_shards():
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            count = f"{len(missing)} of {len(dataset.manifest.shards)} shards"
            raise ValueError(f"{dataset.name}: {count} are not there: {some}; fetch them, or pack the data set again")
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


def score_share(scoring: Scoring, process: Process, num_workers: int) -> list[Outcome]:
    """What came of the images of one process; the first one shows how far it is."""
    places = islice(scoring.places(), process.rank, None, process.world_size)
    num_images = len(range(process.rank, scoring.num_images, process.world_size))
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=process.rank > 0) as progress:
        return list(progress.track(scoring.outcomes(places, num_workers), total=num_images))


def collect(
    scoring: Scoring, outcomes: Iterable[Outcome], refused: Iterable[Rejection], *, seconds: float
) -> Evaluation:
    """What all processes found, in the order of the data sets; RuntimeError unless every image came exactly once."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.place)
    if [outcome.place.number for outcome in outcomes] != list(range(scoring.num_images)):
        num_different = len({outcome.place for outcome in outcomes})
        raise RuntimeError(
            f"{len(outcomes)} results for {num_different} different images, and the manifests list "
            f"{scoring.num_images}: every image must be scored exactly once"
        )
    images: list[ScoredImage] = []
    skipped = list(refused)
    for outcome in outcomes:
        dataset, place = scoring.datasets[outcome.place.dataset], outcome.place
        if outcome.reason:
            skipped.append(dataset.rejection(place.shard, outcome.key, outcome.reason))
            continue
        image = ScoredImage(
            dataset=dataset,
            shard=place.shard,
            index=place.sample,
            key=outcome.key,
            scores={name: scored.scores for name, scored in outcome.scored.items()},
            order={name: scored.order for name, scored in outcome.scored.items()},
            num_pixels=outcome.num_pixels,
        )
        images.append(image)
    if not images:
        raise ValueError("no image could be evaluated:\n" + describe_skipped(skipped))
    evaluation = Evaluation(
        protocol=scoring.protocol,
        predictors=scoring.models,
        images=images,
        skipped=skipped,
        seconds=seconds,
        depth_errors=total_depth_errors(outcomes),
    )
    evaluation.warnings.extend(doubts(evaluation))
    return evaluation


def total_depth_errors(outcomes: Iterable[Outcome]) -> dict[str, np.ndarray]:
    """By model, its errors over depth (2, bins) added up over the images; empty where the ground truth is no map."""
    totals: dict[str, np.ndarray] = {}
    for outcome in outcomes:
        for name, scored in outcome.scored.items():
            if scored.depth_errors is not None:
                totals[name] = totals.get(name, 0.0) + scored.depth_errors
    return totals


def doubts(evaluation: Evaluation) -> Iterator[str]:
    """What the numbers themselves give reason to warn of."""
    for name, model in evaluation.predictors.items():
        orders = [image.order[name] for image in evaluation.images if not np.isnan(image.order[name])]
        if not orders:
            yield f"{name} has no order of depth on any image: does it predict one value everywhere?"
        order = float(np.median(orders or [0.0]))
        if order < 0:
            yield (
                f"{name} is said to predict {model.kind}, but its order is reversed: median rank correlation with the "
                f"ground truth {order:.2f}; is it {OTHER_KIND[model.kind]} passed as {model.kind}?"
            )
    for metric, count in evaluation.num_undefined().items():
        yield f"{metric} is not defined on {count} of {len(evaluation.images)} images, which its mean leaves out"
    recipes: dict[str, list[str]] = {}
    for name, model in evaluation.predictors.items():
        facts = provenance_of(model)
        recipe = json.dumps(
            {key: facts[key] for key in facts if key not in MADE_BY_CHANCE}, sort_keys=True, default=str
        )
        if facts.get("seed") is not None:
            recipes.setdefault(recipe, []).append(name)
    for names in recipes.values():
        if len(names) > 1:
            yield f"{', '.join(names)} are one recipe with several seeds: the best of them is not what the recipe gives"


# --- the command -----------------------------------------------------------------------------------------------------


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
    """`model=A,B` as `models=["A", "B"]`, `dataset=` and `training=` alike.

    Hydra would read the comma as a sweep, and `model` and `dataset` as the config groups that training chooses from.
    """
    listed = []
    for override in overrides:
        key, _, value = override.partition("=")
        is_plain = key in LISTS and not value.startswith("[")
        listed.append(f"{LISTS[key]}={json.dumps(value.split(','), ensure_ascii=False)}" if is_plain else override)
    return listed


def main(argv: list[str]) -> int:
    return hydra_main("evaluate", as_lists(argv), run)


def run(config: EvaluateConfig) -> None:
    """Evaluate in this process and those beside it; the first one writes everything to `out` and prints the means."""
    start = time.monotonic()
    process = this_process()
    if process.world_size > 1 and config.devices > 1:
        raise ValueError(f"devices={config.devices}: torchrun or srun already started {process.world_size} processes")
    scoring, refused = prepare_process(config, process)
    leakage = check_leakage(config, scoring)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with joined(process) as gather:
        shares = gather(score_in_processes(config, scoring, process))
    if process.rank > 0:
        return
    outcomes = [outcome for share in shares for outcome in share]
    evaluation = collect(scoring, outcomes, refused, seconds=time.monotonic() - start)
    evaluation.warnings[:0] = [f"LEAKAGE: {sentence}" for sentence in leakage.found]
    evaluation.notes.extend(leakage.notes)
    save(evaluation, out)
    write_report(evaluation, out, config.num_pictures)
    show(evaluation, out)


def prepare_process(config: EvaluateConfig, process: Process) -> tuple[Scoring, list[Rejection]]:
    names = short_names([split_options(model)[0] for model in config.models])
    models = dict(zip(names, config.models, strict=True))
    return prepare(load_models(models, process.device(config.device)), config.datasets, config.protocol)


def check_leakage(config: EvaluateConfig, scoring: Scoring) -> Leakage:
    """What is known of images that models were trained on; ValueError for them unless `allow_leakage`."""
    leakage = find_leakage(scoring.models, scoring.datasets, config.training, config.num_workers)
    if leakage.found and not config.allow_leakage:
        found = "\n".join(f"  {sentence}" for sentence in leakage.found)
        raise ValueError(
            f"leakage, so the numbers would say nothing of other images:\n{found}\n"
            "Evaluate on other images, or set allow_leakage=true, which is then said beside every number"
        )
    return leakage


def score_in_processes(config: EvaluateConfig, scoring: Scoring, process: Process) -> list[Outcome]:
    """What came of the images of this process, and of the `devices` - 1 that it starts."""
    if config.devices == 1:
        return score_share(scoring, process, config.num_workers)
    processes = [Process(rank, config.devices, rank) for rank in range(config.devices)]
    with ExitStack() as stack:
        pool = stack.enter_context(worker_pool(config.devices - 1))
        stack.callback(pool.shutdown, cancel_futures=True)
        others = [pool.submit(load_and_score, config, other) for other in processes[1:]]
        outcomes = score_share(scoring, processes[0], config.num_workers)
        try:
            for other in others:
                outcomes += other.result()
        except BrokenProcessPool as error:
            raise ChildProcessError("a process of the evaluation was killed; did it need too much memory?") from error
    return outcomes


def load_and_score(config: EvaluateConfig, process: Process) -> list[Outcome]:
    """In a process of its own."""
    return score_share(prepare_process(config, process)[0], process, config.num_workers)


def show(evaluation: Evaluation, out: Path) -> None:
    console = Console()
    console.print(summary_table(evaluation))
    if len(evaluation.predictors) > 1:
        console.print(difference_table(evaluation))
    if evaluation.skipped:
        console.print(f"{len(evaluation.skipped)} skipped; the reasons are in the report", style="yellow")
    for note in evaluation.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    for warning in evaluation.warnings:
        console.print(f"WARNING: {warning}", style="bold red", markup=False, soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
