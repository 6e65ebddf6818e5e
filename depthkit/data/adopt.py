"""A manifest for WebDataset tars that somebody else has packed and that stay where they are."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict
from io import FileIO
from pathlib import Path

from braceexpand import braceexpand
from rich.console import Console
from rich.progress import track

from depthkit.data.index import scan_tar
from depthkit.data.manifest import Manifest, Shard, parse, save_manifest
from depthkit.data.pairs import safe
from depthkit.data.remote import fetch, is_remote
from depthkit.data.writer import describe_shard


def are_tars(text: str) -> bool:
    """Whether a text names tars as WebDataset takes them: a URL, or a path with braces."""
    return is_remote(text) or ("{" in text and text.endswith(".tar"))


def name_of_tars(tars: str) -> str:
    """What the names of the tars begin with: `photos` for `https://example.org/photos-{000..063}.tar`.

    ValueError when they begin with a number or a brace.
    """
    found = re.match(r"[^{\d]*[^{\d_.-]", tars.rpartition("/")[2])
    if found is None:
        raise ValueError(f"{tars}: the names of the tars begin with a number, so state --name NAME for the data set")
    return safe(found[0].removesuffix(".tar"))


def adopt(tars: str, folder: Path, *, split: str = "train", num_workers: int = 1) -> Manifest:
    """Write `manifest.json` of the data set `folder` for existing tars of images, a path or URL with braces for many.

    Every tar is read once and none is kept. What was read is noted in `.pack/`, so that a run which was killed is
    started again and reads the rest. SampleError when a tar is damaged, ConfigError when it cannot be reached.
    """
    locations = [tar if is_remote(tar) else str(Path(tar).absolute()) for tar in braceexpand(tars)]
    described = describe_tars(locations, folder / ".pack", num_workers=num_workers)
    console = Console(stderr=True)
    shards = {shard.path: shard for shard in track(described, "reading tars", total=len(locations), console=console)}
    manifest = Manifest(
        name=folder.name,
        split=split,
        target=None,
        shards=tuple(shards[location] for location in locations),
        licence="not stated",
        source=tars,
    )
    save_manifest(manifest, folder / "manifest.json")
    return manifest


def describe_tars(locations: Sequence[str], folder: Path, *, num_workers: int) -> Iterator[Shard]:
    """What a manifest says of each tar, in any order; what was read before and has not changed comes first.

    `folder` holds the record of what was read, and remote tars while they are looked at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.tmp"):  # of a killed process
        left.unlink(missing_ok=True)
    record = folder / "tars.jsonl"
    known = {shard.path: shard for shard in _known(record)}
    yield from (known[location] for location in locations if location in known)
    with ThreadPoolExecutor(num_workers) as pool, record.open("a") as file, ExitStack() as stack:
        stack.callback(pool.shutdown, cancel_futures=True)
        changed = {location: _changed(location) for location in locations if location not in known}
        for future in as_completed([pool.submit(describe_tar, location, folder) for location in changed]):
            shard = future.result()
            line = asdict(shard) | {"changed": changed[shard.path]}
            file.write(f"\n{json.dumps(line)}")  # first, as the last line may be half of one
            file.flush()
            yield shard


def _known(record: Path) -> Iterator[Shard]:
    for line in record.read_text().splitlines() if record.is_file() else ():
        with suppress(ValueError, TypeError):  # the line that a killed process was writing
            known = json.loads(line)
            if known.pop("changed") == _changed(known["path"]):
                yield parse(Shard, known, "")


def _changed(location: str) -> int | None:
    """When a local tar was changed last, in nanoseconds; a remote one is taken for what it was."""
    return None if is_remote(location) or not Path(location).is_file() else Path(location).stat().st_mtime_ns


def describe_tar(location: str, folder: Path) -> Shard:
    """What a manifest says of one tar, which lies in `folder` while it is looked at if it is remote."""
    if not is_remote(location):
        return describe_shard(Path.cwd(), location)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") as named, FileIO(named.name, "r+") as file:
        fetch(location, file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = scan_tar(Path(named.name))
    return Shard(path=location, num_samples=len(index.samples), num_bytes=index.num_bytes, sha256=digest)
