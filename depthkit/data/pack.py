"""`depthkit pack`: image and label files -> shards + manifest, every file checked on the way.

One task packs one shard in a worker process. A finished shard leaves a record in `.pack/`, by which a later run knows
that the shard was made from the same files and keeps it; the manifest of a data set is written when all its shards are
there. So a run that was killed is simply started again, and its output is that of an undisturbed run.
"""

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from depthkit.data.datasets import read_dataset
from depthkit.data.manifest import Manifest, save_manifest
from depthkit.data.pack_shard import Record, ShardTask, forget, pack_shard
from depthkit.data.pairs import PairSet, read_input
from depthkit.files import atomic_write

DESCRIPTION = """\
Pack images and depth labels into shards: one data set (OUT/NAME/manifest.json and tars) per source of an index.

INPUT is a public data set as its authors ship it, dataset=NAME root=DIR (its facts and the files expected are in
data_manifests/NAME.yaml); or an index, a text file with one JSON object a line ({"id", "source", "rgb", "label",
"target", "codec", "scale", ...}; all fields are described in depthkit/data/pairs.py); or a folder of images without
labels. A folder unlabeled/ beside an index is packed as well. Files are copied byte for byte; images that are not JPEG,
PNG or WebP become lossless 8-bit PNG.

A source of an index goes to one split as a whole: train, unless --val-sources or --test-sources names it. Put sources
that show the same scene into the same split, else a test image was seen in training.

A pair that cannot be used is left out and written to OUT/NAME/rejected.jsonl with the reason. Start a run that was
stopped again with the same arguments: finished shards are kept. Exit code: 0 all packed, 1 some pairs rejected,
2 nothing could be packed as asked."""


def main(argv: list[str]) -> int:
    """Pack what the command line names; returns the exit code that `--help` describes."""
    args = _parse_arguments(argv)
    try:
        sets = list(find_sets(args.inputs))
        splits = _splits(sets, val=args.val_sources, test=args.test_sources)
        records = pack(sets, splits, args.out, samples_per_shard=args.samples_per_shard, num_workers=args.workers)
    except (OSError, ValueError) as error:
        print(f"depthkit pack: {error}", file=sys.stderr)
        return 2
    return _report(sets, splits, records, args.out)


def find_sets(inputs: list[str]) -> Iterator[PairSet]:
    """The data sets of files and folders, and of `dataset=NAME root=DIR`; ValueError names what is wrong."""
    public = dict(item.split("=", 1) for item in inputs if item.startswith(("dataset=", "root=")))
    if public:
        if public.keys() != {"dataset", "root"}:
            raise ValueError(f"{' '.join(inputs)}: dataset=NAME and root=DIR belong together")
        yield from read_dataset(public["dataset"], Path(public["root"]))
    for item in inputs:
        if not item.startswith(("dataset=", "root=")):
            yield from read_input(Path(item))


def pack(
    sets: list[PairSet], splits: dict[str, str], out: Path, *, samples_per_shard: int, num_workers: int
) -> dict[str, list[Record]]:
    """Write the shards and the manifest of every data set below `out`; records by data set, in shard order."""
    tasks = {s.name: _shard_tasks(s, out, samples_per_shard) for s in sets}
    by_name = {s.name: s for s in sets}
    done: dict[str, dict[str, Record]] = defaultdict(dict)
    with ProcessPoolExecutor(num_workers, initializer=_exit_with_parent) as pool, ExitStack() as stack:
        futures = {pool.submit(pack_shard, task): (name, task) for name in tasks for task in tasks[name]}
        stack.callback(pool.shutdown, cancel_futures=True)
        progress = stack.enter_context(_progress())
        bar = progress.add_task("packing", total=sum(len(s.pairs) for s in sets), rate="")
        start, num_pairs = time.monotonic(), 0
        for future in as_completed(futures):
            name, task = futures[future]
            done[name][task.name] = future.result()
            num_pairs += len(task.pairs)
            progress.update(bar, completed=num_pairs, rate=f"{num_pairs / (time.monotonic() - start):.0f} samples/s")
            if len(done[name]) == len(tasks[name]):
                _finish(by_name[name], splits[name], tasks[name], done[name])
    return {name: [done[name][task.name] for task in tasks[name]] for name in tasks}


