"""A step looked at again: the batch is that of the run, and so are the losses when the weights are."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from test_train import Losses

from depthkit.__main__ import main
from depthkit.replay import load_settings
from depthkit.train import run

NAN = float("nan")
EVERY_1 = ["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.keep=100"]


class Keys(L.Callback):
    """The keys of every batch."""

    def __init__(self) -> None:
        self.by_batch: dict[int, list[str]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.by_batch[batch_idx] = [key for part in batch.values() for key in part["key"]]


def command(words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """Run a `depthkit ...` command here; its output."""
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", shlex.split(words))
    code = main()
    output, errors = capsys.readouterr()
    assert code == 0, errors
    return output


def loss_of(output: str) -> float:
    return float(re.search(r"^loss (\S+), norm of the gradient (\S+)$", output, re.MULTILINE)[1])


@pytest.mark.parametrize("stage", ["pretrain", "teacher", "student"])
def test_any_step_has_its_samples_and_losses(tiny_config, tmp_path, stage, monkeypatch, capsys):
    losses, keys = Losses(), Keys()
    config = tiny_config(stage, tmp_path, *EVERY_1, "trainer.accumulate_grad_batches=2", "trainer.max_steps=4")
    run(config, [losses, keys])
    for step in (0, 2):  # step 0 has the weights at the start, which no checkpoint holds
        weights = "" if step == 0 else f" --checkpoint {tmp_path}/checkpoints/{step:08d}.ckpt"
        if step == 0:
            (tmp_path / "checkpoints").rename(tmp_path / "hidden")
        output = command(f"depthkit replay {tmp_path} --step {step}{weights}", monkeypatch, capsys)
        if step == 0:
            (tmp_path / "hidden").rename(tmp_path / "checkpoints")
        lines = output.splitlines()[2:-1]
        expected = keys.by_batch[2 * step] + keys.by_batch[2 * step + 1]
        assert len(lines) == len(expected)
        assert all(f" {key} " in line for key, line in zip(expected, lines, strict=True))
        assert loss_of(output) == pytest.approx(losses.by_batch[2 * step] + losses.by_batch[2 * step + 1], rel=1e-5)


class Spoil(L.Callback):
    """Makes a pixel of one batch's target not finite, as a broken label would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.at:
            batch["labeled"]["image"][0, 0, 5, 5] = NAN


@pytest.mark.filterwarnings("ignore:step .* was left out")
def test_the_command_of_a_report_shows_the_step(tiny_config, tmp_path, monkeypatch, capsys):
    keys = Keys()
    run_dir = tmp_path / "a run"
    run(tiny_config("student", run_dir, "callbacks.checkpoint.every_n_train_steps=3"), [keys, Spoil(4)])
    (path,) = (run_dir / "bad_steps").iterdir()
    report = json.loads(path.read_text())
    samples = report["samples"]
    assert [sample["key"] for sample in samples] == keys.by_batch[4]
    assert {sample["stream"] for sample in samples} == {"labeled", "unlabeled"}
    assert all(Path(sample["shard"]).is_file() for sample in samples)
    assert samples[0]["losses"] == {"labeled": "nan"}
    assert isinstance(samples[1]["losses"]["labeled"], float)

    pictures = tmp_path / "pictures"
    output = command(f"{report['reproduce']} --out {pictures}", monkeypatch, capsys)
    assert "00000003.ckpt" in output.splitlines()[0]
    for sample, line in zip(samples, output.splitlines()[2:-1], strict=True):
        assert f"{sample['dataset']} {sample['key']} {sample['shard']}" in line
    assert len(list(pictures.glob("*.png"))) == len(samples)
    assert "NOT FINITE" not in output  # the data is not to blame here


def test_weights_at_the_stop_are_those_of_the_steps_left_out(tmp_path):
    from depthkit.replay import nearest_checkpoint

    assert nearest_checkpoint(tmp_path, 3) is None


def test_settings_are_read_back(tiny_config, tmp_path):
    config = tiny_config("student", tmp_path)
    run(config)
    assert load_settings(tmp_path / "config.yaml") == config


def test_wrong_arguments_are_named(tiny_config, tmp_path, monkeypatch, capsys):
    for words, message in ((f"{tmp_path} --step 0", "config.yaml: no such file"),):
        monkeypatch.setattr("sys.argv", ["depthkit", "replay", *shlex.split(words)])
        assert main() == 1
        assert message in capsys.readouterr().err
