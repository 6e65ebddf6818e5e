"""A step looked at again: the batch is that of the run, and so are the losses when the weights are."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
from test_train import Losses

from depthkit.__main__ import main
from depthkit.replay import draw, load_settings
from depthkit.train import run
from depthkit.types import BudgetExceeded

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


@pytest.mark.filterwarnings("ignore:step .* was left out")
def test_weights_at_the_stop_are_those_of_the_step_left_out(tiny_config, tmp_path, monkeypatch, capsys):
    """The documented commands, on a run that its budget stopped."""
    losses = Losses()
    settings = ["callbacks.non_finite.max_total=0", "trainer.max_steps=38", "optim.encoder_lr=1e-5"]
    with pytest.raises(BudgetExceeded, match="--step 37"):
        run(tiny_config("teacher", tmp_path / "run", *settings), [losses, Spoil(37)])
    pages = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    shown = re.findall(r"^(depthkit replay .*)$", pages, re.MULTILINE)
    assert len(shown) == 2
    for words in shown:
        words = words.replace("runs/tiny_teacher", str(tmp_path / "run")).replace(
            "pictures", str(tmp_path / "pictures")
        )
        output = command(words, monkeypatch, capsys)
        assert output.splitlines()[0].endswith("00000038.ckpt")
        assert math.isfinite(loss_of(output))
    assert len(list((tmp_path / "pictures").iterdir())) == 6


@pytest.mark.parametrize("kind", ["depth", "disparity"])
def test_near_is_light_in_the_picture_of_either_kind(tmp_path, kind):
    values = np.repeat(np.linspace(1, 10, 100, dtype=np.float32)[None], 50, 0)
    draw(np.zeros((50, 100, 3), np.uint8), values, np.ones((50, 100), bool), kind, tmp_path / "a.png")
    picture = cv2.imread(str(tmp_path / "a.png")).sum(2, dtype=int)
    row = picture[picture.shape[0] // 2]
    left, right = row[int(0.47 * len(row))], row[int(0.82 * len(row))]  # the target is the right half, but for the bar
    assert (left > right + 200) == (kind == "depth")
    assert abs(left - right) > 200


def test_settings_are_read_back(tiny_config, tmp_path):
    config = tiny_config("student", tmp_path)
    run(config)
    assert load_settings(tmp_path / "config.yaml") == config


def test_wrong_arguments_are_named(tiny_config, tmp_path, monkeypatch, capsys):
    run(tiny_config("teacher", tmp_path / "run"))
    for words, message in (
        (f"{tmp_path} --step 0", "config.yaml: no such file"),
        (f"{tmp_path / 'run'} --step 6", "--step 6: the run has the steps 0 to 5"),
        (f"{tmp_path / 'run'} --step 0 --checkpoint none.ckpt", "none.ckpt"),
        (f"{tmp_path / 'run'} --step 0 --checkpoint {tmp_path}", "spread over ranks"),
    ):
        monkeypatch.setattr("sys.argv", ["depthkit", "replay", *shlex.split(words)])
        assert main() == 1
        assert message in capsys.readouterr().err
