"""A rank that makes no progress ends the job, with the stacks of every rank, long before the time limit does."""

import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L

from depthkit.config import check

EXIT_CODE = 86
"""Of a process that the guard ends."""


class HangGuard(L.Callback):
    """Ends this process with `EXIT_CODE` when no batch was finished for `timeout` minutes.

    Before the first batch and while a checkpoint is written it waits `slow_timeout` minutes: the first step compiles,
    and large files take their time. The stacks of all threads go to `run_dir/hang/rank-N.txt` and to stderr. The other
    ranks wait for the one that hangs, so their guards find no progress either; a tenth of the timeout is left to them
    to write their stacks before the first process goes and the launcher kills the rest.

    A thread watches, so a batch costs nothing but reading the clock. Code that keeps hold of the interpreter stops that
    thread too: then `faulthandler`, which needs no interpreter, writes the stacks to stderr after `slow_timeout` and
    exits with 1.
    """

    def __init__(self, run_dir: str, timeout: float, slow_timeout: float) -> None:
        check(timeout > 0, "callbacks.hang.timeout", timeout, "> 0 (minutes)")
        check(slow_timeout >= timeout, "callbacks.hang.slow_timeout", slow_timeout, f">= timeout={timeout} (minutes)")
        self.folder = Path(run_dir) / "hang"
        self.timeout = 60 * timeout
        self.slow_timeout = 60 * slow_timeout
        self._deadline = 0.0
        self._last = "the start"
        self._rank = 0
        self._stop: threading.Event | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._rank = trainer.global_rank
        self._feed("the start", self.slow_timeout)
        if self._stop is None:
            self._stop = threading.Event()
            threading.Thread(target=self._watch, args=(self._stop,), name="hang guard", daemon=True).start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._feed(f"training batch {batch_idx}", self.timeout)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._feed(f"validation batch {batch_idx}", self.timeout)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._feed(f"beginning the checkpoint of step {trainer.global_step}", self.slow_timeout)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _feed(self, last: str, timeout: float) -> None:
        self._last = last
        self._deadline = time.monotonic() + timeout

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self, stop: threading.Event) -> None:
        pause = self.timeout / 20
        while not stop.wait(pause):
            faulthandler.dump_traceback_later(self.slow_timeout, exit=True, file=2)
            if time.monotonic() > self._deadline:
                self._dump()
                if not stop.wait(2 * pause):
                    os._exit(EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    def _dump(self) -> None:
        path = self.folder / f"rank-{self._rank:05d}.txt"
        message = f"rank {self._rank} hangs: nothing was done since {self._last}; the stacks of its threads:\n"
        os.write(2, f"{message.rstrip()} (also in {path})\n".encode())
        faulthandler.dump_traceback(file=2)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file=file)
            os.fsync(file.fileno())
