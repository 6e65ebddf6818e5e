"""Checkpoints to which each rank writes a part, as DeepSpeed's: folders, with a list of what belongs in them."""

import json
import os
from pathlib import Path

CONTENTS = "contents.json"
UNSPLIT = "of one process or DDP, the same on any number of them"


def write_contents(folder: Path, *, zero_stage: int, world_size: int) -> None:
    """Bring every file of the folder to disk, and write down their sizes and how they are split."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    with (folder / CONTENTS).open("x") as contents:
        json.dump({"zero_stage": zero_stage, "world_size": world_size, "files": sizes}, contents, indent=2)
        contents.flush()
        os.fsync(contents.fileno())


def is_whole(folder: Path) -> bool:
    """Whether every file of the list is there with its size."""
    try:
        sizes: dict[str, int] = json.loads((folder / CONTENTS).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def split_of(folder: Path) -> str:
    """How a checkpoint is split, in words."""
    if not folder.is_dir():
        return UNSPLIT
    contents = json.loads((folder / CONTENTS).read_text())
    return describe_split(contents["zero_stage"], contents["world_size"])


def describe_split(zero_stage: int, world_size: int) -> str:
    return f"of ZeRO {zero_stage} on {world_size} processes" if zero_stage else UNSPLIT
