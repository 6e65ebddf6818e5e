"""What a person sees: a bar on a terminal, lines in a log, and what a run will do before it begins."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from depthkit.reporting import heading
from depthkit.runtime import console
from depthkit.runtime.console import RunProgress, describe, describe_metrics, describe_time_left
from depthkit.train import run

ROW = {
    "loss": 0.51,
    "loss/labeled": 0.4,
    "loss/unlabeled": 0.62,
    "loss/labeled/hypersim": 0.4,
    "samples_seen": 100.0,
    "throughput/images_per_second": 98.76,
    "throughput/data_wait": 0.034,
    "throughput/mfu": 0.412,
    "throughput/peak_memory_gib": 61.25,
    "throughput/gpu_hours": 1.5,
    "throughput/gpu_hours_expected": 12.25,
}


def test_a_row_in_words():
    assert describe(ROW) == (
        "loss 0.51 (labeled 0.4, unlabeled 0.62), 98.8 images/s, 3% waiting for data, MFU 41.2%, 61.2 GiB, "
        "1.5 of 12.2 gpu-hours"
    )
    assert describe({"loss": 0.4, "loss/labeled": 0.4}) == "loss 0.4"


def test_metrics_name_their_protocol_once():
    metrics = {"val/p@1/abs_rel": 0.1, "val/p@1/delta1": 0.9, "val/q@2/abs_rel": 0.2}
    assert describe_metrics(metrics) == "p@1: abs_rel 0.1, delta1 0.9; q@2: abs_rel 0.2"


def test_time_left_in_words():
    assert describe_time_left(None) == "time left not known yet"
    assert describe_time_left(90061.4) == "1 day, 1:01:01 left"


class Shown:
    """A progress over a meter that says what it is told, with what was printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, terminal: bool, start: int = 0) -> None:
        self.now = 1000.0
        monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.file = io.StringIO()
        self.meter: Any = SimpleNamespace(row={}, seconds_left=lambda trainer: 10.0 * (100 - trainer.global_step))
        self.progress = RunProgress(["what it will do"], self.meter)
        self.progress._console = Console(file=self.file, force_terminal=terminal, width=100)
        self.trainer: Any = SimpleNamespace(
            global_step=start, max_steps=100, callback_metrics={}, state=SimpleNamespace(fn="fit"), is_global_zero=True
        )
        self.progress.setup(self.trainer, None, "fit")
        self.progress.on_train_start(self.trainer, None)

    def step(self, step: int, *, seconds: float, logs: bool = True) -> None:
        self.now += seconds
        self.trainer.global_step = step
        if logs:
            self.meter.row = {"loss": step / 100}
        self.progress.on_train_batch_end(self.trainer, None, None, None, step - 1)


def test_lines_come_with_the_rows_but_not_more_often_than_every_30_seconds(monkeypatch):
    shown = Shown(monkeypatch, terminal=False)
    for step in range(1, 101):
        shown.step(step, seconds=2.0, logs=step % 10 == 0)  # a row every 20 seconds
    heading, *lines = shown.file.getvalue().splitlines()
    assert heading == "what it will do"
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [10, 30, 50, 70, 90, 100]
    assert lines[1] == "step 30/100: loss 0.3, 0:11:40 left"


def test_a_bar_on_a_terminal_goes_on_at_the_restored_step(monkeypatch):
    shown = Shown(monkeypatch, terminal=True, start=60)
    assert shown.progress._bar.tasks[0].completed == 60
    shown.step(61, seconds=1.0)
    task = shown.progress._bar.tasks[0]
    assert (task.completed, task.total, task.description) == (61, 100, "0:06:30 left")
    shown.progress.on_train_end(shown.trainer, None)
    text = shown.file.getvalue()
    assert " 61/100" in text
    assert "loss 0.61" in text


def test_other_ranks_show_nothing(monkeypatch):
    shown = Shown(monkeypatch, terminal=False)
    shown.file.truncate(0)
    shown.trainer.is_global_zero = False
    shown.progress.setup(shown.trainer, None, "fit")
    shown.progress.on_train_start(shown.trainer, None)
    shown.step(10, seconds=100.0)
    assert shown.file.getvalue().strip("\0") == ""


def test_the_arithmetic_of_a_run(tiny_config, tmp_path):
    from depthkit.train import STAGES

    config = tiny_config("student", tmp_path, "trainer.accumulate_grad_batches=2", "trainer.max_steps=12")
    module = STAGES[type(config.stage)](config)
    first, steps, model, devices = heading(config, module)
    assert str(tmp_path) in first
    # 24 labeled and 24 unlabeled images; 2 + 4 in a batch
    assert "12 steps of 4 labeled + 8 unlabeled images of 32 x 32 = 2 batches" in steps
    assert steps.endswith("2 sweeps of the labeled images, 4 sweeps of the unlabeled images")
    frozen = sum(parameter.numel() for parameter in module.frozen_encoder.parameters()) / 1e6
    assert f"{frozen:.2f} M frozen" in model
    assert devices == "  1 x cpu, strategy auto, precision 32-true"


def test_a_run_in_a_pipe(tiny_config, tmp_path, capsys):
    settings = ["trainer.enable_progress_bar=true", "trainer.val_check_interval=3", "run_name=seen"]
    run(tiny_config("teacher", tmp_path, *settings))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"seen: stage teacher, seed 0, in {tmp_path}"
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 1/6", "step 3/6"] + 2 * [
        "step 6/6"
    ]
    assert "finished: 6 steps, 36 images" in " ".join(lines)
    assert lines[-1].strip() == str(tmp_path / "summary.json")
