"""Where every member of a tar lies, kept in a small JSON file beside it, so that one sample is read without the others.

The index of `train-000000.tar` is `train-000000.tar.index.json`. It holds nothing that a scan of the tar would not
find again: it may be deleted at any time, and one that is older than its tar is built anew.
"""

import json
import os
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from depthkit.data.quarantine import SampleError
from depthkit.files import atomic_write

# As WebDataset has it, the key ends at the first dot of the file name.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


@dataclass(kw_only=True)
class ShardIndex:
    """`samples[key][extension]` is [offset, size] of a member's content, `num_bytes` the size of the tar, in bytes."""

    num_bytes: int
    samples: dict[str, dict[str, list[int]]]


def index_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name}.index.json")


def load_index(tar: Path) -> ShardIndex:
    """The index of a tar, from its file when that is up to date, else from a scan (kept for the next reader).

    FileNotFoundError without the tar, SampleError when it is damaged.
    """
    stat = tar.stat()
    index = _read_index(index_path(tar), not_before_ns=stat.st_mtime_ns)
    if index is not None and _fits(index, stat.st_size):
        return index
    index = scan_tar(tar)
    with suppress(OSError):  # a read-only data folder is normal; the index then lives as long as its reader
        save_index(index, tar)
    return index


def save_index(index: ShardIndex, tar: Path) -> None:
    text = json.dumps({"num_bytes": index.num_bytes, "samples": index.samples}, separators=(",", ":"))
    with atomic_write(index_path(tar)) as file:
        file.write(text.encode())


def scan_tar(tar: Path) -> ShardIndex:
    """Index a tar by reading its headers alone. SampleError for a damaged one says how many samples are whole."""
    samples: dict[str, dict[str, list[int]]] = {}
    end = 0
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                name = MEMBER.fullmatch(member.name)
                if name is None or not member.isreg():
                    continue
                members = samples.setdefault(name[1], {})
                if name[2].lower() in members:
                    raise SampleError(f"{tar}: member {member.name} occurs twice; pack the shard again")
                members[name[2].lower()] = [member.offset_data, member.size]
    except tarfile.TarError as error:
        raise _damaged(tar, samples, str(error)) from error
    if not _has_end_mark(tar, end):
        raise _damaged(tar, samples, f"no header and no end mark at byte {end}")
    return ShardIndex(num_bytes=tar.stat().st_size, samples=samples)


def _read_index(path: Path, *, not_before_ns: int) -> ShardIndex | None:
    """The stored index, or None when there is none, or it is older than the tar, or it is not an index."""
    try:
        if path.stat().st_mtime_ns < not_before_ns:
            return None
        return ShardIndex(**json.loads(path.read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _fits(index: ShardIndex, num_bytes: int) -> bool:
    """Whether an index that was read can be that of a tar of this size: members lie inside, at whole blocks."""
    try:
        return index.num_bytes == num_bytes and all(
            type(start) is type(size) is int
            and start % tarfile.BLOCKSIZE == 0
            and 0 <= size <= size + start <= num_bytes
            for members in index.samples.values()
            for start, size in members.values()
        )
    except (AttributeError, TypeError, ValueError):
        return False


def _has_end_mark(tar: Path, end: int) -> bool:
    """tarfile stops without an error at a header that is cut or damaged; a whole tar has a block of zeros there."""
    with tar.open("rb") as file:
        return os.pread(file.fileno(), tarfile.BLOCKSIZE, end) == bytes(tarfile.BLOCKSIZE)


def _damaged(tar: Path, samples: dict[str, dict[str, list[int]]], reason: str) -> SampleError:
    """The last sample seen may lack members, so it does not count as whole."""
    return SampleError(
        f"{tar}: not a whole tar ({reason}); the first {max(len(samples) - 1, 0)} samples are whole. Copy it again"
    )
