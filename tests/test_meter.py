"""What a run measures of itself: losses over all ranks, images a second, waiting, time left and what it has used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depthkit.config import DataConfig, DatasetConfig
from depthkit.runtime import meter as meter_module
from depthkit.runtime import throughput
from depthkit.runtime.curves import read_curves
from depthkit.runtime.meter import Meter
from depthkit.runtime.throughput import Usage
from depthkit.train import run

BATCH: Any = {"labeled": {"dataset": ["a", "a"]}}
NEXT = "[_TrainingEpochLoop].train_dataloader_next"


class Clock:
    """Stands for the module `time`, and goes when told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Run:
    """Four ranks alike, with batches of 8 images, that log every second step; waiting and work take what a step says.

    The optimizer goes on once in `accumulate` batches.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, accumulate: int = 1, start: int = 0, **arguments) -> None:
        self.clock = Clock()
        monkeypatch.setattr(throughput, "time", self.clock)
        monkeypatch.setattr(meter_module, "time", self.clock)
        self.logged: list[tuple[int, dict[str, float]]] = []
        logger = SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, values)), save=lambda: None)
        data = DataConfig(labeled={"a": DatasetConfig(manifest="-")}, batch_size=8)
        self.trainer: Any = SimpleNamespace(
            log_every_n_steps=2,
            max_steps=10,
            accumulate_grad_batches=accumulate,
            world_size=4,
            loggers=[logger],
            global_step=start,
            callback_metrics={},
            optimizers=[],
            datamodule=SimpleNamespace(config=data),
            strategy=SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda tensor: tensor.repeat(4, 1)),
        )
        self.meter = Meter(data, used=arguments.pop("used", Usage()), **arguments)
        self.meter.setup(self.trainer, None, "fit")
        self.meter.on_train_start(self.trainer, None)

    def step(self, index: int, *, waiting: float = 0.0, work: float = 0.5, loss: float = 0.0) -> None:
        self.trainer.profiler.start(NEXT)
        self.clock.now += waiting
        self.trainer.profiler.stop(NEXT)
        self.meter.on_train_batch_start(self.trainer, None, BATCH, index)
        self.clock.now += work
        self.trainer.global_step = (index + 1) // self.trainer.accumulate_grad_batches
        self.trainer.callback_metrics["loss"] = torch.tensor(loss)
        outputs: Any = {"loss": torch.tensor(-1.0), "image_losses": {"labeled": torch.tensor([loss, loss + 2])}}
        self.meter.on_train_batch_end(self.trainer, None, outputs, BATCH, index)

    @property
    def rows(self) -> list[dict[str, float]]:
        return [row for _, row in self.logged]


def test_each_interval_is_measured_for_itself(monkeypatch):
    run = Run(monkeypatch)
    for index, waiting in enumerate((1.0, 2.0, 0.0, 0.0)):
        run.step(index, waiting=waiting, loss=index)
    assert [step for step, _ in run.logged] == [2, 4]
    first, second = run.rows
    # 16 images over all four ranks in 4 seconds, 3 of which were spent waiting; then in one second.
    assert first["throughput/images_per_second"] == pytest.approx(4)
    assert first["throughput/data_wait"] == pytest.approx(0.75)
    assert second["throughput/images_per_second"] == pytest.approx(16)
    assert second["throughput/data_wait"] == 0
    assert [row["samples_seen"] for row in run.rows] == [16, 32]
    assert [row["loss"] for row in run.rows] == [0.5, 2.5]
    assert [row["loss/labeled"] for row in run.rows] == [1.5, 3.5]


def test_other_things_than_the_loader_are_no_waiting(monkeypatch):
    """A checkpoint is written between two batches."""
    run = Run(monkeypatch)
    run.step(0, waiting=0.5)
    run.clock.now += 8
    run.step(1, waiting=0.5)
    assert run.rows[0]["throughput/data_wait"] == pytest.approx(0.1)


def test_validation_is_neither_work_nor_waiting(monkeypatch):
    run = Run(monkeypatch)
    run.step(0, waiting=0.5)
    run.meter.on_validation_start(run.trainer, None)
    run.clock.now += 1000
    run.trainer.callback_metrics["val/p@1/abs_rel"] = torch.tensor(0.25)
    run.meter.on_validation_end(run.trainer, None)
    run.step(1, waiting=0.5)
    validated, row = run.rows
    assert validated == {"val/p@1/abs_rel": 0.25, "samples_seen": 8}
    assert row["throughput/images_per_second"] == pytest.approx(8)
    assert row["throughput/data_wait"] == pytest.approx(0.5)
    assert "val/p@1/abs_rel" not in row


def test_the_same_validation_is_logged_once(monkeypatch):
    run = Run(monkeypatch)
    run.trainer.callback_metrics["val/p@1/abs_rel"] = torch.tensor(0.25)
    for _ in range(2):
        run.meter.on_validation_start(run.trainer, None)
        run.meter.on_validation_end(run.trainer, None)
    assert len(run.logged) == 1


def test_accumulated_batches_are_one_step(monkeypatch):
    run = Run(monkeypatch, accumulate=2)
    for index in range(8):
        run.step(index, loss=float(index))
    assert [(step, row["samples_seen"]) for step, row in run.logged] == [(2, 32), (4, 64)]
    assert [row["loss"] for row in run.rows] == [1.5, 5.5]
    assert run.rows[0]["throughput/images_per_second"] == pytest.approx(16)


def test_time_left_after_a_restart_counts_the_steps_that_are_left(monkeypatch):
    run = Run(monkeypatch, start=6)
    assert run.meter.seconds_left(run.trainer) is None
    run.step(6, work=100.0)  # the first one compiles
    assert run.meter.seconds_left(run.trainer) is None
    run.step(7, work=2.0)
    assert run.meter.seconds_left(run.trainer) == pytest.approx(4.0)
    run.step(8, work=4.0)
    assert run.meter.seconds_left(run.trainer) == pytest.approx(3.0)


def test_usage_goes_on_from_what_was_used_before(monkeypatch):
    used = Usage(starts=2, seconds=1000.0, device_seconds=3000.0, training_seconds=500.0, images=4000)
    run = Run(monkeypatch, used=used)
    for index in range(2):
        run.step(index)
    usage = run.meter.usage_now(processes=4)
    assert (usage.starts, usage.seconds, usage.device_seconds) == (3, 1001.0, 3004.0)
    assert (usage.training_seconds, usage.images) == (501.0, 4016)
    row = run.rows[0]
    assert row["throughput/process_hours"] == pytest.approx(3004 / 3600)
    assert row["throughput/process_hours_expected"] == pytest.approx((3004 + 4 * 8 * 0.5) / 3600)


def test_what_is_left_of_the_last_interval_counts_too(monkeypatch):
    run = Run(monkeypatch)
    for index in range(3):
        run.step(index)
    run.meter.on_train_end(run.trainer, None)
    assert run.meter.usage_now(4).images == 24


def test_mfu_is_what_the_mathematics_needs_over_what_the_devices_could_do(monkeypatch):
    run = Run(monkeypatch, batch_flops=1e12, peak_flops=2e12)
    run.step(0, work=0.5)
    run.step(1, work=1.5)
    assert run.rows[0]["throughput/mfu"] == pytest.approx(2e12 / (2.0 * 4 * 2e12))
    assert "throughput/mfu" not in Run(monkeypatch).meter.usage.rates()


# --- real runs -------------------------------------------------------------------------------------------------------


def test_nothing_is_read_from_the_device_between_two_rows(tiny_config, tmp_path, monkeypatch):
    reads = []
    for name in ("item", "tolist", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *arguments, original=original):
            reads.append(sys._getframe(1).f_code.co_filename)
            return original(tensor, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    run(tiny_config("student", tmp_path, "trainer.log_every_n_steps=3", "~callbacks"))
    ours = [Path(name).name for name in reads if "depthkit/runtime" in name or "depthkit/stages" in name]
    assert ours.count("loss_means.py") == 2 * 4  # the loss and three parts, for each of two rows
    assert not [name for name in reads if "logger_connector" in name and "result" in name]


def test_rates_are_those_of_the_step(tiny_config, tmp_path):
    run(tiny_config("teacher", tmp_path, "optim.encoder_lr=0.006"))
    rows = read_curves(tmp_path / "csv" / "metrics.csv")
    assert [row["lr/encoder"] for row in rows] == pytest.approx([0.006, 0.005, 0.004, 0.003, 0.002, 0.001])
    assert [row["lr/decoder"] for row in rows] == pytest.approx([10 * row["lr/encoder"] for row in rows])


@pytest.mark.slow
def test_two_ranks_log_the_mean_of_both_once(tiny_config, tiny_settings, tmp_path):
    settings = ["data.batch_size=12", "optim.encoder_lr=1e-5", "trainer.log_every_n_steps=2"]
    run(tiny_config("student", tmp_path / "one", *settings))
    command = [sys.executable, "-m", "depthkit", "train", *tiny_settings("student", tmp_path / "two"), *settings]
    command += ["trainer.devices=2", "trainer.strategy=ddp", "logger=wandb"]
    environment = {"OMP_NUM_THREADS": "1", "WANDB_SILENT": "true", "WANDB_MODE": "offline"}
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env=os.environ | environment, timeout=300)
    one, two = (read_curves(tmp_path / name / "csv" / "metrics.csv") for name in ("one", "two"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [2, 4, 6]
    names = [name for name in one[0] if name.startswith(("loss", "samples_seen"))]
    assert "loss/unlabeled/target" in names
    for expected, found in zip(one, two, strict=True):
        assert {name: found[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-3
        )
    assert len(list((tmp_path / "two").glob("wandb/offline-run-*"))) == 1
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["devices"] == "2 x cpu"
    assert summary["process_hours"] == pytest.approx(2 * summary["seconds"] / 3600)
    assert summary["usage"]["images"] == summary["samples_seen"] == 72
