"""Preemption: save, hand the job back to Slurm, and go on from the same step.

A signal only leaves a note. Saving inside a handler would interrupt one rank in the middle of a step and wait there for
others that are somewhere else; so the ranks agree at the end of a batch, and all of them save.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.trainer.states import TrainerFn

from depthkit.runtime.checkpoint import save_now

BY_SLURM = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Before the time limit: what `--signal` says, by submitit USR2. Preemption: TERM."""
SIGNALS = (*BY_SLURM, signal.SIGINT)
EXIT_INTERRUPTED = 175
"""Exit code of a run that saved and did not end: the same command goes on. It is above those of processes that a signal
killed (128 + number), because `srun` hands on the highest one of its tasks."""
MAX_WAIT = 300.0
"""Seconds for Slurm to end a job that it took back."""


class Requeue(Checkpoint):
    """Saves after SIGUSR1, SIGUSR2, SIGTERM or Ctrl-C, and ends the run; under Slurm the job is queued again.

    Looks at the end of each optimizer step and of each validation image, after all other callbacks. A validation that
    was cut short is not repeated. Ctrl-C a second time ends at once.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._group: Any = None
        self._num_val_batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Until `_listen`, Lightning's own handler is in place, which talks to the other ranks.
        signal.pthread_sigmask(signal.SIG_BLOCK, BY_SLURM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)
        # Lightning asks in every step whether its handler saw a SIGTERM, and waits for the accelerator to do so.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen(trainer)
        # One rank may have an image more than another.
        self._num_val_batches = -self._max_over_ranks(trainer, -int(sum(trainer.num_val_batches)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._look(trainer)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx < self._num_val_batches:
            self._look(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop_listening()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop_listening()

    def _listen(self, trainer: L.Trainer) -> None:
        if self._old:
            return
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")  # talks without the accelerator
        self._old = {number: signal.signal(number, self._note) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BY_SLURM)

    def _stop_listening(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BY_SLURM)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._old[signal.SIGINT])

    def _max_over_ranks(self, trainer: L.Trainer, value: int) -> int:
        if trainer.world_size == 1:
            return value
        values = torch.tensor(value)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(values)

    def _look(self, trainer: L.Trainer) -> None:
        number = self._max_over_ranks(trainer, self._received or 0)
        if number:
            self._leave(trainer, signal.Signals(number).name)

    def _leave(self, trainer: L.Trainer, name: str) -> None:
        """Save, and do not come back."""
        path = save_now(trainer) if trainer.state.fn == TrainerFn.FITTING else None
        self._received = None
        is_left_to_slurm = trainer.strategy.broadcast(trainer.is_global_zero and hand_back(f"{name}: saved {path}"))
        if is_left_to_slurm:
            close(trainer)
            self._wait_to_be_killed()
        raise SystemExit(EXIT_INTERRUPTED if trainer.is_global_zero else 0)

    def _wait_to_be_killed(self) -> None:
        """Running on would tell whoever waits for this run's result that it failed."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's: it raises when a worker is killed
        end = time.monotonic() + MAX_WAIT
        while time.monotonic() < end:
            if self._received == signal.SIGTERM:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)


def close(trainer: L.Trainer) -> None:
    """Let the loggers write what they hold."""
    for logger in trainer.loggers:
        logger.save()
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()


def slurm_environment() -> list[SLURMEnvironment]:
    """The Trainer's plugin under Slurm, without Lightning's own handler of signals: that one can lock up in short
    steps, and loses the run on SIGTERM."""
    is_used = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if is_used else []


def job_id() -> str | None:
    """This Slurm job, or this task of a job array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{task}"


def hand_back(done: str) -> bool:
    """Have Slurm start this job again, and say on stderr what comes after `done`; whether Slurm is about to end it.

    A job that was cancelled, or that Slurm has begun to queue again after a preemption, is left as it is.
    """
    job, is_ending = job_id(), False
    if job is None:
        then = "the same command goes on from there"
    elif shutil.which("scontrol") is None:
        then = f"no scontrol here to start job {job} again; exit code {EXIT_INTERRUPTED} asks the batch script for it"
    elif is_ending := "JobState=RUNNING" not in scontrol("show", "job", job).stdout:
        then = f"Slurm is ending job {job}, and knows whether to start it again"
    else:
        asked = scontrol("requeue", job)
        is_ending = asked.returncode <= 0  # below 0: killed, by the very end of the job that was asked for
        error = asked.stderr.strip()
        then = f"Slurm starts job {job} again" if is_ending else f"job {job} is not started again: {error}"
    print(f"{done}; {then}", file=sys.stderr, flush=True)
    return is_ending


def scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True)
