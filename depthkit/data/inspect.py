"""`depthkit inspect`: does a data set hold what its manifest says, and do the labels look as stated?"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from depthkit.config import PathsConfig
from depthkit.data.cache import ShardCache
from depthkit.data.inspection.contradictions import NUM_EXAMPLES, contradictions, doubts
from depthkit.data.inspection.duplicates import Pictures, find_duplicates
from depthkit.data.inspection.findings import Findings, Inspection, facts
from depthkit.data.inspection.look import DataSet, ShardReport, Task, look_at_shard
from depthkit.data.keys import repeated_keys
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.procedural.pack import images_progress
from depthkit.data.remote import is_remote, shown
from depthkit.data.workers import worker_pool

DESCRIPTION = """\
Check data sets before training on them: size and sha256 of every shard, the number of samples, and an evenly spread
sample of the images and labels, decoded. Prints what the labels look like, what contradicts the manifest (wrong scale,
ray distance or disparity passed as depth, labels that are empty, constant or of another view, missing intrinsics, codes
read as measurements, a key in two shards), and images that occur twice. Give the images of a pseudo-label set together
with its labels, and training and test sets together: an image of a val or test set that is also in another set is
leakage.

Exit code: 0 all as stated, 1 a contradiction or leakage."""

NUM_VALUES = 2_000_000  # kept per data set for percentiles and histogram; at most 10 000 of a label
MAX_VALUES_PER_LABEL = 10_000
NUM_PLANE_LABELS = 24  # looked at for flat surfaces, which takes 50 ms each
LOG_WIDTH = 160  # columns of the table where there is no terminal
NUM_LEAKS = 20  # named on the terminal


def main(argv: list[str]) -> int:
    """Inspect the manifests of the command line; returns the exit code that `--help` describes."""
    args = _parse_arguments(argv)
    paths = list({path if isinstance(path, str) else path.resolve(): path for path in args.manifests}.values())
    inspection = inspect(
        paths,
        num_samples=args.samples,
        num_workers=args.workers,
        hash_all=args.all,
        cache=args.cache,
        progress=sys.stderr.isatty(),
    )
    Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(_table(inspection.findings))
    for found in inspection.findings:
        for warning in found.warnings:
            print(f"{found.name}: warning: {warning}")
    problems = [f"{found.name}: {problem}" for found in inspection.findings for problem in found.problems]
    print("\n".join(problems), end="\n" if problems else "", file=sys.stderr)
    if args.html:
        from depthkit.data.inspection.page import write_page

        write_page(inspection, args.html)
    return 1 if problems else 0


def inspect(
    paths: Sequence[Path | str],
    *,
    num_samples: int,
    num_workers: int = 1,
    hash_all: bool = False,
    cache: ShardCache | None = None,
    progress: bool = False,
) -> Inspection:
    """Check data sets; `num_samples` samples of each, evenly spread, are decoded. Problems are listed, not raised."""
    findings = [_open(path, cache or ShardCache()) for path in paths]
    _find_images(findings)
    sets = [found.data for found in findings if found.data and found.data.manifest.shards]
    tasks = [task for data in sets for task in _tasks(data, num_samples, hash_all=hash_all)]
    reports = _look(tasks, num_workers, progress=progress)
    for found in findings:
        if found.data is None:
            continue
        manifest = found.data.manifest
        if not manifest.shards:
            found.problems.append("the manifest lists no shards")
        _conclude(found, found.data, [reports[found.path, number] for number in range(len(manifest.shards))])
    duplicates = find_duplicates([found.pictures for found in findings])
    inspection = Inspection(findings=findings, duplicates=duplicates)
    for number, found in enumerate(findings):
        leaks = [match for match in duplicates.leaks if match.second[0] == number]
        found.problems += [f"LEAKAGE: {inspection.describe(match)}" for match in leaks[:NUM_LEAKS]]
        if len(leaks) > NUM_LEAKS:
            found.problems.append(f"LEAKAGE: {len(leaks)} of its images in all are in training data")
        repeats = duplicates.repeats[number]
        if repeats:
            some = "; ".join(inspection.describe(match) for match in repeats[:NUM_EXAMPLES])
            found.warnings.append(f"{len(repeats)} of {len(found.pictures.hashes)} images have a double: {some}")
    return inspection


def spread(manifest: Manifest, num_samples: int) -> Iterator[tuple[int, int]]:
    """(shard, sample) of at most `num_samples` positions, evenly spread."""
    ends = np.cumsum([shard.num_samples for shard in manifest.shards])
    total = manifest.num_samples
    for position in np.unique(np.linspace(0, total - 1, min(num_samples, total)).astype(int)):
        shard = int(np.searchsorted(ends, position, side="right"))
        yield shard, int(position - ends[shard] + manifest.shards[shard].num_samples)


def _open(path: Path | str, cache: ShardCache) -> Findings:
    found = Findings(path=path)
    try:
        found.data = DataSet(manifest=load_manifest(path), path=path, cache=cache)
    except (OSError, ValueError) as error:
        found.problems.append(str(error))
    return found


def _find_images(findings: Sequence[Findings]) -> None:
    """Pair each pseudo-label set with its images, if they are among the manifests."""
    sets = {found.data.manifest.digest(): found.data for found in findings if found.data}
    for found in findings:
        origin = found.data.manifest.labels_of if found.data else None
        if found.data is None or origin is None:
            continue
        namesakes = [data for data in sets.values() if _could_be_images(data.manifest, found.data.manifest)]
        images = sets.get(origin.images_digest)
        if images is None and namesakes:
            found.problems.append(
                f"labels {origin.images!r} with digest {origin.images_digest[:12]}, but {shown(namesakes[0].path)} has "
                f"digest {namesakes[0].manifest.digest()[:12]}: label these images, or name the right manifest"
            )
        elif images is None:
            found.warnings.append("the labels alone were looked at; give the manifest of their images as well")
        elif len(images.manifest.shards) != len(found.data.manifest.shards):
            found.problems.append(f"its shards do not belong one for one to those of {shown(images.path)}: label again")
        else:
            found.data = replace(found.data, images=images)


def _could_be_images(images: Manifest, labels: Manifest) -> bool:
    assert labels.labels_of is not None
    return images.labels_of is None and (images.name, images.split) == (labels.labels_of.images, labels.split)


def _tasks(data: DataSet, num_samples: int, *, hash_all: bool) -> Iterator[Task]:
    chosen = list(spread(data.manifest, num_samples))
    places = np.linspace(0, len(chosen) - 1, min(NUM_PLANE_LABELS, len(chosen))).astype(int)
    with_planes = {chosen[place] for place in places}
    for shard in range(len(data.manifest.shards)):
        yield Task(
            data=data.only_shard(shard),
            shard=shard,
            chosen=tuple(sample for number, sample in chosen if number == shard),
            with_planes=frozenset(sample for number, sample in with_planes if number == shard),
            num_pixels=min(MAX_VALUES_PER_LABEL, -(-NUM_VALUES // len(chosen))),
            hash_all=hash_all and data.manifest.labels_of is None,
        )


def _look(tasks: Sequence[Task], num_workers: int, *, progress: bool) -> dict[tuple[Path | str, int], ShardReport]:
    """The report of every task by manifest and shard, made by `num_workers` processes."""
    reports = {}
    with ExitStack() as stack:
        total = sum(task.data.manifest.num_samples for task in tasks)
        advance = stack.enter_context(images_progress("inspecting", total, shown=progress))
        if num_workers > 1 and len(tasks) > 1:
            pool = stack.enter_context(worker_pool(num_workers))
            stack.callback(pool.shutdown, cancel_futures=True)
            futures = as_completed([pool.submit(look_at_shard, task) for task in tasks])
            done: Iterable[ShardReport] = (future.result() for future in futures)
        else:
            done = map(look_at_shard, tasks)
        for report in done:
            reports[report.task.data.path, report.task.shard] = report
            advance(report.task.data.manifest.num_samples)
    return reports


def _conclude(found: Findings, data: DataSet, reports: Sequence[ShardReport]) -> None:
    manifest = data.manifest
    found.looks = [look for report in reports for look in report.looks]
    found.problems += [problem for report in reports for problem in report.problems]
    found.problems += contradictions(manifest, found.looks)
    if manifest.labels_of is None:  # those of labels are the images'
        hashes = [report.key_hashes for report in reports]
        found.problems += filter(None, [repeated_keys(manifest.shards, hashes, data.key)])
    found.warnings += doubts(manifest, found.looks)
    places = [(report.task.shard, sample) for report in reports for sample in report.hashed]
    found.pictures = Pictures(
        split=manifest.split,
        hashes=np.array([value for report in reports for value in report.hashes], np.uint64),
        places=np.array(places, np.int64).reshape(-1, 2),
    )


def _table(findings: Sequence[Findings]) -> Table:
    columns = list(next((facts(found) for found in findings if found.data), {}))
    table = Table("data set", "split", *columns, "verdict")
    for found in findings:
        verdict = f"[red]{len(found.problems)} problem(s)" if found.problems else "[green]as stated"
        if found.data is None:
            table.add_row(found.name, "", *[""] * len(columns), verdict)
        else:
            manifest = found.data.manifest
            table.add_row(manifest.name, manifest.split, *facts(found).values(), verdict)
    return table


def _location(text: str) -> Path | str:
    return text if is_remote(text) else Path(text)


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "depthkit inspect", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "manifests", nargs="+", type=_location, metavar="MANIFEST", help="manifest.json of a data set, or its URL"
    )
    parser.add_argument(
        "--samples", type=int, default=200, metavar="N", help="samples to decode per data set; default: %(default)s"
    )
    parser.add_argument("--all", action="store_true", help="look for duplicates among all images, not the decoded ones")
    parser.add_argument(
        "--cache",
        type=lambda folder: ShardCache(PathsConfig(cache=folder)),
        default=ShardCache(),
        metavar="DIR",
        help=f"folder for copies of remote shards, paths.cache in training; default: {PathsConfig.cache}",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures to look at")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes; default: all cores"
    )
    args = parser.parse_args(argv)
    if args.samples < 1 or args.workers < 1:
        parser.error("--samples and --workers must be at least 1")
    return args
