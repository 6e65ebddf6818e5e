"""One label shard: writing it in the order of its keys, putting it in place, its record, and checking it.

Beside the tar `NAME` lie its index and `NAME.label.json`, the record of what it holds. The tar gets its name by a hard
link, which only one of several writers can make, so it never changes once it is there.
"""

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from depthkit.data.decode import decode_target, read_facts
from depthkit.data.index import index_path, load_index
from depthkit.data.manifest import Shard, TargetSpec, parse
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import ShardReader, verify_shard
from depthkit.data.writer import ShardWriter, describe_shard
from depthkit.files import atomic_write

LABEL = "disparity.png"
TARGET = TargetSpec(quantity="disparity", codec="png16", extension=LABEL, metric=False)
NUM_DECODED = 3
"""Labels of a shard that a check decodes, evenly spread."""
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a label shard holds. `rejected` maps keys to the reason why there is no label; `unreadable` is the reason
    why the image shard as a whole could not be read, and the keys then stand for unknown ones."""

    shard: Shard
    rejected: dict[str, str]
    unreadable: str = ""


class OpenLabels:
    """The label shard `path` in the making, under a name of `token`. Samples come in any order and from any thread, and
    are written in that of `keys`."""

    def __init__(self, path: Path, num_samples: int, token: str) -> None:
        self.path = path
        self.keys: list[str] = []
        self.rejected: dict[str, str] = {}
        self._num_samples = num_samples
        self._token = token
        self._writer = ShardWriter(path.with_name(f".{path.name}.{token}"))
        self._waiting: dict[int, dict[str, bytes]] = {}
        self._num_written = 0
        self._lock = threading.Lock()

    def add(self, index: int, members: dict[str, bytes]) -> bool:
        """Whether this was the last one."""
        with self._lock:
            self._waiting[index] = members
            while self._num_written in self._waiting:
                self._writer.add(self.keys[self._num_written], self._waiting.pop(self._num_written))
                self._num_written += 1
            return self._num_written == self._num_samples

    def reject(self, index: int, reason: str) -> bool:
        self.rejected[self.keys[index]] = reason
        return self.add(index, {"json": json.dumps({"rejected": reason}).encode()})

    def place(self, name: str, unreadable: str = "") -> None:
        """Finish the tar and put it in place, unless another writer's is there: the two say the same."""
        with suppress(FileNotFoundError):  # this process was taken for dead, and its attempt tidied away
            described = replace(self._writer.close(), path=name)
            if keep_first(self._writer.path, self.path):
                index_path(self._writer.path).replace(index_path(self.path))
                save_record(
                    Record(shard=described, rejected=self.rejected, unreadable=unreadable), self.path, self._token
                )
        index_path(self._writer.path).unlink(missing_ok=True)

    def abandon(self) -> None:
        with self._lock:
            self._num_written = -1  # whatever a slow thread still brings stays where it is
            self._writer.__exit__(SampleError, SampleError("abandoned"), None)


def remove_leftovers(path: Path, token: str) -> None:
    """What a dead process left of its attempt at `path`."""
    for left in path.parent.iterdir():
        if path.name in left.name and token in left.name:
            left.unlink(missing_ok=True)


def keep_first(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` for good, or remove it and return False when that name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        temporary.rename(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)
    return True


def record_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.label.json")


def save_record(record: Record, tar: Path, token: str) -> None:
    with atomic_write(record_path(tar), token) as file:
        file.write(json.dumps(asdict(record)).encode())


def load_record(tar: Path) -> Record:
    """The record of a label shard; ValueError names what is wrong, FileNotFoundError when there is none."""
    try:
        content = json.loads(record_path(tar).read_text())
        return Record(**{**content, "shard": parse(Shard, content["shard"], "shard")})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{record_path(tar)}: not the record of a label shard ({error}); run with stage.verify=true"
        ) from error


def describe_labels(folder: Path, name: str) -> Record:
    """The record of a finished label shard, read from the shard itself."""
    described = describe_shard(folder, name)
    samples = load_index(folder / name).samples
    without = {key: _read_members(folder / name, places) for key, places in samples.items() if LABEL not in places}
    rejected = {key: str(read_facts(members).get("rejected", "no reason stated")) for key, members in without.items()}
    return Record(shard=described, rejected=rejected)


def check_labels(folder: Path, name: str, images: ShardReader, image_shard: int) -> None:
    """SampleError, ValueError or OSError says why a label shard is not what its record says or does not fit its images.

    Reads the whole tar and decodes some labels.
    """
    tar = folder / name
    record = load_record(tar)
    verify_shard(folder, record.shard)
    samples = load_index(tar).samples
    _check_keys(tar, list(samples), record, images, image_shard)
    labeled = [key for key, places in samples.items() if LABEL in places]
    for key in labeled[:: max(1, (len(labeled) - 1) // (NUM_DECODED - 1))]:
        members = _read_members(tar, samples[key])
        decode_target(members[LABEL], TARGET, read_facts(members), "disparity")


def _check_keys(tar: Path, keys: list[str], record: Record, images: ShardReader, image_shard: int) -> None:
    expected = images.manifest.shards[image_shard].num_samples
    if len(keys) != expected:
        raise SampleError(f"{tar} holds {len(keys)} samples, its image shard {expected}")
    try:
        wanted = None if images.is_remote(image_shard) else images.keys(image_shard)
    except (SampleError, OSError):
        wanted = None
    if wanted is None:
        return  # far away, gone or damaged: of the keys there nothing can be said
    if record.unreadable:
        raise SampleError(f"{tar} holds no labels, as its image shard could not be read; now it can")
    if keys != wanted:
        raise SampleError(f"{tar}: its keys are not those of its image shard")


def _read_members(tar: Path, places: dict[str, list[int]]) -> dict[str, bytes]:
    with tar.open("rb") as file:
        return {extension: os.pread(file.fileno(), size, offset) for extension, (offset, size) in places.items()}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the disk say which file was written, and what to do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        cure = "finished shards are kept; make room and start the same command again"
        raise OSError(error.errno, f"{error.strerror}; {cure}", str(path)) from error
