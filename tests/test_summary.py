"""`summary.json`: there from the first step on, summed over all continuations, whole whatever ends the run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from depthkit.runtime.summary import RunSummary, count_rejected, used_before
from depthkit.runtime.throughput import Usage
from depthkit.train import run

EVERY_3 = "callbacks.checkpoint.every_n_train_steps=3"


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


class At(L.Callback):
    """Does something when `step` steps are done."""

    def __init__(self, step: int, action) -> None:
        self.step = step
        self.action = action

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action(trainer)


def fail(trainer: L.Trainer) -> None:
    raise RuntimeError("the disk is gone")


def stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True


def test_a_finished_run(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, "trainer.val_check_interval=2")
    abs_rel = run(config)
    found = summary(tmp_path)
    assert (found["status"], found["stage"], found["seed"], found["steps"], found["starts"]) == (
        *("finished", "teacher", 0),
        *(6, 1),
    )
    assert found["samples_seen"] == found["usage"]["images"] == 36
    assert found["process_hours"] == pytest.approx(found["seconds"] / 3600)
    assert 0 < found["usage"]["training_seconds"] < found["seconds"]
    assert 0 <= found["data_wait"] < 1
    assert found["images_per_second"] == pytest.approx(36 / found["usage"]["training_seconds"])
    assert all(name.startswith("val/affine_disparity@") for name in found["metrics"])
    assert abs_rel in found["metrics"].values()
    assert Path(found["best_checkpoint"]["path"]).exists()
    assert found["best_checkpoint"]["metric"] in found["metrics"]
    assert found["versions"]["torch"]
    assert "mfu" not in found
    assert "gpu_hours" not in found


def test_continuations_add_up_with_the_work_that_was_lost(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, EVERY_3)
    with pytest.raises(RuntimeError):
        run(config, [At(5, fail)])
    first = summary(tmp_path)
    assert (first["status"], first["reason"]) == ("stopped", "RuntimeError: the disk is gone")
    assert (first["steps"], first["usage"]["images"]) == (5, 30)
    run(config)
    both = summary(tmp_path)
    assert (both["status"], both["starts"], both["samples_seen"]) == ("finished", 2, 36)
    assert "reason" not in both
    assert both["usage"]["images"] == 30 + 18  # from step 3 again
    assert both["seconds"] > first["seconds"]


def test_a_run_that_was_asked_to_stop(tiny_config, tmp_path):
    run(tiny_config("teacher", tmp_path), [At(4, stop)])
    assert (summary(tmp_path)["status"], summary(tmp_path)["steps"]) == ("stopped", 4)


def test_starting_over_counts_anew(tiny_config, tmp_path):
    run(tiny_config("teacher", tmp_path))
    run(tiny_config("teacher", tmp_path, "resume=never"))
    assert summary(tmp_path)["starts"] == 1
    assert summary(tmp_path / "before-1")["status"] == "finished"


@pytest.mark.slow
def test_a_killed_run_has_said_what_it_used(tiny_config, tiny_settings, tmp_path):
    settings = [*tiny_settings("teacher", tmp_path), "trainer.max_steps=100000"]
    command = [sys.executable, "-c", KILLED, "train", *settings]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 120
    while not (tmp_path / "summary.json").exists() or summary(tmp_path)["steps"] < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = summary(tmp_path)
    assert killed["status"] == "running"
    assert used_before(tmp_path / "summary.json") == Usage(**killed["usage"])
    assert killed["usage"]["images"] > 0


KILLED = """
import sys
import depthkit.runtime.summary
depthkit.runtime.summary.WRITE_EVERY = 0.0
from depthkit.__main__ import main
main()
"""


def test_a_damaged_summary_stops_nothing(tmp_path):
    path = tmp_path / "summary.json"
    assert used_before(path) == Usage()
    for text in ("{", "{}", '{"usage": {"hours": 3}}', "[]"):
        path.write_text(text)
        with pytest.warns(UserWarning, match="summary.json is not readable"):
            assert used_before(path) == Usage()


def test_broken_samples_are_counted_once(tmp_path):
    rows = [("a", "s0", "k0"), ("a", "s0", "k1"), ("b", "s0", "k0"), ("a", "s0", "k0")]
    for rank in range(2):
        lines = (json.dumps({"dataset": d, "shard": s, "key": k, "reason": "r"}) + "\n" for d, s, k in rows)
        (tmp_path / f"rank-{rank:05d}.jsonl").write_text("".join(lines))
    assert count_rejected(tmp_path) == {"a": 2, "b": 1}
    assert count_rejected(tmp_path / "none") == {}


def test_finish_is_the_last_thing(tiny_config, tmp_path, monkeypatch):
    """Not finished before the bundle is there."""
    seen = []
    original = RunSummary.write

    def write(self, trainer, **facts):
        seen.append((facts["status"], (tmp_path / "bundle").exists()))
        return original(self, trainer, **facts)

    monkeypatch.setattr(RunSummary, "write", write)
    run(tiny_config("teacher", tmp_path))
    assert seen[0] == ("running", False)
    assert seen[-1] == ("finished", True)
    assert ("finished", False) not in seen
