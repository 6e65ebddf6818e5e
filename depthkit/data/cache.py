"""A folder of bounded size that holds whole, verified copies of remote shards.

    SHA256.tar               a shard, under its own hash, so that data sets that share it share the copy
    SHA256.tar.index.json    its index
    SHA256.NUM_BYTES.part    the beginning of one; it may be deleted at any time, like everything here

All processes of a node use the folder together. What they tell each other are locks (`flock`), which end with their
owner: exclusive on a `.part` while it is downloaded, so a killed download is taken over and goes on; shared on a `.tar`
while it is open, so it is not evicted; and `.lock` while somebody makes room. Put the folder on a disk of the node.
"""

import fcntl
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from depthkit.config import ConfigError, PathsConfig
from depthkit.data.index import index_path
from depthkit.data.manifest import Shard
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import CacheError, download

REST = 300.0
"""Seconds for which a shard that could not be had is not tried again: each of its samples is rejected at once."""
POLL = 0.1
"""Seconds between two looks for room while other processes download."""


class CacheFullError(ConfigError):
    """Every shard in the cache is open; the message says how large it is and what to change."""


class Entry(NamedTuple):
    """A file of the cache: `num_bytes` that it takes, or will take when it is whole, and when it was used last."""

    path: Path
    num_bytes: int
    last_use: float


