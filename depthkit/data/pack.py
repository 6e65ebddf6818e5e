"""`depthkit pack`: image and label files -> shards + manifest, every file checked on the way.

One task packs one shard in a worker process. A finished shard leaves a record in `.pack/`, by which a later run knows
that the shard was made from the same files and keeps it; the manifest of a data set is written when all its shards are
there. So a run that was killed is simply started again, and its output is that of an undisturbed run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from depthkit.data.adopt import adopt, are_tars, name_of_tars
from depthkit.data.datasets import read_dataset
from depthkit.data.index import load_index
from depthkit.data.keys import key_hashes, repeated_keys
from depthkit.data.manifest import Manifest, Shard, save_manifest
from depthkit.data.own_data import read_input
from depthkit.data.pack_shard import Record, ShardTask, forget, pack_shard
from depthkit.data.pairs import PairSet, PairStream
from depthkit.data.rows import QUANTITIES
from depthkit.data.workers import worker_pool
from depthkit.files import atomic_write

DESCRIPTION = """\
Pack images and depth labels into shards: one data set (OUT/NAME/manifest.json and tars) per source of an index.

INPUT is one of
  dataset=NAME root=DIR   a public data set as its authors ship it; data_manifests/NAME.yaml says which files
  DIR with images/ depth/ your own: files of the same name below both (png of 8 or 16 bits, pgm, npy, npz, exr, pfm,
                          float tiff, h5 with --array); integers need --scale, 1000 for millimetres
  index.jsonl, index.csv  your own: one pair a line, {"id", "source", "rgb", "label", "target", "codec", "scale", ...}
                          or columns of these names; all fields are described in depthkit/data/rows.py
  DIR of Hugging Face     `datasets`: metadata.jsonl or .csv with file_name and depth_file_name, or .parquet files with
                          the columns image and depth
  DIR                     images without labels, in folders, tars and zips
  URL or path with braces WebDataset tars of images that stay where they are, 'https://.../photos-{000..063}.tar' or
                          'pipe:aws s3 cp s3://.../{000..063}.tar -': each is read once, for the manifest alone
Files are copied byte for byte; images that are not JPEG, PNG or WebP become lossless 8-bit PNG, labels in HDF5 .npz. A
folder unlabeled/ beside an index is packed as well.

A source of an index goes to one split as a whole: train, unless --val-sources or --test-sources names it. Put sources
that show the same scene into the same split, else a test image was seen in training. --hold-out 0.2 makes the last
fifth of the labeled pairs of every train source a data set SOURCE_val, at least one and never the only one: to see how
well a camera or a place is learned, not how well others are. The first frames behind such a cut through a video show
much of what the last ones before it show.

