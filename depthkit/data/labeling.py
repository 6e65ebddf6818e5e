"""The folder of a label set: one label shard for one image shard, however many processes write it.

A shard is done when its tar and its record (`label_store`) are there. A tar without a record, which a process that was
killed in between leaves, is checked and kept.
"""

import json
import os
import random
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.config import ConfigError
from depthkit.data.claims import Claims
from depthkit.data.decode import encode_disparity
from depthkit.data.index import index_path
from depthkit.data.label_images import ImageChunk
from depthkit.data.label_store import (
    LABEL,
    TARGET,
    OpenLabels,
    Record,
    check_labels,
    describe_labels,
    keep_first,
    load_record,
    naming,
    record_path,
    remove_leftovers,
    save_record,
)
from depthkit.data.manifest import LabelsOf, Manifest, save_manifest
from depthkit.data.quarantine import Quarantine
from depthkit.data.reader import label_path
from depthkit.data.remote import shown
from depthkit.data.shards import ShardReader
from depthkit.data.uncertainty import Quality
from depthkit.files import atomic_write
from depthkit.types import Rejection

__all__ = ["LABEL", "TARGET", "LabelShards"]

MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"


class LabelShards:
    """Which shards of a label set are done, taking and writing the others, and the manifest at the end.

    A label shard has the name and the keys of its image shard. A sample whose image is broken keeps its place with
    `KEY.json` alone, which says why. An image shard that cannot be read is set aside; once all others are done its
    labels say so too, unless more than `max_rejected` of all images would be without a label: QuarantineBudgetExceeded
    then. ConfigError when the folder holds labels of another teacher, resolution or image set, or no labels.
    """

    def __init__(
        self, folder: Path, images: ShardReader, labels_of: LabelsOf, claims: Claims, *, max_rejected: float
    ) -> None:
        self.folder = folder
        self.images = images
        self.labels_of = labels_of
        self.claims = claims
        self.max_rejected = max_rejected
        self.manifest_path = folder / MANIFEST
        self.names = [label_path(shard.path) for shard in images.manifest.shards]
        self.num_written = 0
        self.quarantine = Quarantine(folder / f"rejected.{claims.token[:12]}.jsonl", max_fraction=max_rejected)
        self._set_aside: dict[int, str] = {}
        self._open: dict[int, OpenLabels] = {}
        self._free: list[int] = []
        self._is_alone = True
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        origin = folder / "labels_of.json"
        if not origin.exists():
            self._check_free()
        keep_origin(origin, labels_of, claims.token)

    def _check_free(self) -> None:
        """ConfigError when a file that is no label has the place of one: above all, the folder of the images."""
        for path in (self.manifest_path, *map(self.path, range(len(self.names)))):
            if path.exists():
                raise ConfigError(f"{path} is there, but {self.folder} holds no labels: choose another out=FOLDER")

    def path(self, shard: int) -> Path:
        return self.folder / self.names[shard]

    # --- taking ------------------------------------------------------------------------------------------------------

    def pending(self) -> list[int]:
        """Image shards without a finished label shard."""
        found: set[str] = set()
        for parent in {self.path(shard).parent for shard in range(len(self.names))}:
            with suppress(FileNotFoundError):  # one listing is far cheaper than a question for each file
                found.update(entry.path for entry in os.scandir(parent))
        return [
            shard
            for shard in range(len(self.names))
            if not {str(self.path(shard)), str(record_path(self.path(shard)))} <= found
        ]

    def free(self) -> list[int]:
        """Pending shards that no living process works on and that this one did not set aside."""
        taken = self.claims.taken()
        return [s for s in self.pending() if s not in self._set_aside and self.names[s] not in taken]

    def take(self) -> int | None:
        """Claim a free shard; None when there is none."""
        while self._free or self._look():
            shard = self._free.pop()
            dead = self.claims.take(self.names[shard])
            if dead is not None:
                if dead:
                    remove_leftovers(self.path(shard), dead)
                if not self._is_done(shard):
                    return shard
                self.claims.release(self.names[shard])
            # Another one was here first. From now on in any order, so that processes that start together spread out.
            self._is_alone = False
            self._free = []
        return None

    def upcoming(self) -> int | None:
        """The shard that `take` will try next, unless the list of free ones is made anew."""
        return self._free[-1] if self._free else None

    def _look(self) -> list[int]:
        self._free = self.free()[::-1]
        if not self._is_alone:
            random.shuffle(self._free)
        return self._free

    def _is_done(self, shard: int) -> bool:
        """Whether a claimed shard is done after all, or needs its record alone."""
        path = self.path(shard)
        if not path.exists():
            return False
        if record_path(path).exists():
            return True
        try:
            save_record(describe_labels(self.folder, self.names[shard]), path, self.claims.token)
            check_labels(self.folder, self.names[shard], self.images, shard)
        except ValueError as error:
            self._forget(shard, str(error))
            return False
        return True

    # --- writing -----------------------------------------------------------------------------------------------------

    def accept(self, chunk: ImageChunk) -> bool:
        """Get ready for the labels of a chunk of a claimed shard; False when none are wanted."""
        shard = chunk.shard
        if chunk.failure:
            self._put_aside(shard, chunk.failure)
            return False
        with naming(self.path(shard)):
            if chunk.first == 0:
                self._open[shard] = self._start(shard)
            labels = self._open.get(shard)
            if labels is None:
                return False
            labels.keys += chunk.keys
            self.quarantine.record(len(chunk.keys) - len(chunk.rejections), chunk.rejections.values())
            for index, rejection in chunk.rejections.items():
                if labels.reject(index, rejection.reason):
                    self._place(shard, labels)
        return True

    def write(self, shard: int, index: int, disparity: np.ndarray, quality: Quality | None = None) -> None:
        """The label (H, W) of one image, from any thread. The last one of a shard puts the shard in place."""
        labels = self._open.get(shard)
        if labels is None:
            return
        png, facts = encode_disparity(disparity)
        more_members, more_facts = ({}, {}) if quality is None else quality.encode()
        members = {LABEL: png, **more_members, "json": json.dumps({**facts, **more_facts}).encode()}
        with naming(self.path(shard)):
            if labels.add(index, members):
                self._place(shard, labels)

    def abandon(self) -> None:
        """Remove what is unfinished."""
        for shard in list(self._open):
            self._open.pop(shard).abandon()

    def _start(self, shard: int) -> OpenLabels:
        self.path(shard).parent.mkdir(parents=True, exist_ok=True)
        return OpenLabels(self.path(shard), self.images.manifest.shards[shard].num_samples, self.claims.token)

    def _place(self, shard: int, labels: OpenLabels, unreadable: str = "") -> None:
        # First the manifest, if an earlier state had one: it would no longer be true.
        self.manifest_path.unlink(missing_ok=True)
        labels.place(self.names[shard], unreadable)
        self._open.pop(shard, None)
        with self._lock:
            self.num_written += 1
        self.claims.release(self.names[shard])

    def _put_aside(self, shard: int, reason: str) -> None:
        if shard in self._open:
            self._open.pop(shard).abandon()
        if shard not in self._set_aside:
            print(f"{self._image_path(shard)} cannot be read, the other shards go on: {reason}")
            self._set_aside[shard] = reason
            self.claims.release(self.names[shard])

    def _image_path(self, shard: int) -> str:
        return shown(self.images.location(shard))

    # --- checking ----------------------------------------------------------------------------------------------------

    def verify(self, shard: int) -> bool:
        """Check a finished shard, from any thread; a broken one is removed, so that it is pending again, and named."""
        images = ShardReader(
            self.images.manifest, self.images.root, self.images.cache
        )  # its own: a reader serves one thread
        try:
            check_labels(self.folder, self.names[shard], images, shard)
        except (ValueError, OSError) as error:
            if self.claims.take(self.names[shard]) is not None:
                self._forget(shard, str(error))
                self.claims.release(self.names[shard])
            return False
        return True

    def _forget(self, shard: int, reason: str) -> None:
        path = self.path(shard)
        print(f"{path} is labeled again: {reason}")
        for each in (self.manifest_path, record_path(path), path, index_path(path)):
            each.unlink(missing_ok=True)

    # --- finishing ---------------------------------------------------------------------------------------------------

    def finish(self) -> bool:
        """Write the manifest unless it is there; False while shards are missing and others may be at work on them.

        QuarantineBudgetExceeded when too many images are without a label; the list of them is written first.
        """
        pending = self.pending()
        if not pending and self.manifest_path.exists():
            return True
        taken = self.claims.taken()
        if any(shard not in self._set_aside or self.names[shard] in taken for shard in pending):
            return False
        if self.claims.take(MANIFEST) is None:
            return False
        try:
            records = {s: load_record(self.path(s)) for s in range(len(self.names)) if s not in pending}
            self._judge(records, pending)
            for shard in pending:
                if self.claims.take(self.names[shard]) is None:
                    return False
                records[shard] = self._write_unreadable(shard)
            save_manifest(self._manifest(list(dict(sorted(records.items())).values())), self.manifest_path)
            for path in self.folder.glob("rejected.*.jsonl"):
                path.unlink(missing_ok=True)
        finally:
            self.claims.release(MANIFEST)
        return True

    def _judge(self, records: dict[int, Record], unreadable: list[int]) -> None:
        """Write the list of all images without a label; QuarantineBudgetExceeded when they are too many."""
        rows = [
            Rejection(dataset=self.images.manifest.name, shard=self._image_path(shard), key=key, reason=reason)
            for shard, record in records.items()
            for key, reason in record.rejected.items()
        ]
        for shard in unreadable:
            rows += [
                Rejection(
                    dataset=self.images.manifest.name,
                    shard=self._image_path(shard),
                    key=key,
                    reason=self._set_aside[shard],
                )
                for key in self._unknown_keys(shard)
            ]
        (self.folder / REJECTED).unlink(missing_ok=True)
        quarantine = Quarantine(self.folder / REJECTED, max_fraction=self.max_rejected)
        quarantine.record(self.images.manifest.num_samples - len(rows), rows)
        if rows:
            print(quarantine.summary())

    def _unknown_keys(self, shard: int) -> list[str]:
        return [f"sample {index}" for index in range(self.images.manifest.shards[shard].num_samples)]

    def _write_unreadable(self, shard: int) -> Record:
        with naming(self.path(shard)):
            labels = self._open[shard] = self._start(shard)
            labels.keys = self._unknown_keys(shard)
            for index in range(len(labels.keys)):
                labels.reject(index, self._set_aside[shard])
            self._place(shard, labels, self._set_aside[shard])
        return load_record(self.path(shard))

    def _manifest(self, records: list[Record]) -> Manifest:
        num_rejected = sum(len(record.rejected) for record in records)
        unreadable = [record.shard.path for record in records if record.unreadable]
        description = f"{num_rejected} images have no label; {REJECTED} says why." if num_rejected else ""
        if unreadable:
            description += f" Unreadable image shards: {', '.join(unreadable)}."
        return Manifest(
            name=self.images.manifest.name,
            split=self.images.manifest.split,
            target=TARGET,
            shards=tuple(record.shard for record in records),
            licence=self.images.manifest.licence,
            source=f"pseudo-labels of teacher {self.labels_of.teacher_sha256[:12]}",
            description=description,
            labels_of=self.labels_of,
        )


def keep_origin(path: Path, labels_of: LabelsOf, token: str) -> None:
    """Write down what the labels in a folder are made from, or check that it is still the same."""
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{token}")
        with atomic_write(temporary) as file:
            file.write((json.dumps(asdict(labels_of), indent=2) + "\n").encode())
        keep_first(temporary, path)
    before, now = (_flat(json.loads(text)) for text in (path.read_text(), json.dumps(asdict(labels_of))))
    # Of a field that the folder does not know yet nothing can be said.
    different = [
        f"{name} {before[name]!r}, now {now[name]!r}" for name in now if before.get(name, now[name]) != now[name]
    ]
    if different:
        raise ConfigError(
            f"{path.parent} holds labels of another origin ({'; '.join(different)}): choose another out=FOLDER"
        )


def _flat(origin: dict[str, Any]) -> dict[str, Any]:
    """The settings beside the other fields, as `settings.NAME`."""
    settings = origin.pop("settings", None) or {}
    return origin | {f"settings.{name}": value for name, value in settings.items()}
