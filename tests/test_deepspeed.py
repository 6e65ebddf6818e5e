"""Two processes under DDP and DeepSpeed: they train as one, and survive being killed. On GPUs where there are two."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import rmtree

import pytest
import torch
from safetensors.torch import load_file
from test_train import RANKS, bundle_weights, train

from depthkit.bundle import load_model, read_facts
from depthkit.config import ConfigError
from depthkit.exporting import main as export
from depthkit.runtime.checkpoint import is_whole, newest_checkpoint, steps_of
from depthkit.train import run

TESTS = Path(__file__).parent
DEVICE = ["trainer.accelerator=gpu"] if torch.cuda.device_count() > 1 else []
SETTINGS = [
    *DEVICE,
    "data.batch_size=12",
    "optim.encoder_lr=1e-4",
    "optim.final_lr_fraction=1",
    "callbacks.checkpoint.every_n_train_steps=2",
    "trainer.gradient_clip_val=0.5",
    "~callbacks.panels",
]
AVERAGE = ["optim.ema_decay=0.5"]
ENGINES = {
    "zero1": ["trainer.strategy=deepspeed", "trainer.zero_stage=1"],
    "zero2": [
        "trainer.strategy=deepspeed",
        "trainer.zero_stage=2",
        "trainer.offload=true",
        "trainer.activation_checkpointing=true",
    ],
    "zero3": ["trainer.strategy=deepspeed", "trainer.deepspeed_config={json}"],
}

pytestmark = pytest.mark.slow


def start(overrides: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Two processes, in a process group of their own; the first one starts the second."""
    script = folder / "run.py"
    script.write_text(RANKS)
    return subprocess.Popen(
        [sys.executable, script, *overrides, "trainer.devices=2"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=(folder / "log").open("ab"),
        stderr=subprocess.STDOUT,
    )


def train_two(overrides: list[str], folder: Path) -> list[float]:
    """The mean of the ranks' losses, batch by batch, of those that were done now."""
    code = start(overrides, folder).wait(timeout=500)
    assert code == 0, (folder / "log").read_text()[-3000:]
    ranks = [json.loads((folder / "run" / f"losses.{rank}.json").read_text()) for rank in range(2)]
    return [sum(values) / 2 for values in zip(*(rank.values() for rank in ranks), strict=True)]


def train_two_until_killed(overrides: list[str], folder: Path) -> Path:
    """Both are killed as soon as there is a checkpoint, which is returned."""
    process = start(overrides, folder)
    deadline = time.monotonic() + 400
    while not (found := steps_of(folder / "run" / "checkpoints")):  # a name appears when the checkpoint is whole
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return found[0]


@pytest.fixture(scope="module")
def alone(tiny_config, tmp_path_factory) -> Callable[..., tuple[list[float], Path]]:
    """`alone(*overrides)`: losses and folder of one process; each set of overrides is run once."""

    @cache
    def run_alone(*overrides: str) -> tuple[list[float], Path]:
        folder = tmp_path_factory.mktemp("alone")
        return list(train(tiny_config("student", folder, *SETTINGS, *overrides)).values()), folder

    return run_alone


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_and_survive_being_killed(engine, alone, tiny_config, tiny_settings, tmp_path):
    file = tmp_path / "ds.json"
    # Every weight is split, however small.
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    own = [item.format(json=file) for item in ENGINES[engine]]
    average = [] if engine == "zero3" else AVERAGE  # which ZeRO 3 refuses
    overrides = [*tiny_settings("student", tmp_path / "run"), *SETTINGS, *own, *average]

    checkpoint = train_two_until_killed(overrides, tmp_path)
    assert checkpoint.is_dir()
    (tmp_path / "run" / "checkpoints" / ".00000009.ckpt.tmp").mkdir()  # as one that was being written then
    losses = train_two(overrides, tmp_path)

    expected, folder = alone(*average)
    assert 0 < len(losses) < 6
    # Rounding may pick another pixel as a median, so the two drift apart after some steps.
    assert losses == pytest.approx(expected[-len(losses) :], rel=1e-2)
    weights = bundle_weights(folder), bundle_weights(tmp_path / "run")
    assert mean_difference(*weights) < 1e-5
    metrics = [read_facts(run_dir / "bundle").provenance["metrics"] for run_dir in (folder, tmp_path / "run")]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-2)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name[0] != "b")
    assert kept == ["00000004.ckpt", "00000006.ckpt"]

    newest = tmp_path / "run" / "checkpoints" / "00000006.ckpt"
    assert export([str(newest), "--format", "bundle", "--out", str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == weights[1].keys()
    assert all(torch.equal(exported[name], weights[1][name]) for name in exported)
    _, facts = load_model(tmp_path / "exported")
    assert facts.provenance["steps"] == 6
    assert_damage_is_noticed(newest)
    rmtree(tmp_path / "run" / "bundle")  # else it is finished
    if engine == "zero2":
        for own, now in ([], "of one process or DDP"), (ENGINES["zero2"], "of ZeRO 2 on 1 processes"):
            with pytest.raises(
                ConfigError, match=f"is of ZeRO 2 on 2 processes, and this run is {now}.*depthkit export"
            ):
                run(tiny_config("student", tmp_path / "run", *SETTINGS, *average, *own))


def assert_damage_is_noticed(checkpoint: Path) -> None:
    part = min(checkpoint.rglob("*optim_states.pt"))
    data = part.read_bytes()
    assert is_whole(checkpoint)
    part.write_bytes(data[:-1])
    assert not is_whole(checkpoint)
    part.unlink()
    assert not is_whole(checkpoint)
    with pytest.warns(UserWarning, match=r"00000006\.ckpt is damaged; going on from the checkpoint before"):
        assert newest_checkpoint(checkpoint.parent).name == "00000004.ckpt"
    part.write_bytes(data)


def test_one_process_goes_on_from_two_of_ddp(alone, tiny_config, tiny_settings, tmp_path):
    settings = [*SETTINGS, *AVERAGE]
    train_two_until_killed([*tiny_settings("student", tmp_path / "run"), *settings, "trainer.strategy=ddp"], tmp_path)
    expected, folder = alone(*AVERAGE)
    after = list(train(tiny_config("student", tmp_path / "run", *settings)).values())
    assert 0 < len(after) < 6
    assert after == pytest.approx(expected[-len(after) :], rel=1e-2)
    assert mean_difference(bundle_weights(folder), bundle_weights(tmp_path / "run")) < 1e-5


def test_averaged_weights_are_others(alone):
    """Or the comparisons above would say nothing about the average."""
    _, plain = alone()
    _, averaged = alone(*AVERAGE)
    assert mean_difference(bundle_weights(plain), bundle_weights(averaged)) > 1e-4


def mean_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of every weight; the six steps of a test move one by up to 3e-3."""
    assert list(first) == list(second)
    return float(torch.cat([(first[name] - second[name]).abs().flatten() for name in first]).mean())