A pair that cannot be used is left out and written to OUT/NAME/rejected.jsonl with the reason. Start a run that was
stopped again with the same arguments: finished shards are kept. Exit code: 0 all packed, 1 some pairs rejected,
or keys in two shards, 2 nothing could be packed as asked."""


def main(argv: list[str]) -> int:
    """Pack what the command line names; returns the exit code that `--help` describes."""
    args = _parse_arguments(argv)
    try:
        if any(map(are_tars, args.inputs)):
            return _adopt(args)
        if args.name:
            raise ValueError(f"--name {args.name}: only for tars that stay where they are; others bring their names")
        sets = list(find_sets(args.inputs, _label_fields(args)))
        splits = _splits(sets, val=args.val_sources, test=args.test_sources)
        if args.hold_out is not None:
            parts = [part for whole in sets for part in _held_out(whole, args.hold_out, splits[whole.name])]
            if len(parts) == len(sets):
                raise ValueError(f"--hold-out {args.hold_out:g}: no train source has two labeled pairs")
            sets = parts
            splits = _splits(sets, val=args.val_sources, test=args.test_sources)
        records = pack(sets, splits, args.out, samples_per_shard=args.samples_per_shard, num_workers=args.workers)
    except (OSError, ValueError, ImportError) as error:
        print(f"depthkit pack: {error}", file=sys.stderr)
        return 2
    return _report(sets, splits, records, args.out)


def _adopt(args: argparse.Namespace) -> int:
    """Write the manifest of tars that stay where they are."""
    (tars, *others), label_fields = args.inputs, _label_fields(args)
    if others:
        raise ValueError(f"{tars}: tars that stay where they are become one data set; pack {others[0]} by itself")
    if label_fields:
        raise ValueError(f"{tars}: tars are taken for images alone; leave out {', '.join(label_fields)}")
    name = args.name or name_of_tars(tars)
    splits = {set_name: split for split in ("val", "test") for set_name in getattr(args, f"{split}_sources")}
    if args.hold_out is not None:
        raise ValueError(f"{tars}: tars that stay where they are have no labels; leave out --hold-out")
    if splits.keys() - {name}:
        raise ValueError(f"{', '.join(splits)}: the only data set here is {name}")
    manifest = adopt(tars, args.out / name, split=splits.get(name, "train"), num_workers=args.workers)
    print(f"{args.out / name / 'manifest.json'}: {len(manifest.shards)} tars of {manifest.num_samples} samples")
    return 0


def find_sets(inputs: list[str], label_fields: dict[str, Any]) -> Iterator[PairSet]:
    """The data sets of files and folders, and of `dataset=NAME root=DIR`; ValueError names what is wrong.

    `label_fields` are fields of the index that hold for all labels that do not say otherwise.
    """
    public = dict(item.split("=", 1) for item in inputs if item.startswith(("dataset=", "root=")))
    if public:
        if public.keys() != {"dataset", "root"}:
            raise ValueError(f"{' '.join(inputs)}: dataset=NAME and root=DIR belong together")
        if label_fields:
            options = ", ".join(label_fields)
            raise ValueError(f"dataset={public['dataset']}: what its labels are is known; leave out {options}")
        yield from read_dataset(public["dataset"], Path(public["root"]))
    for item in inputs:
        if not item.startswith(("dataset=", "root=")):
            yield from read_input(Path(item), label_fields)


def pack(
    sets: list[PairSet], splits: dict[str, str], out: Path, *, samples_per_shard: int, num_workers: int
) -> dict[str, list[Record]]:
    """Write the shards and the manifest of every data set below `out`; records by data set, in shard order.

    Shards are planned while others are packed, so that pairs which come one by one are never all in memory.
    """
    names: dict[str, list[str]] = {s.name: [] for s in sets}
    records: dict[str, dict[str, Record]] = {s.name: {} for s in sets}
    unplanned, unfinished = set(names), {s.name: s for s in sets}

    def plan() -> Iterator[ShardTask]:
        for pair_set in sets:
            for task in _shard_tasks(pair_set, out, samples_per_shard):
                names[pair_set.name].append(task.name)
                yield task
            unplanned.discard(pair_set.name)

    def finish() -> None:
        for name in [name for name in unfinished if name not in unplanned and len(records[name]) == len(names[name])]:
            _finish(unfinished.pop(name), splits[name], out, names[name], records[name])

    with worker_pool(num_workers) as pool, ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        progress = stack.enter_context(_progress())
        bar = progress.add_task("packing", total=_expected(sets), rate="")
        start, num_pairs = time.monotonic(), 0
        for task, record in _packed(pool, plan(), waiting=4 * num_workers):
            records[task.folder.name][task.name] = record
            num_pairs += len(task.pairs)
            progress.update(bar, completed=num_pairs, rate=f"{num_pairs / (time.monotonic() - start):.0f} samples/s")
            finish()
        finish()
        progress.update(bar, total=num_pairs)
    return {name: [records[name][shard] for shard in names[name]] for name in names}


def _expected(sets: list[PairSet]) -> int | None:
    """How many pairs there are, or should be; None when nobody knows."""
    expected = [s.expected if isinstance(s.pairs, PairStream) else len(s.pairs) for s in sets]
    return None if None in expected else sum(number or 0 for number in expected)


def _packed(
    pool: ProcessPoolExecutor, tasks: Iterable[ShardTask], *, waiting: int
) -> Iterator[tuple[ShardTask, Record]]:
    """Tasks with their records as they are done; no more than `waiting` tasks are taken before they are."""
    futures: dict[Future[Record], ShardTask] = {}

    def done() -> Iterator[tuple[ShardTask, Record]]:
        for future in wait(futures, return_when=FIRST_COMPLETED).done:
            yield futures.pop(future), future.result()

    for task in tasks:
        futures[pool.submit(pack_shard, task)] = task
        if len(futures) >= waiting:
            yield from done()
    while futures:
        yield from done()


def _shard_tasks(pair_set: PairSet, out: Path, samples_per_shard: int) -> Iterator[ShardTask]:
    """Consecutive pairs, `samples_per_shard` a shard."""
    folder = out / pair_set.name
    (folder / ".pack").mkdir(parents=True, exist_ok=True)
    pairs = iter(pair_set.pairs)
    for number in count():
        taken = tuple(islice(pairs, samples_per_shard))
        if not taken:
            return
        yield ShardTask(folder=folder, name=f"{pair_set.name}-{number:06d}", target=pair_set.target, pairs=taken)


def _finish(pair_set: PairSet, split: str, out: Path, names: list[str], records: dict[str, Record]) -> None:
    """All shards are there: drop those of an earlier plan, list what was rejected, write the manifest."""
    folder = out / pair_set.name
    for record in (folder / ".pack").glob("*.json"):
        if record.stem not in records:
            forget(folder, record.stem)
    rejected = [row for name in names for row in records[name].rejected]
    if rejected:
        with atomic_write(folder / "rejected.jsonl") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rejected)
    else:
        (folder / "rejected.jsonl").unlink(missing_ok=True)
    shards = tuple(shard for name in names if (shard := records[name].shard))
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


def _held_out(whole: PairSet, share: float, split: str) -> list[PairSet]:
    """A train set without the last `share` of its labeled pairs, and these as a val set; others as they are."""
    if split != "train" or whole.target is None:
        return [whole]
    if isinstance(whole.pairs, PairStream):
        raise ValueError(f"--hold-out: how many pairs {whole.name} has is not known before all are read")
    first = len(whole.pairs) - max(1, round(share * len(whole.pairs)))
    if first < 1:
        return [whole]
    held_out = replace(whole, name=f"{whole.name}_val", pairs=whole.pairs[first:], split="val")
    return [replace(whole, pairs=whole.pairs[:first]), held_out]


def _progress() -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _report(sets: list[PairSet], splits: dict[str, str], records: dict[str, list[Record]], out: Path) -> int:
    """Print one line per data set; 1 when anything was rejected or has another's key, else 0."""
    table = Table("data set", "split", "samples", "rejected", "MB", "codec")
    num_rejected, repeats = 0, []
    for s in sets:
        shards = [record.shard for record in records[s.name] if record.shard]
        rejected = sum(len(record.rejected) for record in records[s.name])
        num_rejected += rejected
        codec = s.target.codec if s.target else "(images alone)"
        repeats += [f"{s.name}: {text}" for text in [_repeated_keys(out / s.name, shards)] if text]
        num_samples, num_bytes = sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards)
        table.add_row(s.name, splits[s.name], str(num_samples), str(rejected), f"{num_bytes / 1e6:.1f}", codec)
    Console().print(table)
    for s in sets:
        rejected_pairs = [row for record in records[s.name] for row in record.rejected]
        if rejected_pairs:
            place, first = out / s.name / "rejected.jsonl", rejected_pairs[0]
            print(f"{len(rejected_pairs)} pairs were rejected, listed in {place}; the first: {first}", file=sys.stderr)
    print("\n".join(repeats), end="\n" if repeats else "", file=sys.stderr)
    return 1 if num_rejected or repeats else 0


