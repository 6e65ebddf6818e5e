"""Writing files so that nobody ever sees half of one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path, token: str = "") -> Iterator[BinaryIO]:
    """Open a file that appears at `path`, whole and on disk, when the block ends without an exception.

    Until then it is `.NAME.TOKEN.tmp` in the same folder; `token` names the writer, by default at random. An exception
    removes it; a killed process leaves it there, safe to delete, and `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.{token or uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
