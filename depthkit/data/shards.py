"""Random access to the samples of a data set: WebDataset tars, here or in the cache, read through their indexes."""

import hashlib
import os
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from depthkit.data.cache import CacheFullError, ShardCache
from depthkit.data.index import load_index
from depthkit.data.manifest import Manifest, Shard
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import is_remote, locate, shown

MAX_OPEN_SHARDS = 64
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")


class RawSample(NamedTuple):
    """One sample as it lies in the tar: `members` maps extensions to contents."""

    key: str
    members: dict[str, bytes]


class OpenShard(NamedTuple):
    """An open tar with its index. `places[i]` maps the extensions of sample `keys[i]` to [offset, size]."""

    name: str
    file: FileIO
    keys: list[str]
    places: list[dict[str, list[int]]]


class ShardReader:
    """Reads single samples of a manifest's shards; `root` is the manifest's folder, or its URL.

    Nothing is opened before the first read; a remote shard is fetched whole into `cache` then. Up to 64 tars stay open,
    the least recently used is closed first. A pickled reader carries no open file, so it may travel to DataLoader
    workers. ConfigError when a remote shard is larger than the cache.
    """

    def __init__(self, manifest: Manifest, root: Path | str, cache: ShardCache | None = None) -> None:
        self.manifest = manifest
        self.root = root
        self.cache = cache or ShardCache()
        self.cache.check_size(tuple(shard for k, shard in enumerate(manifest.shards) if self.is_remote(k)))
        self._open_shards: OrderedDict[int, OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_shards": OrderedDict()}

    def location(self, shard_index: int) -> Path | str:
        """Path or URL of a shard."""
        return locate(self.root, self.manifest.shards[shard_index].path)

    def is_remote(self, shard_index: int) -> bool:
        return isinstance(self.root, str) or is_remote(self.manifest.shards[shard_index].path)

    def keys(self, shard_index: int) -> list[str]:
        """Keys of a shard in the order of the tar."""
        return self._shard(shard_index).keys

    def read(self, shard_index: int, sample_index: int) -> RawSample:
        """All members of one sample, and no other byte of the tar.

        FileNotFoundError when the tar is missing. SampleError when it is damaged, not the one the manifest describes
        or not to be had from its server, and when the sample lacks the label that the manifest promises.
        """
        shard = self._shard(shard_index)
        key, places = shard.keys[sample_index], shard.places[sample_index]
        target = self.manifest.target
        if target is not None and target.extension not in places:
            found = ", ".join(places)
            raise SampleError(f"{shard.name}: sample {key!r} has no member {target.extension!r}, only {found}")
        descriptor = shard.file.fileno()
        members = {extension: os.pread(descriptor, size, offset) for extension, (offset, size) in places.items()}
        for extension, data in members.items():
            if len(data) != places[extension][1]:
                raise SampleError(f"{shard.name}: the file ends inside {key}.{extension}; copy it again")
        return RawSample(key, members)

    def _shard(self, shard_index: int) -> OpenShard:
        if shard_index not in self._open_shards:
            self._open_shards[shard_index] = self._open(self.manifest.shards[shard_index])
            if len(self._open_shards) > MAX_OPEN_SHARDS:
                _, oldest = self._open_shards.popitem(last=False)
                oldest.file.close()
        self._open_shards.move_to_end(shard_index)
        return self._open_shards[shard_index]

    def _open(self, shard: Shard) -> OpenShard:
        try:
            return open_shard(self.root, shard, self.cache)
        except CacheFullError:
            if not self._open_shards:
                raise
            for other in self._open_shards.values():
                other.file.close()
            self._open_shards.clear()
            return open_shard(self.root, shard, self.cache)


def open_shard(root: Path | str, shard: Shard, cache: ShardCache) -> OpenShard:
    """Open a tar with its index; SampleError when size or number of samples are not what the manifest says."""
    file = _open_tar(root, shard, cache)
    index = load_index(Path(os.fsdecode(file.name)))
    name = shown(locate(root, shard.path))
    if len(index.samples) != shard.num_samples:
        raise SampleError(
            f"{name}: the tar holds {len(index.samples)} samples, the manifest says {shard.num_samples}; "
            "they do not belong together"
        )
    return OpenShard(name, file, list(index.samples), list(index.samples.values()))


def verify_shard(root: Path | str, shard: Shard, cache: ShardCache | None = None) -> None:
    """Read a whole tar and compare size and sha256 with the manifest; SampleError names both values."""
    with _open_tar(root, shard, cache or ShardCache()) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            path = os.fsdecode(file.name)
            raise SampleError(f"{path}: sha256 is {found}, the manifest says {shard.sha256}; copy the file again")


def image_member(members: dict[str, bytes]) -> bytes:
    """The image of a sample; SampleError unless there is exactly one."""
    found = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if len(found) != 1:
        raise SampleError(
            f"expected one image member ({', '.join(IMAGE_EXTENSIONS)}), found {', '.join(found) or 'none'} "
            f"among {', '.join(members)}"
        )
    return members[found[0]]


def _open_tar(root: Path | str, shard: Shard, cache: ShardCache) -> FileIO:
    """The tar of a shard, here or in the cache, with the size that the manifest says."""
    path = locate(root, shard.path)
    if isinstance(path, str):
        return cache.open(path, shard)
    try:
        num_bytes = path.stat().st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: the manifest lists this shard, but there is no such file") from error
    if num_bytes != shard.num_bytes:
        raise SampleError(f"{path}: {num_bytes} bytes, the manifest says {shard.num_bytes}; copy the file again")
    return path.open("rb", buffering=0)