def _repeated_keys(folder: Path, shards: Sequence[Shard]) -> str:
    """What is to be said of keys that lie in several shards; within one they are rejected."""

    def keys(number: int) -> list[str]:
        return list(load_index(folder / shards[number].path).samples)

    hashes = [key_hashes(keys(number)) for number in range(len(shards))]
    return repeated_keys(shards, hashes, lambda number, sample: keys(number)[sample])


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "depthkit pack", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="see above")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the data sets")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="processes; default: all cores"
    )
    parser.add_argument("--name", help="of the data set of tars; default: what the names of the tars begin with")
    for split in ("val", "test"):
        parser.add_argument(
            f"--{split}-sources", type=_names, default=[], metavar="A,B", help=f"data sets of the {split} split"
        )
    parser.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="share of the labeled pairs of every train source that becomes SOURCE_val",
    )
    labels = parser.add_argument_group("your own labels", "where a row of an index or table says nothing else")
    labels.add_argument("--quantity", choices=QUANTITIES, help="what a label holds; default: depth")
    labels.add_argument("--scale", type=float, metavar="S", help="stored number / S = metres, 1/m or pixels")
    labels.add_argument("--relative", action="store_true", help="the unit is unknown: for relative training alone")
    labels.add_argument("--invalid", type=_numbers, metavar="V,V", help='numbers that mean "no measurement", besides 0')
    labels.add_argument("--depth-range", type=_numbers, metavar="LOW,HIGH", help="metres, as known of the sensor")
    labels.add_argument("--array", metavar="NAME", help="name of the array in labels that are HDF5 files")
    args = parser.parse_args(argv)
    if args.samples_per_shard < 1 or args.workers < 1:
        parser.error("--samples-per-shard and --workers must be at least 1")
    if args.hold_out is not None and not 0 < args.hold_out < 1:
        parser.error(f"--hold-out {args.hold_out:g}: must be > 0 and < 1")
    return args


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _label_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the index that the command line states."""
    fields = {
        "target": args.quantity,
        "scale": args.scale,
        "metric": False if args.relative else None,
        "invalid_also": args.invalid,
        "depth_range": args.depth_range,
        "array": args.array,
    }
    return {name: value for name, value in fields.items() if value is not None}
