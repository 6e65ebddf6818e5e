"""A rank that hangs: the job ends in time, and every rank has written its stacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from depthkit.config import ConfigError
from depthkit.runtime.hang import EXIT_CODE, HangGuard

TESTS = Path(__file__).parent
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}


def start(script: str, tmp_path: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


GUARDED = """
import ctypes, sys, time
from types import SimpleNamespace
from depthkit.runtime.hang import HangGuard

def working():
    time.sleep(0.5)

def hanging():
    time.sleep(1000)

def keeping_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)

run_dir, *acts = sys.argv[1:]
guard = HangGuard(run_dir, timeout=2 / 60, slow_timeout=5 / 60)
trainer = SimpleNamespace(global_rank=3, global_step=0)
guard.setup(trainer, None, "fit")
for number, act in enumerate(acts):
    if act == "save":
        guard.on_save_checkpoint(trainer, None, {})
        time.sleep(2.5)
    elif act == "stop":
        guard.teardown(trainer, None, "fit")
    else:
        globals()[act]()
        guard.on_train_batch_end(trainer, None, None, None, number)
"""


@pytest.mark.slow
def test_hang_ends_with_the_stack_in_a_file_and_on_stderr(tmp_path):
    process = start(GUARDED, tmp_path, "working", "working", "hanging")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE
    text = (tmp_path / "hang" / "rank-00003.txt").read_text()
    assert text.startswith("rank 3 hangs: nothing was done since training batch 1;")
    for stacks in (text, errors):
        assert "in hanging" in stacks
        assert "in working" not in stacks


@pytest.mark.slow
def test_progress_a_checkpoint_and_the_end_are_no_hang(tmp_path):
    """Longer than the timeout in all, but never without a batch or a reason."""
    process = start(GUARDED, tmp_path, *["working"] * 5, "save", "working", "stop", *["working"] * 6)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not (tmp_path / "hang").exists()


@pytest.mark.slow
def test_code_that_keeps_hold_of_the_interpreter(tmp_path):
    process = start(GUARDED, tmp_path, "working", "keeping_the_interpreter")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "in keeping_the_interpreter" in errors


def test_wrong_times_are_refused():
    with pytest.raises(ConfigError, match=r"callbacks\.hang\.slow_timeout=1.*timeout=2"):
        HangGuard("run", timeout=2, slow_timeout=1)


RANKS = """
import os, sys, time
import lightning as L
import depthkit.train
from depthkit.hydra_entry import hydra_main

class Hang(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == 1:
            self.wait_for_ever()

    def wait_for_ever(self):
        time.sleep(1000)

# Lightning repeats the command with the verb for the second rank.
hydra_main("train", [item for item in sys.argv[1:] if item != "train"], lambda c: depthkit.train.run(c, [Hang()]))
"""


@pytest.mark.slow
def test_one_of_two_ranks_hangs_and_both_say_where(tiny_settings, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RANKS)
    run_dir = tmp_path / "run"
    settings = [*tiny_settings("teacher", run_dir), "trainer.devices=2", "trainer.strategy=ddp"]
    settings += ["callbacks.hang.timeout=0.2", "callbacks.hang.slow_timeout=3"]
    process = subprocess.run(
        [sys.executable, script, *settings], cwd=tmp_path, env=ENVIRONMENT, timeout=400, capture_output=True, text=True
    )
    assert process.returncode != 0
    stacks = [path.read_text() for path in sorted((run_dir / "hang").iterdir())]
    assert len(stacks) == 2
    assert ["wait_for_ever" in stack for stack in stacks] == [False, True]
    assert all(f"rank {rank} hangs: nothing was done since training batch 1" in stacks[rank] for rank in (0, 1))
    assert all("training_epoch_loop" in stack for stack in stacks)