class ShardCache:
    """Opens remote shards from `paths.cache`, at most `paths.cache_gb`, the least recently used evicted first."""

    def __init__(self, paths: PathsConfig | None = None) -> None:
        paths = paths or PathsConfig()
        self.folder = Path(paths.cache)
        self.max_bytes = round(paths.cache_gb * 1e9)
        self._failed: dict[str, tuple[float, str]] = {}

    def path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.sha256}.tar"

    def open(self, url: str, shard: Shard) -> FileIO:
        """The shard as an open file, fetched when it is not there; it stays in the cache while the file is open.

        SampleError when it cannot be reached or is not what the manifest says, CacheError when the disk is full,
        CacheFullError when only evicting open shards would make room.
        """
        until, reason = self._failed.get(shard.sha256, (0.0, ""))
        if time.monotonic() < until:
            raise SampleError(reason)
        while (file := _open_shared(self.path(shard), shard.num_bytes)) is None:
            try:
                self.fetch(url, shard)
            except SampleError as error:
                self._failed[shard.sha256] = (time.monotonic() + REST, str(error))
                raise
        return file

    def fetch(self, url: str, shard: Shard, *, unused_since: float = math.inf, wait: bool = True) -> None:
        """Bring a shard into the cache, if it is not there.

        With `wait` False nothing is done when another process is at it or room is lacking. Shards used after
        `unused_since`, a time in seconds since the epoch, are not evicted for it.
        """
        while not self.path(shard).exists():
            part = self._reserve(shard, unused_since, wait=wait)
            if part is not None:
                with part:
                    self._download(url, shard, part)
            elif not wait:
                return

    def check_size(self, shards: tuple[Shard, ...]) -> None:
        """ConfigError when one of the shards alone is larger than the cache."""
        largest = max(shards, key=lambda shard: shard.num_bytes, default=None)
        if largest is not None and largest.num_bytes > self.max_bytes:
            raise ConfigError(
                f"paths.cache_gb={self.max_bytes / 1e9:g}: shard {largest.path} alone has {largest.num_bytes} bytes"
            )

    def touch(self, shard: Shard) -> bool:
        """Mark a shard as used now; False when it is not there."""
        return _touch(self.path(shard))

    def _download(self, url: str, shard: Shard, part: FileIO) -> None:
        try:
            download(url, part, num_bytes=shard.num_bytes, sha256=shard.sha256)
            os.fsync(part.fileno())
            Path(os.fsdecode(part.name)).rename(self.path(shard))
            _touch(self.path(shard))
        finally:
            # Closing is not enough: a process forked meanwhile would keep the lock.
            fcntl.flock(part, fcntl.LOCK_UN)

    def _reserve(self, shard: Shard, unused_since: float, *, wait: bool) -> FileIO | None:
        """The locked `.part`, with room for all of the shard; None, after waiting, when that has to be tried again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{shard.sha256}.{shard.num_bytes}.part"
        with _locked(self.folder / ".lock"):
            part = _lock(path, os.O_RDWR | os.O_CREAT)
            if part is not None and not self.path(shard).exists():
                try:
                    if self._make_room(part, shard, unused_since, error=wait):
                        return part
                except BaseException:
                    _drop(part, path)
                    raise
            if part is not None:
                _drop(part, path)
        if wait and part is None:
            _wait_for(path)
        elif wait:
            time.sleep(POLL)
        return None

    def _make_room(self, part: FileIO, shard: Shard, unused_since: float, *, error: bool) -> bool:
        """Evict until the shard fits under the limit and on the disk; False while other downloads take the room."""
        path = Path(os.fsdecode(part.name))
        entries = sorted((e for e in self._entries() if e.path != path), key=lambda entry: entry.last_use)
        total = sum(entry.num_bytes for entry in entries) + shard.num_bytes
        needed = shard.num_bytes - os.fstat(part.fileno()).st_size
        waiting = False
        for entry in entries:
            enough = total <= self.max_bytes and shutil.disk_usage(self.folder).free >= needed
            if enough or entry.last_use >= unused_since:
                break
            if _evict(entry.path):
                total -= entry.num_bytes
            else:
                waiting |= entry.path.suffix == ".part"
        free = shutil.disk_usage(self.folder).free
        if total <= self.max_bytes and free >= needed:
            return True
        if error and free < needed:
            raise CacheError(f"{path}: the disk is full: {needed} bytes are needed, {free} are free")
        if error and not waiting:
            raise CacheFullError(
                f"paths.cache_gb={self.max_bytes / 1e9:g}: {shard.num_bytes} bytes more are needed, and all the shards "
                f"in {self.folder} are open, {total - shard.num_bytes} bytes: raise it, or lower data.shuffle_block"
            )
        return False

    def _entries(self) -> Iterator[Entry]:
        with os.scandir(self.folder) as found:
            for item in found:
                path = Path(item.path)
                with suppress(FileNotFoundError):
                    if path.suffix == ".tar":
                        yield Entry(path, item.stat().st_size, item.stat().st_atime)
                    elif path.suffix == ".part":
                        yield Entry(path, int(path.stem.rpartition(".")[2]), item.stat().st_mtime)


def _open_shared(path: Path, num_bytes: int) -> FileIO | None:
    """Open a cached tar and keep it from being evicted; None when it is not there, or not whole, then removed."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    fcntl.flock(file, fcntl.LOCK_SH)
    stat = os.fstat(file.fileno())
    if stat.st_nlink and stat.st_size == num_bytes:
        _touch(path)
        return file
    file.close()
    if stat.st_nlink and not _evict(path):
        raise SampleError(f"{path}: {stat.st_size} bytes, the manifest says {num_bytes}")
    return None


def _touch(path: Path) -> bool:
    """Only the time of access: an index older than its tar would count as stale."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Delete a file of the cache; False when somebody has it open or downloads it."""
    try:
        file = _lock(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    if file is None:
        return False
    with file:
        index_path(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return True


def _lock(path: Path, flags: int) -> FileIO | None:
    """Open a file under an exclusive lock; None when somebody else holds one, or the file has just lost its name."""
    file = FileIO(str(path), "r+", opener=lambda name, _: os.open(name, flags, 0o666))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    file.close()
    return None


def _drop(part: FileIO, path: Path) -> None:
    """Give a reservation back; what was downloaded before stays for the next try."""
    if not os.fstat(part.fileno()).st_size:
        path.unlink(missing_ok=True)
    part.close()


def _wait_for(path: Path) -> None:
    """Until nobody holds the lock of a `.part`: it is whole by then, or its owner is dead or has given up."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
