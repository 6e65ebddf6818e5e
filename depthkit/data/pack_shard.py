"""Packing one shard: check every pair, write the tar, leave a record of what went in.

A record (`.pack/NAME.json`) says that a tar is finished and what it was made from, so that a later run can keep it.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from depthkit.data.decode import decode_image, decode_target, image_size, target_size
from depthkit.data.index import index_path
from depthkit.data.manifest import Shard, TargetSpec, parse
from depthkit.data.pairs import Pair, run_lengths
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source
from depthkit.data.writer import ShardWriter
from depthkit.files import atomic_write

COPIED_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """What goes into the tar `folder/name.tar`."""

    folder: Path
    name: str
    target: TargetSpec | None
    pairs: tuple[Pair, ...]

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.name}.tar"

    @property
    def record(self) -> Path:
        return self.folder / ".pack" / f"{self.name}.json"

    def digest(self) -> str:
        """Changes with the pairs, with what is known about them, and with size and time of every file."""
        sources = [source for pair in self.pairs for source in (pair.image, pair.label, pair.sky) if source]
        paths = [source.path for source in sources] + [pair.pose for pair in self.pairs if pair.pose]
        stamps = [_stamp(path) for path in paths]
        content = [asdict(self.target) if self.target else None, [asdict(pair) for pair in self.pairs], stamps]
        return hashlib.sha256(json.dumps(content, default=_as_text, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What became of a task; `shard` is None when all its pairs were rejected."""

    digest: str
    shard: Shard | None
    rejected: list[dict[str, str]]


def pack_shard(task: ShardTask) -> Record:
    """Pack one tar, or keep the one that an earlier run made from the same files.

    A tar that lacks rejected pairs is always made again, since their files may have been repaired.
    """
    digest = task.digest()
    earlier = _load_record(task.record)
    if earlier and earlier.digest == digest and not earlier.rejected and _is_whole(task.tar, earlier.shard):
        return replace(earlier, shard=_with_runs(earlier.shard, task.pairs))
    forget(task.folder, task.name)
    rejected, packed = [], []
    with ExitStack() as stack:
        writer = None
        for pair in task.pairs:
            try:
                members = read_pair(pair, task.target)
                if writer and pair.key in writer.index.samples:
                    raise SampleError(f"{pair.image}: key {pair.key!r} is taken; does the data set lie there twice?")
            except (OSError, SampleError) as error:
                rejected.append({"id": pair.facts["source_id"], "path": str(pair.image), "reason": str(error)})
                continue
            writer = writer or stack.enter_context(ShardWriter(task.tar))
            writer.add(pair.key, members)
            packed.append(pair)
    shard = _with_runs(writer.close() if writer else None, packed)
    record = Record(digest=digest, shard=shard, rejected=rejected)
    with atomic_write(task.record) as file:
        file.write(json.dumps(asdict(record)).encode())
    return record


def _with_runs(shard: Shard | None, pairs: Sequence[Pair]) -> Shard | None:
    return shard and replace(shard, runs=run_lengths([pair.facts for pair in pairs]))


def read_pair(pair: Pair, target: TargetSpec | None) -> dict[str, bytes]:
    """The members of one sample, all of them decoded once. OSError or SampleError when they cannot be used."""
    extension, image = _read_image(pair.image)
    members, facts = {extension: image}, dict(pair.facts)
    if pair.pose is not None:
        facts["pose"] = _read_pose(pair.pose)
    if target is not None and pair.label is not None:
        label, sky = pair.label.read(), pair.sky.read() if pair.sky else None
        _check_label(label, sky, target, pair, image_size(image), facts)
        members |= {target.extension: label} | ({"sky.png": sky} if sky else {})
    return members | {"json": json.dumps(facts, sort_keys=True).encode()}


def _read_image(source: Source) -> tuple[str, bytes]:
    """Extension and content of the image member; SampleError when it cannot be decoded to its end."""
    data = source.read()
    if source.suffix in COPIED_SUFFIXES:
        decode_image(data, reduce=8)
        return source.suffix[1:], data
    return "png", cv2.imencode(".png", cv2.cvtColor(decode_image(data), cv2.COLOR_RGB2BGR))[1].tobytes()


def _read_pose(path: Path) -> list[list[float]]:
    try:
        pose = np.loadtxt(path)
    except ValueError as error:
        raise SampleError(f"{path}: not a matrix of numbers ({error})") from error
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise SampleError(f"{path}: a pose is a finite 4x4 matrix, got shape {pose.shape}")
    return pose.tolist()


def _check_label(
    data: bytes, sky: bytes | None, target: TargetSpec, pair: Pair, image: tuple[int, int], facts: dict[str, Any]
) -> None:
    """SampleError unless the label can be decoded and belongs to an image of this size; completes `facts`.

    The label has the size that the index states, or that of the image, or is smaller with the same aspect ratio to
    within a pixel. `intrinsics_px` then change from pixels of the image to pixels of the label.
    """
    try:
        label = target_size(data, target.codec)
        smaller = label[0] <= image[0] and label[1] <= image[1] and abs(label[0] - image[0] * label[1] / image[1]) <= 1
        if label != pair.label_size if pair.label_size else not smaller:
            stated = f"; the index says {_size(pair.label_size)}" if pair.label_size else ""
            raise SampleError(f"the label is {_size(label)}, the image {_size(image)} (width x height){stated}")
        if label != image:
            facts["label_size"] = list(label)
            if "intrinsics_px" in facts:
                scales = np.array([label[1] / image[1], label[0] / image[0]] * 2)
                facts["intrinsics_px"] = (scales * facts["intrinsics_px"]).tolist()
        decode_target(data, target, facts, "disparity", sky=sky)
    except SampleError as error:
        raise SampleError(f"{pair.label}: {error}") from error


def forget(folder: Path, name: str) -> None:
    """Remove a shard, what killed runs left of it, and first the manifest, which would no longer be true."""
    (folder / "manifest.json").unlink(missing_ok=True)
    (folder / ".pack" / f"{name}.json").unlink(missing_ok=True)
    tar = folder / f"{name}.tar"
    for path in (tar, index_path(tar), *folder.glob(f".{tar.name}.*.tmp"), *folder.glob(f".pack/.{name}.json.*.tmp")):
        path.unlink(missing_ok=True)


def _load_record(path: Path) -> Record | None:
    if not path.is_file():
        return None
    fields = json.loads(path.read_bytes())
    return Record(**fields | {"shard": parse(Shard | None, fields["shard"], "shard")})


def _is_whole(tar: Path, shard: Shard | None) -> bool:
    """A tar gets its name when it is complete, so its size tells; `depthkit inspect` compares the hash."""
    return shard is not None and tar.is_file() and tar.stat().st_size == shard.num_bytes


def _as_text(value: object) -> str:
    """Of a path or a reader; the address in memory that the text of a function holds would differ in every run."""
    return getattr(value, "__qualname__", str(value))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[1]}x{size[0]}" if size else "?"
