"""Writing one shard: a plain WebDataset tar and its index, whole or not at all."""

import hashlib
import re
import tarfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from depthkit.data.index import ShardIndex, load_index, save_index
from depthkit.data.manifest import Shard
from depthkit.files import atomic_write

KEY = re.compile(r"[^./][^.]*")
EXTENSION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")  # WebDataset readers lower-case extensions


class ShardWriter:
    """Writes samples into the tar `path`, which appears together with its index when the block ends.

    An exception inside the `with` block leaves nothing behind. The same samples give the same bytes: USTAR headers
    with time 0 and no owner. Members of a sample lie side by side, in the order given.

        with ShardWriter(folder / "train-000000.tar") as writer:
            writer.add("scene_00_frame_000", {"jpg": image, "depth.png": depth, "json": facts})
        shard = writer.close()
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = ShardIndex(num_bytes=0, samples={})
        self._hash = hashlib.sha256()
        self._shard: Shard | None = None
        self._pending = ExitStack()
        self._file = self._pending.enter_context(atomic_write(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._pending.__exit__(kind, error, trace)

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample: extension -> content. ValueError for a repeated or dotted key and for a bad extension."""
        self._check(key, members)
        places = self.index.samples[key] = {}
        for extension, data in members.items():
            self._write(self._header(f"{key}.{extension}", len(data)))
            places[extension] = [self.index.num_bytes, len(data)]
            self._write(data + bytes(-len(data) % tarfile.BLOCKSIZE))

    def close(self) -> Shard:
        """Finish the tar and write its index; return what the manifest says of it, with a path relative to its folder.

        ValueError when no sample was added. A second call returns the same facts.
        """
        if self._shard is None:
            with self._pending:
                if not self.index.samples:
                    raise ValueError(f"{self.path}: a shard needs at least one sample")
                end = 2 * tarfile.BLOCKSIZE
                self._write(bytes(end + -(self.index.num_bytes + end) % tarfile.RECORDSIZE))
            save_index(self.index, self.path)
            self._shard = Shard(
                path=self.path.name,
                num_samples=len(self.index.samples),
                num_bytes=self.index.num_bytes,
                sha256=self._hash.hexdigest(),
            )
        return self._shard

    def _check(self, key: str, members: dict[str, bytes]) -> None:
        if not KEY.fullmatch(key):
            raise ValueError(f"{self.path}: key {key!r} must not be empty, hold a dot or start with a slash")
        if key in self.index.samples:
            raise ValueError(f"{self.path}: key {key!r} was already added")
        if not members:
            raise ValueError(f"{self.path}: sample {key!r} has no members")
        for extension in members:
            if not EXTENSION.fullmatch(extension):
                raise ValueError(f"{self.path}: {key!r}: extension {extension!r} is not like 'jpg' or 'depth.png'")

    def _header(self, name: str, size: int) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = size
        try:
            return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        except ValueError as error:
            raise ValueError(f"{self.path}: member {name!r}: {error}; use a shorter key") from error

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.index.num_bytes += len(data)


def describe_shard(root: Path, path: str) -> Shard:
    """What a manifest in `root` says of the finished tar `path`, read from the tar itself."""
    tar = root / path
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    index = load_index(tar)
    return Shard(path=path, num_samples=len(index.samples), num_bytes=index.num_bytes, sha256=digest)
