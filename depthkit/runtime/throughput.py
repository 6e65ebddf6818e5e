"""How fast a run is, what it waits for, and what it has used."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from lightning.pytorch.profilers import Profiler


class DataWait(Profiler):
    """Counts the seconds in which the training loop waited for a batch; knows nothing else of a profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._since = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self._since = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._since


@dataclass(kw_only=True)
class Usage:
    """What a run has used over all its continuations; work that was lost in a crash and done again counts twice."""

    starts: int = 0
    seconds: float = 0.0  # wall clock
    device_seconds: float = 0.0  # wall clock x processes: one drives one device
    training_seconds: float = 0.0  # wall clock without validation
    waited_seconds: float = 0.0  # of the training seconds: waiting for data, mean over the processes
    images: int = 0  # trained on, over all processes
    flops: float = 0.0  # that the training needs, where the peak of the device is known
    peak_flops: float = 0.0  # that the devices could have done in the same time

    def rates(self) -> dict[str, float]:
        """Images per second, share of the training time spent waiting for data, and MFU where the peak is known.

        MFU (PaLM, Chowdhery et al. 2022, appendix B): FLOPs that the mathematics needs over those of the peak rate.
        """
        if self.training_seconds == 0:
            return {}
        rates = {
            "images_per_second": self.images / self.training_seconds,
            "data_wait": self.waited_seconds / self.training_seconds,
        }
        return rates | ({"mfu": self.flops / self.peak_flops} if self.peak_flops else {})

    def hours(self, device: torch.device, seconds_left: float = 0.0, processes: int = 0) -> dict[str, float]:
        """`gpu_hours`, or `process_hours` on CPUs; with a time left also those expected in all."""
        name = "process_hours" if device.type == "cpu" else "gpu_hours"
        expected = self.device_seconds + seconds_left * processes
        return {name: self.device_seconds / 3600} | ({f"{name}_expected": expected / 3600} if seconds_left else {})


def peak_memory_gib(device: torch.device) -> float:
    """The most memory in GiB that this process has had: on the GPU what PyTorch allocated, else what is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
