"""Finding the checkpoint to go on from."""

import warnings
import zipfile
from pathlib import Path


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, whose names sort by step; a damaged one is named and passed over.

    None when there is none. A torch file is a zip archive whose directory comes last, so a cut one is known at once; a
    DeepSpeed checkpoint is a folder.
    """
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        if path.is_dir() or zipfile.is_zipfile(path):
            return path
        warnings.warn(f"{path} is damaged; going on from the checkpoint before it", stacklevel=2)
    return None
