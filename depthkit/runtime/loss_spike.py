"""Steps whose loss lies far above that of the steps before: written down, nothing else."""

from collections import deque

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from depthkit.config import check
from depthkit.runtime.bad_steps import Step, StepWatcher

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution relative to its median absolute deviation."""
SMALLEST_DEVIATION = 0.1
"""Relative to the median: a loss that hardly varies would make every wobble a spike."""


class LossSpikes(StepWatcher):
    """Reports a step in `run_dir/bad_steps` when its loss on this rank is above `median + threshold * deviation`.

    Both are of the last `window` steps, and robust against the spikes among them: deviation = 1.4826 times the median
    absolute deviation, or a tenth of the median where that is more. A tenth makes the default threshold of 10 the
    doubled median at least, which is where llm-foundry's monitor draws its line. Each rank judges its own images; at
    most `max_reports` are written by each. A loss that is not finite is not judged here.
    """

    def __init__(self, run_dir: str, window: int, threshold: float, max_reports: int) -> None:
        super().__init__(run_dir)
        check(window >= 2, "callbacks.loss_spikes.window", window, ">= 2 (steps)")
        check(threshold > 0, "callbacks.loss_spikes.threshold", threshold, "> 0 (deviations)")
        check(max_reports >= 0, "callbacks.loss_spikes.max_reports", max_reports, ">= 0 (files)")
        self.threshold = threshold
        self.max_reports = max_reports
        self.num_reports = 0
        self.losses: deque[float] = deque(maxlen=window)

    def measure(self, trainer: L.Trainer, losses: Tensor) -> Tensor:
        return losses.sum()[None]

    def judge(self, trainer: L.Trainer, step: Step, numbers: list[float]) -> None:
        (loss,) = numbers
        if not np.isfinite(loss):
            return
        is_judged = len(self.losses) == self.losses.maxlen and self.num_reports < self.max_reports
        if is_judged and loss > spike_limit(self.losses, self.threshold):
            self.num_reports += 1
            median = float(np.median(self.losses))
            path = self.report(trainer, step, "the loss spikes", loss=loss, median=median)
            rank_zero_warn(
                f"step {step.number}: loss {loss:.4g}, median {median:.4g} before; its samples are in {path}"
            )
        self.losses.append(loss)


def spike_limit(losses: deque[float], threshold: float) -> float:
    """`median + threshold * deviation` of the losses."""
    values = np.array(losses)
    median = np.median(values)
    deviation = MAD_TO_DEVIATION * np.median(np.abs(values - median))
    return float(median + threshold * max(deviation, SMALLEST_DEVIATION * abs(median)))
