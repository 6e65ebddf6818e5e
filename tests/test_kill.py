"""The student's training killed with SIGKILL at twenty moments ends as if nothing had happened."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import Command, kill_in, run_alone

KILLS = {"step": 6, "write": 7, "validation": 7}
LENGTH = {"step": 0.02, "write": 0.15, "validation": 0.12}
"""Seconds that a phase takes at least."""
NUM_STEPS = 48


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.slow
def test_killed_student(tmp_path: Path, tiny_settings: Callable[[str, Path], list[str]]) -> None:
    """In a step, in a validation and in the middle of writing a checkpoint; with drop path, which draws random numbers,
    and an average of the weights. Checkpoints and validations are due at the same step every now and then."""
    marks, log = tmp_path / "marks", tmp_path / "log"

    def command(run_dir: str) -> Command:
        settings = [f"trainer.max_steps={NUM_STEPS}", "callbacks.checkpoint.every_n_train_steps=2"]
        settings += ["trainer.val_check_interval=3", "trainer.limit_val_batches=5", "~callbacks.panels"]
        settings += ["+model.encoder_args.drop_path_rate=0.3", "optim.ema_decay=0.9", "trainer.gradient_clip_val=1.0"]
        if run_dir == "cut":
            settings += ["+callbacks.phases._target_=faults.Phases", f"+callbacks.phases.path={marks}"]
        return "depthkit.train", [*tiny_settings("student", tmp_path / run_dir), *settings]

    assert run_alone(command("whole"), log)[0] == 0, log.read_text()[-3000:]
    rng = np.random.default_rng(5)
    died_in: Counter[str] = Counter()
    while any(died_in[phase] < count for phase, count in KILLS.items()):
        phase = str(rng.choice([phase for phase, count in KILLS.items() if died_in[phase] < count]))
        number, delay = int(rng.integers(1, 3)), rng.uniform(0, LENGTH[phase])
        died_in[kill_in(command("cut"), log, marks, phase, number=number, delay=delay)] += 1
        assert died_in["end"] == 0, f"the run is too short to be killed so often: {died_in}"
    assert died_in.total() >= 20
    assert run_alone(command("cut"), log)[0] == 0, log.read_text()[-3000:]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    weights = [run_dir / "bundle" / "model.safetensors" for run_dir in (whole, cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert [path.name for path in checkpoints(cut)] == [path.name for path in checkpoints(whole)]
    for paths in zip(checkpoints(whole), checkpoints(cut), strict=True):
        a, b = (torch.load(path, weights_only=False) for path in paths)
        assert all(torch.equal(a["state_dict"][name], value) for name, value in b["state_dict"].items())
        assert a.get("validation") == b.get("validation")
