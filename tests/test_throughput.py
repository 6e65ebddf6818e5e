"""Throughput: images a second over all ranks, and the share of the time that went into waiting."""

from types import SimpleNamespace
from typing import Any

import pytest

from depthkit.runtime import throughput
from depthkit.runtime.throughput import ThroughputMonitor

BATCH: Any = {"labeled": {"key": ["a"] * 2}, "unlabeled": {"key": ["a"] * 4}}


class Clock:
    """Stands for the module `time`, and goes when told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Run:
    """A trainer of four ranks that logs every second step; waiting and work take the seconds that a step says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(throughput, "time", self.clock)
        self.logged: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, values)))
        self.trainer: Any = SimpleNamespace(log_every_n_steps=2, world_size=4, loggers=[logger], global_step=0)
        self.module: Any = None
        self.monitor = ThroughputMonitor()
        self.monitor.on_train_start(self.trainer, self.module)

    def step(self, index: int, *, waiting: float, work: float) -> None:
        self.clock.now += waiting
        self.monitor.on_train_batch_start(self.trainer, self.module, BATCH, index)
        self.clock.now += work
        self.trainer.global_step = index + 1
        self.monitor.on_train_batch_end(self.trainer, self.module, None, BATCH, index)


def test_each_interval_is_measured_for_itself(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch)
    for index, waiting in enumerate((1.0, 2.0, 0.0, 0.0)):
        run.step(index, waiting=waiting, work=0.5)
    (first_step, first), (second_step, second) = run.logged
    assert (first_step, second_step) == (2, 4)
    # 12 images on each of four ranks in 4 seconds, 3 of which were spent waiting; then in one second.
    assert first["throughput/images_per_second"] == pytest.approx(12)
    assert first["throughput/data_wait"] == pytest.approx(0.75)
    assert second["throughput/images_per_second"] == pytest.approx(48)
    assert second["throughput/data_wait"] == 0


def test_validation_is_neither_work_nor_waiting(monkeypatch: pytest.MonkeyPatch):
    run = Run(monkeypatch)
    run.step(0, waiting=0.5, work=0.5)
    run.step(1, waiting=0.5, work=0.5)
    run.clock.now += 1000  # validation
    run.monitor.on_validation_end(run.trainer, run.module)
    run.step(2, waiting=0.5, work=0.5)
    run.step(3, waiting=0.5, work=0.5)
    first, second = (values for _, values in run.logged)
    assert second["throughput/images_per_second"] == pytest.approx(first["throughput/images_per_second"]) == 24
    assert second["throughput/data_wait"] == pytest.approx(0.5)
