"""Writing checkpoints whole, and finding the one to go on from."""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from depthkit.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints get their name when they are on disk: Lightning's own copies them there, and leaves half of one on a
    full disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)


def save_now(trainer: L.Trainer) -> Path:
    """A checkpoint of this step in the run's folder, where `newest_checkpoint` finds it. Every rank calls it."""
    callback = trainer.checkpoint_callback
    assert isinstance(callback, ModelCheckpoint)
    path = Path(str(callback.dirpath)) / f"{trainer.global_step:08d}.ckpt"
    if not trainer.strategy.broadcast(path.exists()):
        trainer.save_checkpoint(path)
    return path


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
