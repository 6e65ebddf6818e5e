"""Signals to a run that is not under Slurm; test_slurm.py has those of a real one."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from test_train import Losses, assert_same_weights, train

from depthkit.config import TrainConfig
from depthkit.runtime.requeue import EXIT_INTERRUPTED, SIGNALS
from depthkit.train import run


class SendAt(L.Callback):
    """Sends `signals` to this process and the loader's, as Slurm does, when `hook` is called the `count`th time."""

    def __init__(self, hook: str, count: int, signals: Sequence[int]) -> None:
        self._left = count
        self._signals = signals
        setattr(self, hook, self._send)

    def _send(self, *_: Any, **__: Any) -> None:
        self._left -= 1
        if self._left == 0:
            for number in self._signals:
                for worker in multiprocessing.active_children():
                    os.kill(int(worker.pid or 0), number)
                time.sleep(0.2)  # a dead worker is noticed
                signal.raise_signal(number)


def interrupt(config: TrainConfig, hook: str, count: int, *signals: int) -> dict[int, float]:
    """The losses of a run that these signals ended as they should."""
    losses = Losses()
    with pytest.raises(SystemExit) as ended:
        run(config, [SendAt(hook, count, signals), losses])
    assert ended.value.code == EXIT_INTERRUPTED
    return losses.by_batch


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a job of Slurm, whatever runs the tests."""
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def whole(tiny_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(tiny_config("teacher", run_dir))
    return run_dir


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_a_signal_saves_the_step_and_the_same_command_ends_as_if_nothing_was(
    number: int, tiny_config, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    assert list(interrupt(tiny_config("teacher", tmp_path), "on_train_batch_start", 3, number)) == [0, 1, 2]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003.ckpt"]
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: saved {tmp_path}/checkpoints/00000003.ckpt" in said
    assert "the same command goes on" in said
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert list(train(tiny_config("teacher", tmp_path))) == [3, 4, 5]
    assert_same_weights(tmp_path, whole)


@pytest.mark.parametrize(
    ("hook", "steps"),
    [("on_train_start", 1), ("on_fit_start", 1), ("on_train_batch_end", 1), ("on_validation_start", 2)],
)
def test_no_moment_loses_a_signal(hook: str, steps: int, tiny_config, tmp_path: Path) -> None:
    config = tiny_config("teacher", tmp_path, "trainer.val_check_interval=2")
    assert len(interrupt(config, hook, 1, signal.SIGTERM)) == steps
    assert list(train(config)) == list(range(steps, 6))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)
def test_loaders_live_on_when_every_process_is_signalled(number: int, tiny_config, whole: Path, tmp_path: Path) -> None:
    config = tiny_config("teacher", tmp_path, "data.num_workers=1")
    assert list(interrupt(config, "on_train_batch_start", 3, number)) == [0, 1, 2]
    train(config)
    assert_same_weights(tmp_path, whole)
    assert not multiprocessing.active_children()


def test_a_worker_ends_when_its_loader_ends_it(tiny_config, tmp_path: Path) -> None:
    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, step: int) -> None:
            if step == 3:
                (worker,) = multiprocessing.active_children()
                for number in SIGNALS:
                    subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
                worker.join(0.5)
                codes.append(worker.exitcode)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader would raise
                worker.terminate()
                worker.join(10)
                codes.append(worker.exitcode)
                raise KeyboardInterrupt

    codes: list[int | None] = []
    with pytest.raises(SystemExit):
        run(tiny_config("teacher", tmp_path, "data.num_workers=1"), [Look()])
    assert codes == [None, 0]


@pytest.mark.slow
def test_two_ranks_in_short_steps_agree_whenever_one_of_them_gets_the_signal(tiny_settings, tmp_path: Path) -> None:
    settings = [*tiny_settings("teacher", tmp_path), "callbacks.checkpoint.every_n_train_steps=20"]
    settings += ["trainer.max_steps=400", "trainer.devices=2", "trainer.strategy=ddp"]
    command = [sys.executable, "-m", "depthkit", "train", *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    codes = []
    for number in (signal.SIGTERM, signal.SIGUSR1, None):
        before = set(tmp_path.glob("checkpoints/*"))
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if number is not None:
            while not set(tmp_path.glob("checkpoints/*.ckpt")) - before:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            process.send_signal(number)
        codes.append(process.wait(timeout=300))
    said = (tmp_path / "log").read_text()
    assert codes == [EXIT_INTERRUPTED, EXIT_INTERRUPTED, 0], said
    first, second = [int(step) for step in re.findall(r"saved \S+/(\d+)\.ckpt", said)]
    assert 0 < first < second < 400
