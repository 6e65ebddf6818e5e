"""A run as a user sees it: interrupted, continued, refused, finished."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from depthkit.bundle import read_facts
from depthkit.config import ConfigError, TrainConfig
from depthkit.runtime.curves import read_curves
from depthkit.train import run

EVERY_3 = "callbacks.checkpoint.every_n_train_steps=3"


class Losses(L.Callback):
    """Keeps the loss of every batch, by its number."""

    def __init__(self) -> None:
        self.by_batch: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.by_batch[batch_idx] = float(outputs["loss"])


class DieAt(L.Callback):
    """Ends the process, as far as a test can, when `step` steps are done."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def train(config: TrainConfig) -> dict[int, float]:
    """Run, and return the losses by batch."""
    losses = Losses()
    run(config, [losses])
    return losses.by_batch


def train_and_die(config: TrainConfig, *, at_step: int) -> dict[int, float]:
    losses = Losses()
    with pytest.raises(SystemExit):
        run(config, [losses, DieAt(at_step)])
    return losses.by_batch


def bundle_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "bundle" / "model.safetensors")


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return read_curves(run_dir / "csv" / "metrics.csv")


def assert_same_weights(a: Path, b: Path) -> None:
    expected, found = bundle_weights(a), bundle_weights(b)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different


# --- interrupted and continued ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("pretrain", ["data.num_workers=0"]),
        ("teacher", ["data.num_workers=0"]),
        ("teacher", ["data.num_workers=1"]),
        ("student", ["data.num_workers=0"]),
        ("student", ["data.num_workers=1"]),
    ],
)
def test_killed_and_continued_run_equals_the_uninterrupted_one(tiny_config, tmp_path, stage, settings):
    whole = train(tiny_config(stage, tmp_path / "whole", EVERY_3, *settings))
    cut = tiny_config(stage, tmp_path / "cut", EVERY_3, *settings)
    before = train_and_die(cut, at_step=5)
    after = train(cut)

    assert list(whole) == [0, 1, 2, 3, 4, 5]
    assert len(set(whole.values())) == 6
    assert before == {batch: whole[batch] for batch in (0, 1, 2, 3, 4)}
    assert after == {batch: whole[batch] for batch in (3, 4, 5)}
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_continued_run_with_accumulation_and_validation_in_between(tiny_config, tmp_path):
    """Steps count optimizer steps; each reads two batches, and validation disturbs nothing."""
    settings = [EVERY_3, "trainer.accumulate_grad_batches=2", "trainer.val_check_interval=2"]
    whole = train(tiny_config("student", tmp_path / "whole", *settings))
    cut = tiny_config("student", tmp_path / "cut", *settings)
    train_and_die(cut, at_step=4)
    after = train(cut)

    assert list(whole) == list(range(12))
    assert after == {batch: whole[batch] for batch in range(6, 12)}
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")
    validated = [row["step"] for row in logged(tmp_path / "whole") if any(key.startswith("val/") for key in row)]
    assert validated == [2, 4, 6]


def test_continued_run_keeps_what_was_logged_before(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, EVERY_3)
    before = train_and_die(config, at_step=5)
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4, 5]
    after = train(config)
    losses = {row["step"]: row["loss"] for row in logged(tmp_path)}
    assert losses == pytest.approx({batch + 1: loss for batch, loss in (before | after).items()})


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""], ids=["cut", "empty"])
def test_damaged_newest_checkpoint_gives_way_to_the_one_before(tiny_config, tmp_path, damage):
    config = tiny_config("teacher", tmp_path, "callbacks.checkpoint.every_n_train_steps=2")
    whole = train_and_die(config, at_step=5)
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"))
    assert newest.name == "00000004.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(UserWarning, match=r"00000004\.ckpt is damaged; going on from the checkpoint before"):
        after = train(config)
    assert list(after) == [2, 3, 4, 5]
    assert after[3] == whole[3]


def test_all_checkpoints_damaged_starts_over_and_says_so(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, EVERY_3)
    train_and_die(config, at_step=4)
    (tmp_path / "checkpoints" / "00000003.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"00000003\.ckpt is damaged"):
        assert list(train(config)) == [0, 1, 2, 3, 4, 5]


# --- which settings may change ---------------------------------------------------------------------------------------


def test_other_settings_are_refused_with_both_values(tiny_config, tmp_path):
    train_and_die(tiny_config("teacher", tmp_path, EVERY_3), at_step=4)
    changed = tiny_config("teacher", tmp_path, EVERY_3, "optim.encoder_lr=0.002", "data.batch_size=3")
    with pytest.raises(ConfigError, match=r"optim\.encoder_lr: was 0\.001, is 0\.002") as error:
        run(changed)
    assert "data.batch_size: was 6, is 3" in str(error.value)
    assert "resume=never" in str(error.value)
    assert "encoder_lr: 0.001" in (tmp_path / "config.yaml").read_text()


def test_settings_that_change_no_number_may_change(tiny_config, tmp_path):
    first = train_and_die(tiny_config("teacher", tmp_path, EVERY_3), at_step=5)
    after = train(tiny_config("teacher", tmp_path, EVERY_3, "data.num_workers=1", "trainer.log_every_n_steps=2"))
    assert after[3] == first[3]


def test_resume_never_starts_over_and_leaves_nothing_that_a_later_start_would_take(tiny_config, tmp_path):
    run(tiny_config("teacher", tmp_path, EVERY_3))
    again = tiny_config("teacher", tmp_path, EVERY_3, "resume=never", "optim.encoder_lr=0.002")
    train_and_die(again, at_step=4)
    assert (tmp_path / "before-1" / "bundle" / "model.json").is_file()
    assert not (tmp_path / "bundle").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003.ckpt"]
    after = train(tiny_config("teacher", tmp_path, EVERY_3, "optim.encoder_lr=0.002"))
    assert list(after) == [3, 4, 5]


def test_resume_from_a_path(tiny_config, tmp_path):
    first = train_and_die(tiny_config("teacher", tmp_path / "first", EVERY_3), at_step=5)
    checkpoint = tmp_path / "first" / "checkpoints" / "00000003.ckpt"
    after = train(tiny_config("teacher", tmp_path / "second", f"resume={checkpoint}"))
    assert after[3] == first[3]
    with pytest.raises(ConfigError, match=r"resume=.*none\.ckpt: no such checkpoint"):
        run(tiny_config("teacher", tmp_path / "third", f"resume={tmp_path / 'none.ckpt'}"))


# --- finished --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory) -> tuple[Path, float | None]:
    """A student that is done, and what its run returned."""
    run_dir = tmp_path_factory.mktemp("finished")
    return run_dir, run(tiny_config("student", run_dir))


def test_finished_run_started_again_ends_at_once(finished, tiny_config, capsys):
    run_dir, abs_rel = finished
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run_dir / "bundle").iterdir()}
    losses = Losses()
    assert run(tiny_config("student", run_dir), [losses]) == abs_rel
    assert losses.by_batch == {}
    assert "is finished" in capsys.readouterr().out
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (run_dir / "bundle").iterdir()}


