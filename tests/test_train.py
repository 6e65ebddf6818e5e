"""A run as a user sees it: interrupted, continued, refused, finished."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from depthkit.bundle import read_facts
from depthkit.config import ConfigError, TrainConfig
from depthkit.train import run

CHECKPOINT_EVERY_3 = "callbacks.checkpoint.every_n_train_steps=3"


class Losses(L.Callback):
    """Keeps the loss of every step, by the number of the step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.by_step[trainer.global_step] = float(outputs["loss"])


class DieAt(L.Callback):
    """Ends the process, as far as a test can, when `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def train(config: TrainConfig, *callbacks: L.Callback) -> dict[int, float]:
    """Run, and return the losses by step."""
    losses = Losses()
    run(config, [losses, *callbacks])
    return losses.by_step


def train_and_die(config: TrainConfig, step: int) -> dict[int, float]:
    losses = Losses()
    with pytest.raises(SystemExit):
        run(config, [losses, DieAt(step)])
    return losses.by_step


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "bundle" / "model.safetensors")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("stage", ["pretrain", "teacher", "student"])
def test_killed_and_continued_run_equals_the_uninterrupted_one(tiny_config, tmp_path, stage, num_workers):
    settings = [CHECKPOINT_EVERY_3, f"data.num_workers={num_workers}"]
    whole = train(tiny_config(stage, tmp_path / "whole", *settings))
    cut = tiny_config(stage, tmp_path / "cut", *settings)
    before = train_and_die(cut, 5)
    after = train(cut)

    assert list(whole) == [1, 2, 3, 4, 5, 6]
    assert len(set(whole.values())) == 6
    assert before == {step: whole[step] for step in (1, 2, 3, 4, 5)}
    assert after == {step: whole[step] for step in (4, 5, 6)}
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