def _shard_tasks(pair_set: PairSet, out: Path, samples_per_shard: int) -> list[ShardTask]:
    folder = out / pair_set.name
    (folder / ".pack").mkdir(parents=True, exist_ok=True)
    starts = range(0, len(pair_set.pairs), samples_per_shard)
    return [
        ShardTask(
            folder=folder,
            name=f"{pair_set.name}-{number:06d}",
            target=pair_set.target,
            pairs=pair_set.pairs[start : start + samples_per_shard],
        )
        for number, start in enumerate(starts)
    ]


def _finish(pair_set: PairSet, split: str, tasks: list[ShardTask], records: dict[str, Record]) -> None:
    """All shards are there: drop those of an earlier plan, list what was rejected, write the manifest."""
    folder = tasks[0].folder
    for record in (folder / ".pack").glob("*.json"):
        if record.stem not in records:
            forget(folder, record.stem)
    rejected = [row for task in tasks for row in records[task.name].rejected]
    if rejected:
        with atomic_write(folder / "rejected.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rejected)
    else:
        (folder / "rejected.jsonl").unlink(missing_ok=True)
    shards = tuple(shard for task in tasks if (shard := records[task.name].shard))
    if shards:
        manifest = Manifest(
            name=pair_set.name,
            split=split,
            target=pair_set.target,
            shards=shards,
            licence=pair_set.licence,
            source=pair_set.source,
            description=pair_set.description,
            citation=pair_set.citation,
        )
        save_manifest(manifest, folder / "manifest.json")


def _splits(sets: list[PairSet], **named: list[str]) -> dict[str, str]:
    """Split of every data set, train unless named. ValueError for a name twice, or that of no data set."""
    splits: dict[str, str] = {}
    for pair_set in sets:
        if pair_set.name in splits:
            raise ValueError(f"two inputs hold a data set {pair_set.name!r}; rename one")
        splits[pair_set.name] = pair_set.split or "train"
    for split, names in named.items():
        for name in names:
            if splits.get(name) != "train":
                known = f"already in {splits[name]}" if name in splits else f"unknown; known are {', '.join(splits)}"
                raise ValueError(f"--{split}-sources: {name!r} is {known}")
            splits[name] = split
    return splits


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task forever."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _report(sets: list[PairSet], splits: dict[str, str], records: dict[str, list[Record]], out: Path) -> int:
    """Print one line per data set; 1 when anything was rejected, else 0."""
    table = Table("data set", "split", "samples", "rejected", "MB", "codec")
    num_rejected = 0
    for s in sets:
        shards = [record.shard for record in records[s.name] if record.shard]
        rejected = sum(len(record.rejected) for record in records[s.name])
        num_rejected += rejected
        codec = s.target.codec if s.target else "(images alone)"
        num_samples, num_bytes = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
        table.add_row(s.name, splits[s.name], str(num_samples), str(rejected), f"{num_bytes / 1e6:.1f}", codec)
    Console().print(table)
    if num_rejected:
        print(f"{num_rejected} pairs were rejected; the reasons are in {out}/NAME/rejected.jsonl", file=sys.stderr)
    return 1 if num_rejected else 0


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "depthkit pack", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="index file, folder of images, or dataset=NAME root=DIR"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the data sets")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes; default: all cores"
    )
    for split in ("val", "test"):
        parser.add_argument(
            f"--{split}-sources", type=_names, default=[], metavar="A,B", help=f"data sets of the {split} split"
        )
    args = parser.parse_args(argv)
    if args.samples_per_shard < 1 or args.workers < 1:
        parser.error("--samples-per-shard and --workers must be at least 1")
    return args


def _names(text: str) -> list[str]:
    return text.split(",")
