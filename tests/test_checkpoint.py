"""Checkpoints: which are kept, what they say, which are trusted, and what a run refuses to go on from."""

import json
import shutil
import subprocess
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from test_train import EVERY_3, assert_same_weights, logged, train, train_and_die

import depthkit
from depthkit.config import ConfigError
from depthkit.runtime.checkpoint import Checkpoints, best_before, is_whole, newest_checkpoint, read_facts, save_now
from depthkit.train import run

EVERY_2 = "callbacks.checkpoint.every_n_train_steps=2"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def validated(tiny_config, tmp_path_factory) -> Path:
    """A run of six steps with checkpoints every two, validated every two."""
    run_dir = tmp_path_factory.mktemp("validated")
    run(tiny_config("teacher", run_dir, EVERY_2, "trainer.val_check_interval=2"))
    return run_dir


# --- which are kept --------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(validated):
    values = [float(value) for row in logged(validated) for name, value in row.items() if name.endswith("abs_rel")]
    scores = dict(zip((2, 4, 6), values, strict=False))
    best = min(scores, key=lambda step: scores[step])
    assert len(set(scores.values())) == 3
    assert names(validated) == ["00000004.ckpt", "00000006.ckpt", f"best-{best:08d}.ckpt"]
    said = read_facts(validated / "checkpoints" / f"best-{best:08d}.ckpt")["validation"]
    assert said["metric"].startswith("val/affine_disparity@")
    assert said["value"] == pytest.approx(scores[best])
    assert newest_checkpoint(validated / "checkpoints").name == "00000006.ckpt"


def test_a_metric_that_is_better_when_higher(tiny_config, tmp_path):
    settings = [EVERY_2, "trainer.val_check_interval=1", "callbacks.checkpoint.best_metric=delta1"]
    run(tiny_config("teacher", tmp_path, *settings))
    rows = [row for row in logged(tmp_path) if any(name.endswith("delta1") for name in row)][:6]
    scores = [float(value) for row in rows for name, value in row.items() if name.endswith("delta1")]
    assert f"best-{1 + int(np.argmax(scores)):08d}.ckpt" in names(tmp_path)
    with pytest.raises(ConfigError, match=r"best_metric='delta1': must be one of protocol.metrics=\['rmse'\]"):
        run(tiny_config("teacher", tmp_path, *settings, "protocol.metrics=[rmse]"))


def test_a_killed_run_keeps_its_best(tiny_config, tmp_path, validated):
    """Also one that goes on from before the best, which then is found again."""
    config = tiny_config("teacher", tmp_path, EVERY_2, "trainer.val_check_interval=2")
    train_and_die(config, at_step=3)
    train_and_die(config, at_step=5)
    train(config)
    assert names(tmp_path) == names(validated)


class SaveNow(L.Callback):
    """Saves at every step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        path = save_now(trainer)
        assert path.name == f"{trainer.global_step:08d}.ckpt"
        assert is_whole(path)


def test_saving_on_request_fills_no_disk_and_disturbs_nothing(tiny_config, tmp_path, validated):
    run(tiny_config("teacher", tmp_path, EVERY_2, "trainer.val_check_interval=2"), [SaveNow()])
    assert [name for name in names(tmp_path) if name[0] == "0"] == ["00000005.ckpt", "00000006.ckpt"]
    assert_same_weights(tmp_path, validated)


def test_what_killed_writers_left_is_removed_at_the_next_start(tiny_config, tmp_path):
    train_and_die(tiny_config("teacher", tmp_path, EVERY_3), at_step=4)
    (tmp_path / "checkpoints" / ".00000006.ckpt.0a1b.tmp").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".00000009.ckpt.tmp").mkdir()
    (tmp_path / ".bundle.0a1b.tmp").mkdir()
    train(tiny_config("teacher", tmp_path, EVERY_3))
    assert not list(tmp_path.rglob(".*.tmp"))


def test_the_best_by_another_metric_is_no_measure(validated):
    folder = validated / "checkpoints"
    (best,) = folder.glob("best-*.ckpt")
    assert best_before(folder, 6, "abs_rel") == (str(best), read_facts(best)["validation"]["value"])
    assert best_before(folder, 6, "delta1") is None
    assert best_before(folder, 1, "abs_rel") is None


# --- what they say ---------------------------------------------------------------------------------------------------


def test_what_a_checkpoint_says(validated, tiny_config):
    facts = read_facts(validated / "checkpoints" / "00000006.ckpt")
    assert facts["config"]["optim"]["encoder_lr"] == 1e-3
    assert facts["config"]["seed"] == 0
    assert facts["versions"]["depthkit"] == depthkit.__version__
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"step": 6, "next_batch": 6, "world_size": 1}.items() <= facts.items()
    assert set(facts["data"]) == {"data.labeled.source.manifest"}
    checkout = Path(depthkit.__file__).parents[1]
    if (checkout / ".git").exists():
        head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        assert len(facts["versions"]["commit"].removesuffix("-dirty")) == len(head.strip())


def test_the_position_counts_batches(tiny_config, tmp_path):
    train_and_die(tiny_config("teacher", tmp_path, EVERY_3, "trainer.accumulate_grad_batches=2"), at_step=4)
    facts = read_facts(tmp_path / "checkpoints" / "00000003.ckpt")
    assert (facts["step"], facts["next_batch"]) == (3, 6)


def test_random_numbers_of_a_model_go_on_too(tiny_config, tmp_path):
    """Drop path draws from torch's generator, and validation takes numbers from it."""
    settings = [EVERY_3, "+model.encoder_args.drop_path_rate=0.5", "trainer.val_check_interval=2"]
    whole = train(tiny_config("teacher", tmp_path / "whole", *settings))
    cut = tiny_config("teacher", tmp_path / "cut", *settings)
    train_and_die(cut, at_step=5)
    assert train(cut) == {batch: whole[batch] for batch in (3, 4, 5)}
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


