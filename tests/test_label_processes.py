"""Several labelling processes on one folder, killed and paused."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_label_storage import Label, assert_complete, tars, write_images

from depthkit.label import label


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three shards of four."""
    return write_images(tmp_path / "images", 3)


@pytest.fixture
def run_label(compose: Any, tiny_teacher: Path) -> Label:
    def run(images: Path, out: Path, *overrides: str) -> Path:
        settings = [f"stage.bundle={tiny_teacher}", f"stage.images={images}", f"stage.out={out}", "stage.batch_size=2"]
        settings += ["stage.num_workers=0", "stage.num_writers=2", "trainer.enable_progress_bar=false"]
        return label(compose("stage=pseudo_label", *settings, *overrides))

    return run


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_teacher: Path, tmp_path: Path) -> Start:
    def start_labelling(images: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "depthkit", "label", f"bundle={tiny_teacher}", f"images={images}"]
        command += [f"out={out}", "stage.batch_size=2", "stage.num_workers=0", "stage.claim_timeout=3"]
        command += ["trainer.enable_progress_bar=false", f"paths.runs={tmp_path}/runs", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)  # type: ignore[call-overload]

    return start_labelling


@pytest.mark.slow
def test_four_processes_write_every_shard_once(start: Start, run_label: Label, tmp_path: Path):
    images, out = write_images(tmp_path / "images", 24, 8), tmp_path / "labels"
    processes = [start(images, out) for _ in range(4)]
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], output
    assert_complete(images, out)
    written = [int(text.split(" of 24 shards written")[0].split()[-1]) for text in output]
    assert sum(written) == 24


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_when_one_of_four_is_killed_the_rest_finish(start: Start, tmp_path: Path, seed: int):
    images, out = write_images(tmp_path / "images", 40, 8), tmp_path / "labels"
    victim, *rest = [start(images, out) for _ in range(4)]
    deadline = time.monotonic() + 120
    while len(tars(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 0.5))
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    output = [process.communicate(timeout=300)[0] for process in rest]
    assert [process.returncode for process in rest] == [0, 0, 0], output
    assert_complete(images, out)
    assert not [path for path in out.iterdir() if path.name.startswith(".train")], "what the dead one left is gone"


DIES_AT_A_FLUSH = """
import os, sys
from depthkit import __main__, label
flush, left = os.fsync, [int(sys.argv.pop(1))]
def fsync(file):
    left[0] -= 1
    if left[0] < 0 and ".train-" in os.readlink(f"/proc/self/fd/{file}"):
        os._exit(9)
    flush(file)
os.fsync = fsync
sys.exit(__main__.main())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up the names of open files in /proc")
def test_a_death_in_any_write_of_a_shard_leaves_nothing_behind(run_label: Label, tiny_teacher: Path, tmp_path: Path):
    images, deaths = write_images(tmp_path / "images", 1), 0
    for number in range(100):
        out = tmp_path / f"labels{number}"
        arguments = ["label", f"bundle={tiny_teacher}", f"images={images}", f"out={out}", "stage.batch_size=2"]
        arguments += ["stage.num_workers=0", "trainer.enable_progress_bar=false", f"paths.runs={tmp_path}/runs"]
        command = [sys.executable, "-c", DIES_AT_A_FLUSH, str(number), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode in (0, 9), done.stderr
        if done.returncode == 0:
            break
        deaths += 1
        run_label(images, out)
        assert_complete(images, out)
        assert not [path for path in out.iterdir() if path.name.startswith(".train")]
    assert deaths >= 3  # the tar, its index, its record


@pytest.mark.slow
def test_a_process_that_is_paused_and_comes_back_does_no_harm(start: Start, images: Path, tmp_path: Path):
    """Its claims fall silent; as another process cannot see that it only sleeps, they are taken over."""
    out = tmp_path / "labels"
    paused = start(images, out)
    deadline = time.monotonic() + 120
    while not list((out / ".claims").glob("*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    paused.send_signal(signal.SIGSTOP)
    other = start(images, out)
    text, _ = other.communicate(timeout=300)
    paused.send_signal(signal.SIGCONT)
    last, _ = paused.communicate(timeout=300)
    assert (other.returncode, paused.returncode) == (0, 0), text + last
    assert_complete(images, out)
