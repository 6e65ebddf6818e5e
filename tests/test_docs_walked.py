"""The training commands of some pages are run in the order of the page, with less to do.

Those that need a cluster, several GPUs or the data sets of the papers are composed (test_readme.py), and walked by
test_slurm_docs.py.
"""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_readme import ROOT, commands
from test_slurm_docs import SHORT, small_world

from depthkit import train

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true"}
STAGES = {"tiny_pretrain": "pretrain", "tiny_teacher": "teacher", "tiny_label": "label", "tiny_student": "student"}
FEWER = {
    "00000400.ckpt": "00000004.ckpt",
    "--step 37": "--step 3",
    "log_every_n_steps=50": "log_every_n_steps=2",
    "offline=false": "offline=true",
}
"""Steps that a run of four has, and no network."""


def shrunk(argv: list[str]) -> list[str]:
    text = shlex.join(argv)
    for shown, run in FEWER.items():
        text = text.replace(shown, run)
    words = shlex.split(text)
    stage = next((STAGES[word.split("=")[1]] for word in words if word.startswith("experiment=")), "")
    if stage == "label":
        return [*words, "stage.num_workers=0", "trainer.enable_progress_bar=false"]
    if stage:
        return [*words, *SHORT, *small_world(stage), "data.num_workers=0", "callbacks.checkpoint.every_n_train_steps=2"]
    return words


def depthkit(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "depthkit", *argv],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}"
    return done.stdout


def train_here(compose: Any, folder: Path, *argv: str) -> None:
    """A stage in this process: a command of its own would wait for torch longer than it trains."""
    with contextlib.chdir(folder):
        train.run(compose(*argv[1:]))


@pytest.fixture(scope="module")
def folder(compose: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny encoder, teacher and its labels are, small enough to be made in seconds."""
    made = tmp_path_factory.mktemp("walked")
    train_here(compose, made, *shrunk(["train", "experiment=tiny_pretrain"]))
    train_here(compose, made, *shrunk(["train", "experiment=tiny_teacher"]))
    train_here(compose, made, *shrunk(["label", "experiment=tiny_label"]))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("page", ["reliability", "monitoring"])
def test_the_commands_of_a_page_run_one_after_another(folder: Path, page: str) -> None:
    shown = commands((ROOT / "docs" / f"{page}.md").read_text())
    assert len(shown) > 5
    for argv in shown:
        depthkit(folder, *shrunk(argv))


@pytest.mark.slow
def test_engines_that_a_laptop_has(folder: Path) -> None:
    shown = commands((ROOT / "docs" / "engines.md").read_text())
    on_a_laptop = [argv for argv in shown if argv[0] == "train" and "experiment=tiny_teacher" in argv]
    assert on_a_laptop
    for argv in on_a_laptop:
        depthkit(folder, *shrunk(argv))
    (checkpoint,) = [argv for argv in shown if argv[0] == "export"]
    newest = max((folder / "runs" / "tiny_teacher" / "checkpoints").glob("*.ckpt"))
    checkpoint[1], checkpoint[-1] = str(newest), "bundles/teacher"
    depthkit(folder, *checkpoint)
    assert (folder / "bundles" / "teacher" / "model.json").is_file()
