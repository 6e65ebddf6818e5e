"""What a person sees of a running training: a bar on a terminal, a line from time to time in the log of a job."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from depthkit.runtime.meter import Meter, val_metrics

LINE_EVERY = 30.0
"""Seconds between two lines where there is no terminal; the first and the last row always have one."""


class RunProgress(ProgressBar):
    """Shows the steps of the whole run, the time left, and the newest row of the meter, on the first rank alone.

    `heading` is printed when training starts. It reads what the meter measured, so it never waits for the device.
    """

    def __init__(self, heading: Sequence[str], meter: Meter) -> None:
        super().__init__()
        self.heading = heading
        self.meter = meter
        self._console = Console()
        self._enabled = True
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._shown = meter.row
        self._last_line = -LINE_EVERY

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *words: object, **_: object) -> None:
        if self._enabled:
            self._console.print(*words, markup=False, highlight=False, soft_wrap=True)
            self._console.file.flush()

    # --- training ----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.print("\n".join(self.heading))
        if self._enabled and self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, auto_refresh=False)
            self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)
            self._live = Live(self._bar, console=self._console, refresh_per_second=2)
            self._live.start()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        is_new, row = self.meter.row is not self._shown, self.meter.row
        self._shown = row
        left = describe_time_left(self.meter.seconds_left(trainer))
        if self._bar is not None and self._live is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, description=left)
            if is_new:
                self._live.update(Group(self._bar, Text(describe(row))))
        elif is_new and self._is_line_due(trainer):
            self._last_line = time.monotonic()
            self.print(f"step {trainer.global_step}/{trainer.max_steps}: {describe(row)}, {left}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = val_metrics(trainer)
        if metrics and trainer.state.fn == "fit":  # those of the bundle are in the summary
            self.print(f"step {trainer.global_step}/{trainer.max_steps}: {describe_metrics(metrics)}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _is_line_due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step == trainer.max_steps or time.monotonic() - self._last_line >= LINE_EVERY

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = None


# --- words -----------------------------------------------------------------------------------------------------------


def describe(row: Mapping[str, float]) -> str:
    """A row of the meter in one line: the loss and its parts, speed, waiting, memory, hours so far and expected."""
    parts = {name.removeprefix("loss/"): value for name, value in row.items() if name.startswith("loss/")}
    parts = {part: value for part, value in parts.items() if "/" not in part}
    shown = ", ".join(f"{part} {value:.4g}" for part, value in parts.items()) if len(parts) > 1 else ""
    values = {name.removeprefix("throughput/"): value for name, value in row.items()}
    words = [f"loss {row['loss']:.4g}" + (f" ({shown})" if shown else "")]
    words += [text.format(values[name]) for name, text in WORDS.items() if name in values]
    for name in ("gpu_hours", "process_hours"):
        if f"{name}_expected" in values:
            words.append(f"{values[name]:.3g} of {values[f'{name}_expected']:.3g} {name.replace('_', '-')}")
    return ", ".join(words)


WORDS = {
    "images_per_second": "{:.1f} images/s",
    "data_wait": "{:.0%} waiting for data",
    "mfu": "MFU {:.1%}",
    "peak_memory_gib": "{:.1f} GiB",
    "peak_host_memory_gib": "{:.1f} GiB",
}
"""Number of a row, or of the summary -> how it reads."""


def describe_time_left(seconds: float | None) -> str:
    return "time left not known yet" if seconds is None else f"{timedelta(seconds=round(seconds))} left"


def describe_metrics(metrics: Mapping[str, float]) -> str:
    """Metrics `val/PROTOCOL/NAME` in one line, which names each protocol once."""
    by_protocol: dict[str, list[str]] = {}
    for name, value in metrics.items():
        _, protocol, metric = name.split("/", 2)
        by_protocol.setdefault(protocol, []).append(f"{metric} {value:.4g}")
    return "; ".join(f"{protocol}: {', '.join(values)}" for protocol, values in by_protocol.items())
