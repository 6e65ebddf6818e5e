"""Checkpoints of a run: written whole, looked over before they are used, the newest few and the best kept."""

import math
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from depthkit.files import atomic_write
from depthkit.metrics import METRICS
from depthkit.runtime import sharded_checkpoint

FACTS = "depthkit"
"""What `RunFacts` writes into a checkpoint lies under this key."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints get their name when they are on disk: Lightning's own copies them there, and leaves half of one on a
    full disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(
                f"{path} could not be written: {reason}. The checkpoints before it are whole: "
                "the same command goes on from the newest of them"
            ) from error


class Checkpoints(Checkpoint):
    """Keeps the newest `keep` checkpoints, `STEP.ckpt`, and the one of the best validation so far, `best-STEP.ckpt`.

    One is written every `every_n_train_steps` optimizer steps; where that step is validated, after it, so that a
    restart leaves out no validation. The best is by the mean of `best_metric`, one of `protocol.metrics`, under the
    run's protocol. A new one is on disk before an old one is removed: there is need of disk for keep + 2.
    """

    def __init__(self, folder: str, *, every_n_train_steps: int, keep: int = 2, best_metric: str = "abs_rel") -> None:
        if every_n_train_steps < 1 or keep < 1 or best_metric not in METRICS:
            raise ValueError(
                f"callbacks.checkpoint.every_n_train_steps={every_n_train_steps}, keep={keep}, "
                f"best_metric={best_metric}: must be > 0, > 0 and one of {list(METRICS)}"
            )
        self.folder = Path(folder)
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.best_metric = best_metric
        self.best_model_path = ""
        self.best_model_score: float | None = None
        self._saved_at = -1
        self._validation: dict[str, Any] | None = None

    def save(self, trainer: L.Trainer) -> Path:
        """The checkpoint of this step. Every rank calls it."""
        path = self.folder / f"{trainer.global_step:08d}.ckpt"
        if self._saved_at != trainer.global_step or not trainer.strategy.broadcast(path.exists()):
            trainer.save_checkpoint(path)
            self._saved_at = trainer.global_step
            if trainer.is_global_zero:
                for old in steps_of(self.folder, up_to=trainer.global_step)[: -self.keep]:
                    remove(old)
        return path

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step
        best = best_before(self.folder, trainer.global_step, self.best_metric) if trainer.is_global_zero else None
        self.best_model_path, self.best_model_score = trainer.strategy.broadcast(best) or ("", None)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        num_batches, interval = trainer.fit_loop.total_batch_idx + 1, trainer.val_check_batch
        validates = sum(trainer.num_val_batches) > 0 and interval is not None and num_batches % interval == 0
        if not validates:
            self._save_when_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_best(trainer)
            self._save_when_due(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._validation is not None:
            checkpoint["validation"] = self._validation

    def _save_when_due(self, trainer: L.Trainer) -> None:
        if trainer.global_step % self.every_n_train_steps == 0 and trainer.global_step != self._saved_at:
            self.save(trainer)

    def _save_if_best(self, trainer: L.Trainer) -> None:
        found = {name: value for name, value in trainer.callback_metrics.items() if is_metric(name, self.best_metric)}
        if not found:
            return
        ((name, tensor),) = found.items()
        value = float(tensor)
        sign = 1 if METRICS[self.best_metric].is_lower_better else -1
        is_better = self.best_model_score is None or sign * value < sign * self.best_model_score
        if not (math.isfinite(value) and is_better):
            return
        path = self.folder / f"best-{trainer.global_step:08d}.ckpt"
        self._validation = {"metric": name, "value": value}
        trainer.save_checkpoint(path)
        self._validation = None
        self.best_model_path, self.best_model_score = str(path), value
        if trainer.is_global_zero:
            for old in self.folder.glob("best-*.ckpt"):
                if old != path:
                    remove(old)


class RunFacts(L.Callback):
    """Writes into every checkpoint what it belongs to: `facts()` and the position in the data and the random numbers.

    Both are given by the number of the next batch: batches, and the seeds of `SeedBatches`, are functions of it.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self.collect = facts
        self._facts: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._facts is None:  # at the first one, when every data set is on disk
            self._facts = self.collect()
        position = {"step": trainer.global_step, "next_batch": trainer.global_step * trainer.accumulate_grad_batches}
        checkpoint[FACTS] = self._facts | position | {"world_size": trainer.world_size}


def save_now(trainer: L.Trainer) -> Path:
    """A checkpoint of this step in the run's folder, where `newest_checkpoint` finds it. Every rank calls it, between
    two optimizer steps: gradients that are being accumulated are in no checkpoint."""
    (callback,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    return callback.save(trainer)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`; a damaged one is named and passed over. None when there is none."""
    for path in reversed(steps_of(folder)):
        if is_whole(path):
            return path
        warnings.warn(f"{path} is damaged; going on from the checkpoint before it", stacklevel=2)
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be trusted: a file has the checksums that were written with it. Torch reads one with
    flipped bits without a word. Reading 1.3 GB for it takes 0.4 s from memory, about half of what loading it takes.

    A folder holds the parts of all ranks, which one rank does not read: they are there, with their sizes.
    """
    if path.is_dir():
        return sharded_checkpoint.is_whole(path)
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        torch.load(path, map_location="cpu", mmap=True, weights_only=False)  # finds every tensor
    except Exception:  # whatever the bits say
        return False
    return damaged is None


def read_facts(path: Path) -> dict[str, Any]:
    """What `RunFacts` and the best validation say in a checkpoint, without reading its tensors; empty for a file that
    no run of ours wrote."""
    file = min(path.rglob("*mp_rank_00_model_states.pt")) if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    facts: dict[str, Any] = checkpoint.get(FACTS, {})
    return facts | {"validation": checkpoint.get("validation")} if facts else {}


def best_before(folder: Path, step: int, metric: str) -> tuple[str, float] | None:
    """Path and score of the best checkpoint by a metric, unless it is of a later step than `step`: then it is found
    again."""
    for path in sorted(folder.glob("best-*.ckpt"), reverse=True):
        if int(path.stem.removeprefix("best-")) <= step and is_whole(path):
            validation = read_facts(path)["validation"]
            if is_metric(validation["metric"], metric):
                return str(path), float(validation["value"])
    return None


def steps_of(folder: Path, *, up_to: float = math.inf) -> list[Path]:
    """The checkpoints `STEP.ckpt` of a folder, oldest first."""
    numbered = [path for path in folder.glob("*.ckpt") if path.stem.isdecimal() and int(path.stem) <= up_to]
    return sorted(numbered, key=lambda path: int(path.stem))


def is_metric(name: str, metric: str) -> bool:
    """Whether a logged name is that of a metric under some protocol: `val/PROTOCOL/METRIC`."""
    return name.startswith("val/") and name.endswith(f"/{metric}")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