def test_finished_run_refuses_other_settings(finished, tiny_config):
    run_dir, _ = finished
    with pytest.raises(ConfigError, match="seed: was 0, is 1"):
        run(tiny_config("student", run_dir, "seed=1"))


def test_validation_metrics_name_their_protocol(finished):
    run_dir, abs_rel = finished
    metrics = read_facts(run_dir / "bundle").provenance["metrics"]
    assert len(metrics) == 9
    assert all(name.startswith("val/affine_disparity@") for name in metrics)
    (name,) = (name for name in metrics if name.endswith("/abs_rel"))
    assert metrics[name] == abs_rel
    rows = [row for row in logged(run_dir) if name in row]
    assert float(rows[-1][name]) == pytest.approx(abs_rel)
    columns = {key for row in logged(run_dir) for key in row if key.startswith("val")}
    assert columns == set(metrics)


def test_student_starts_from_the_encoder_of_a_bundle(tiny_config, tiny_teacher, tmp_path):
    settings = [f"stage.encoder_weights={tiny_teacher}", "optim.encoder_lr=0", "seed=1"]
    run(tiny_config("student", tmp_path, *settings))
    before, after = load_file(tiny_teacher / "model.safetensors"), bundle_weights(tmp_path)
    encoder = [name for name in before if name.startswith("encoder.")]
    assert len(encoder) > 40
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    assert not torch.equal(before["decoder.head_in.weight"], after["decoder.head_in.weight"])


def test_validation_needs_an_image_for_every_rank(tiny_config, tmp_path):
    settings = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.limit_val_batches=1"]
    with pytest.raises(ConfigError, match=r"trainer\.limit_val_batches=1: .* 1 validation images .* 2 ranks"):
        run(tiny_config("teacher", tmp_path, *settings))


# --- loggers and ranks -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_and_wandb_write_without_a_network(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(tiny_config("teacher", tmp_path / "tensorboard", "logger=tensorboard", "trainer.max_steps=2"))
    run(tiny_config("teacher", tmp_path / "wandb", "logger=wandb", "trainer.max_steps=2"))
    events = list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))
    assert any(b"loss/labeled" in path.read_bytes() for path in events)
    (record,) = (tmp_path / "wandb").rglob("run-*.wandb")
    assert record.stat().st_size > 0
    assert len(logged(tmp_path / "wandb")) > 0


RANKS = """
import json, os, sys
from pathlib import Path
import depthkit.train
from depthkit.hydra_entry import hydra_main
from test_train import Losses

def run(config):
    losses = Losses()
    depthkit.train.run(config, [losses])
    (Path(config.run_dir) / f"losses.{os.environ.get('LOCAL_RANK', 0)}.json").write_text(json.dumps(losses.by_batch))

# Lightning repeats the command with the verb for the second rank.
hydra_main("train", [item for item in sys.argv[1:] if item != "train"], run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "student"])
def test_two_ranks_train_as_one(tiny_config, tiny_settings, tmp_path, stage):
    """The mean of the ranks' losses is the loss of one process with the same global batch, step by step."""
    tests = Path(__file__).parent
    script = tmp_path / "run.py"
    script.write_text(RANKS)
    settings = ["data.batch_size=12", "optim.encoder_lr=1e-4"]
    one = train(tiny_config(stage, tmp_path / "one", *settings))
    settings += ["trainer.devices=2", "trainer.strategy=ddp"]
    subprocess.run(
        [sys.executable, script, *tiny_settings(stage, tmp_path / "two"), *settings],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    ranks = [json.loads(path.read_text()) for path in sorted((tmp_path / "two").glob("losses.*.json"))]
    assert len(ranks) == 2
    two = [sum(rank[str(batch)] for rank in ranks) / 2 for batch in range(6)]
    # Rounding may pick another pixel as a median, so the two drift apart after some steps.
    assert two[:3] == pytest.approx([one[batch] for batch in range(3)], rel=1e-4)
    assert two == pytest.approx(list(one.values()), rel=1e-2)
    weights = bundle_weights(tmp_path / "one"), bundle_weights(tmp_path / "two")
    differences = torch.cat([(a - b).abs().flatten() for a, b in zip(*map(dict.values, weights), strict=True)])
    assert differences.mean() < 1e-4  # the six steps move a weight by up to 3e-3