# --- which are trusted -----------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_seen_or_harmless(validated, tmp_path):
    """Wherever it lies: torch itself reads most of them without a word."""
    data = (validated / "checkpoints" / "00000006.ckpt").read_bytes()
    before = torch.load(validated / "checkpoints" / "00000006.ckpt", weights_only=False)["state_dict"]
    path, rng = tmp_path / "flipped.ckpt", np.random.default_rng(0)
    num_seen = 0
    for place in [*rng.integers(0, len(data), 150), *rng.integers(len(data) - 20_000, len(data), 50)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        if not is_whole(path):
            num_seen += 1
            continue
        after = torch.load(path, weights_only=False)["state_dict"]
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert num_seen > 100


def test_flipped_bits_in_the_newest_one(tiny_config, tmp_path):
    config = tiny_config("teacher", tmp_path, EVERY_2)
    whole = train_and_die(config, at_step=5)
    newest = tmp_path / "checkpoints" / "00000004.ckpt"
    weight = torch.load(newest, weights_only=False)["state_dict"]["model.decoder.head_in.weight"].numpy().tobytes()
    data = bytearray(newest.read_bytes())
    data[data.index(weight) + 5] ^= 4
    newest.write_bytes(data)
    torch.load(newest, weights_only=False)
    with pytest.warns(UserWarning, match=r"00000004\.ckpt is damaged; going on from the checkpoint before"):
        after = train(config)
    assert after == {batch: after[batch] for batch in (2, 3, 4, 5)}
    assert after[4] == whole[4]
    assert names(tmp_path) == ["00000004.ckpt", "00000006.ckpt"]
    assert is_whole(newest)


def test_the_best_one_is_not_mistaken_for_the_newest(tmp_path):
    for name in ("00000009.ckpt", "00000010.ckpt", "best-00000011.ckpt", "last.ckpt"):
        torch.save({}, tmp_path / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "00000010.ckpt"


# --- what a run refuses to go on from --------------------------------------------------------------------------------


def test_a_checkpoint_of_another_stage_or_model(validated, tiny_config, tmp_path):
    given = f"resume={validated / 'checkpoints' / '00000006.ckpt'}"
    with pytest.raises(ConfigError, match=r"00000006\.ckpt is .*\n  stage\.name: was teacher, is student"):
        run(tiny_config("student", tmp_path, given))
    with pytest.raises(ConfigError, match=r"another stage or model:\n  model\.features: was 16, is 8"):
        run(tiny_config("teacher", tmp_path, given, "model.features=8"))
    assert not (tmp_path / "config.yaml").exists()


def test_other_settings_than_those_of_a_given_checkpoint(validated, tiny_config, tmp_path):
    """More steps are welcome; a rate would be overwritten by the one in the checkpoint."""
    given = f"resume={validated / 'checkpoints' / '00000006.ckpt'}"
    with pytest.raises(ConfigError, match=r"optim\.encoder_lr: was 0\.001, is 0\.002"):
        run(tiny_config("teacher", tmp_path, given, "optim.encoder_lr=0.002"))
    assert list(train(tiny_config("teacher", tmp_path, given, "trainer.max_steps=8"))) == [6, 7]


def test_files_that_are_no_checkpoints_of_ours(tiny_config, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=r"other\.ckpt is no checkpoint of a training run"):
        run(tiny_config("teacher", tmp_path / "run", f"resume={tmp_path / 'other.ckpt'}"))
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "other.ckpt").read_bytes()[:-30])
    with pytest.raises(ConfigError, match=r"cut\.ckpt is damaged"):
        run(tiny_config("teacher", tmp_path / "run", f"resume={tmp_path / 'cut.ckpt'}"))


def test_data_that_changed_under_the_same_path(tiny_config, tiny_world, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_world / "source_train", data)
    settings = [f"data.labeled.source.manifest={data / 'manifest.json'}", EVERY_3]
    config = tiny_config("teacher", tmp_path / "run", *settings)
    train_and_die(config, at_step=4)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["shards"] = manifest["shards"][:2]
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"other data under the same name.*\n  data\.labeled\.source\.manifest: was "):
        run(config)


def test_going_back_leaves_the_later_ones(tiny_config, tmp_path):
    settings = [EVERY_2, "callbacks.checkpoint.keep=3"]
    first = train(tiny_config("teacher", tmp_path, *settings))
    back = tiny_config("teacher", tmp_path, *settings, f"resume={tmp_path / 'checkpoints' / '00000002.ckpt'}")
    assert train_and_die(back, at_step=3) == {2: first[2]}
    assert names(tmp_path) == ["00000002.ckpt"]
    assert sorted(path.name for path in (tmp_path / "before-1").rglob("*.ckpt")) == ["00000004.ckpt", "00000006.ckpt"]
    assert (tmp_path / "before-1" / "bundle").is_dir()
    assert list(train(tiny_config("teacher", tmp_path, *settings))) == [2, 3, 4, 5]


@pytest.mark.parametrize("resume", ["never", "PATH"])
def test_a_job_that_slurm_starts_again_goes_on(tiny_config, tmp_path, monkeypatch, resume, validated):
    given = resume.replace("PATH", str(validated / "checkpoints" / "00000004.ckpt"))
    config = tiny_config("teacher", tmp_path, "callbacks.checkpoint.every_n_train_steps=1", f"resume={given}")
    before = train_and_die(config, at_step=6)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert list(train(config)) == [max(before)]
    assert not list(tmp_path.glob("before-*"))


def test_settings_of_the_callback_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.every_n_train_steps=0, keep=2"):
        Checkpoints(str(tmp_path), every_n_train_steps=0)
