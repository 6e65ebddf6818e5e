"""A Slurm cluster of two nodes on this machine, started by a script outside this repository, and its jobs."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import pytest

ROOT = Path(__file__).parents[1]
UP = Path(os.environ.get("DEPTHKIT_SLURM_UP", ROOT.parent / "shared" / "slurm" / "slurm_up.sh"))
FOLDER = Path(os.environ.get("SLURM_DEV_DIR", "/var/tmp/slurm-dev"))
SCRIPTS = ROOT / "scripts" / "slurm"
PATIENCE = float(os.environ.get("DEPTHKIT_SLURM_PATIENCE", "400"))
"""Seconds that anything here may take."""


class SlowSteps(L.Callback):
    """So that a test can do something while tiny models train."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_: object) -> None:
        time.sleep(self.seconds)


class Cluster:
    """The login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # of the tests; all nodes see it
        # Every process of a job is this Python with this checkout, and the tests' callbacks.
        self.environment = os.environ | {
            "DEPTHKIT_PYTHON": sys.executable,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HYDRA_FULL_ERROR": "1",
        }

    def run(self, *command: str | Path, check: bool = True) -> str:
        """What a command on the login node prints."""
        login = [FOLDER / "login", *command]
        done = subprocess.run(login, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        login, log = [FOLDER / "login", *command], (self.folder / "started.out").open("w")
        return subprocess.Popen(login, env=self.environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT)

    def on_node(self, node: str, *command: str) -> None:
        subprocess.run([FOLDER / "on", node, *command], check=True)

    def submit(self, *arguments: str | Path) -> str:
        return self.run("sbatch", "--parsable", "--output=%x.out", *arguments)

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\w+)=(\S+)", self.run("scontrol", "show", "job", job)))

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.is_file() else ""

    def completed(self, job: str) -> bool:
        facts = self.facts(job)
        bad = ("FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL")
        assert facts["JobState"] not in bad, f"{facts}: {self.log(facts['JobName'])}"
        return facts["JobState"] == "COMPLETED"

    def wait(self, jobs: list[str]) -> None:
        wait_for(lambda: all(map(self.completed, jobs)), f"jobs {jobs} to end", lambda: self.run("squeue"))


def wait_for(condition: Callable[[], bool], what: str, more: Callable[[], str] = lambda: "") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited {PATIENCE} s for {what}. {more()}"
        time.sleep(0.3)


def kill_node(number: int) -> None:
    """As if its power were cut."""
    os.kill(int((FOLDER / "run" / f"node{number}.pid").read_text()), 9)


def boot() -> None:
    """Start the cluster, or those of its nodes that are down."""
    done = subprocess.run([UP], capture_output=True, text=True, env=os.environ | {"SLURM_DEV_CPUS": "8"})
    assert done.returncode == 0, f"{UP} could not start a cluster: {(done.stdout + done.stderr)[-500:]}"


@contextmanager
def cluster_of_two(folder: Path) -> Iterator[Cluster]:
    """The cluster of this machine, for one process at a time; gone afterwards."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a Slurm cluster on one machine needs Linux and root")
    if not UP.is_file():
        pytest.skip(f"no script that starts a Slurm cluster at {UP}; set DEPTHKIT_SLURM_UP")
    if shutil.which("apt-get") is None and shutil.which("slurmctld") is None:
        pytest.skip("no Slurm here, and no apt-get to install it")
    with Path("/var/tmp/depthkit-slurm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            boot()
        except AssertionError as error:  # here alone: a cluster that was up and does not come back is a failure
            pytest.skip(str(error))
        cluster = Cluster(folder)
        try:
            yield cluster
        finally:
            subprocess.run([UP.with_name("slurm_down.sh")], capture_output=True)
