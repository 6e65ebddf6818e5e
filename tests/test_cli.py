"""`depthkit VERB ...` as typed: what it prints, what it imports, what it exits with."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from depthkit import __version__
from depthkit.__main__ import VERBS


def depthkit(*argv: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "depthkit", *argv],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=200,
    )


def modules_after(code: str, tmp_path: Path) -> set[str]:
    """Names of the modules that are loaded when `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    return set(result.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import depthkit",
        "sys.argv = ['depthkit', '--help']; import depthkit.__main__ as m; assert m.main() == 0",
        "sys.argv = ['depthkit', '--version']; import depthkit.__main__ as m; assert m.main() == 0",
        "import depthkit.config",
    ],
)
def test_heavy_packages_stay_out(code, tmp_path):
    assert not modules_after(code, tmp_path) & {"torch", "lightning", "cv2", "timm", "matplotlib", "wandb"}


def test_help_lists_every_verb(tmp_path):
    result = depthkit("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout == depthkit(cwd=tmp_path).stdout
    for verb, (_, words) in VERBS.items():
        assert verb in result.stdout
        assert words in result.stdout
    assert depthkit("--version", cwd=tmp_path).stdout.strip() == __version__


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module(verb):
    assert find_spec(VERBS[verb][0]) is not None


def test_unknown_verb(tmp_path):
    result = depthkit("trian", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown verb 'trian'" in result.stderr
    assert "usage" in result.stderr


def test_cfg_job_prints_the_settings_and_opens_nothing(tmp_path):
    result = depthkit("train", "--cfg", "job", "experiment=tiny_teacher", "optim.encoder_lr=0.5", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    settings = yaml.safe_load(result.stdout)
    assert settings["optim"]["encoder_lr"] == 0.5
    assert settings["run_name"] == "tiny_teacher"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "experiment=tiny_student", "data.batch_size=25"], "ConfigError: data.batch_size=25: must be"),
        (["train", "experiment=tiny_teacher", "optim.encoder_rl=1"], "encoder_rl"),
        (["label", "bundle=none"], "no value for stage.images, stage.out"),
        (["label", "bundle=none", "images=none", "out=none"], "none"),
    ],
)
def test_mistakes_end_in_one_message(tmp_path, argv, message):
    result = depthkit(*argv, cwd=tmp_path)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists()


def test_the_command_of_another_rank_is_the_command(tiny_settings, tmp_path):
    """What Lightning repeats for the other ranks of a node: the script, the verb, the overrides."""
    code = f"""
import depthkit.hydra_entry as entry
sys.argv = ["/bin/depthkit", "train", "stage=teacher"]
entry.hydra_main("train", {[*tiny_settings("teacher", tmp_path)]!r}, lambda config: print(*sys.argv, sep="\\n"))
"""
    result = subprocess.run([sys.executable, "-c", f"import sys{code}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.splitlines() == ["/bin/depthkit", "train", *tiny_settings("teacher", tmp_path)], result.stderr


@pytest.mark.slow
def test_a_sweep_has_a_folder_for_each_job(tiny_settings, tmp_path):
    settings = [*tiny_settings("teacher", tmp_path / "sweep"), "trainer.max_steps=1"]
    result = depthkit("train", "--multirun", *settings, "optim.encoder_lr=1e-3,2e-3", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for job, rate in (("0", 1e-3), ("1", 2e-3)):
        folder = tmp_path / "sweep" / job
        assert (folder / "bundle" / "model.json").is_file()
        assert yaml.safe_load((folder / "config.yaml").read_text())["optim"]["encoder_lr"] == rate
    again = depthkit("train", "--multirun", *settings, "optim.encoder_lr=1e-3,2e-3", cwd=tmp_path)
    assert again.stdout.count("this run is finished") == 2


@pytest.mark.slow
def test_a_run_says_nothing_that_its_user_cannot_act_on(tiny_settings, tmp_path):
    for stage in ("pretrain", "student"):
        result = depthkit("train", *tiny_settings(stage, tmp_path / stage), "trainer.max_steps=1", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        said = [line for line in result.stderr.splitlines() if line.strip()]
        assert all(line.startswith(("GPU available", "TPU available", "`Trainer.fit` stopped")) for line in said), said
