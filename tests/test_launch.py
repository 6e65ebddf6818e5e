"""What `depthkit launch` hands to sbatch; tests marked `slurm` let a real one run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from depthkit.launch import TEMPLATES, launch, main

SBATCH = """#!/bin/sh
printf '%s\\n' "$DEPTHKIT_PYTHON" "$@" END >> "$SEEN"
echo $(grep -c END "$SEEN")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The arguments of each call of an sbatch that gives out 1, 2, 3, ... as job numbers."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.delenv("DEPTHKIT_PYTHON", raising=False)
    monkeypatch.chdir(tmp_path)

    def read() -> list[list[str]]:
        text = (tmp_path / "seen").read_text() if (tmp_path / "seen").is_file() else ""
        return [call.splitlines() for call in text.split("END\n")[:-1]]

    return read


def option(call: list[str], name: str) -> str:
    (value,) = [word.removeprefix(f"--{name}=") for word in call if word.startswith(f"--{name}=")]
    return value


def test_stages_wait_for_those_they_read_from(calls) -> None:
    assert launch(["recipe=tiny"]) == {"pretrain": "1", "teacher": "2", "label_target": "3", "student": "4"}
    pretrain, teacher, label, student = calls()
    assert option(pretrain, "dependency") == "singleton"
    assert option(teacher, "dependency") == "afterok:1,singleton"
    assert option(label, "dependency") == "afterok:1:2"
    assert option(student, "dependency") == "afterok:1:2,afterany:3,singleton"
    assert all(call[0] == sys.executable for call in calls())
    assert str(TEMPLATES / "train.sbatch") in student
    assert str(TEMPLATES / "label.sbatch") in label
    assert "stage.images='data/world-0/target_train/manifest.json'" in label
    assert "stage.out='runs/tiny_label/labels'" in label


def test_settings_and_options_go_to_the_stages_they_name(calls) -> None:
    settings = ["seed=3", "student.optim.encoder_lr=1e-4", "teacher.trainer.num_nodes=2", "trainer.devices=4"]
    options = ["sbatch.partition=main", "label.sbatch.array=0-7", "student.sbatch.time=1:00"]
    launch(["recipe=tiny", *settings, *options, "teacher.run_name=mine"])
    pretrain, teacher, label, student = calls()
    assert all("seed=3" in call and option(call, "partition") == "main" for call in calls())
    assert [option(call, "nodes") for call in calls()] == ["1", "2", "1", "1"]
    assert [option(call, "ntasks-per-node") for call in calls()] == ["4"] * 4
    assert ["optim.encoder_lr=1e-4" in call for call in calls()] == [False, False, False, True]
    assert option(label, "array") == "0-7"
    assert option(label, "output") == "runs/slurm/%x-%A_%a.out"
    assert option(student, "time") == "1:00"
    assert "stage.bundle='runs/mine/bundle'" in label
    assert option(teacher, "job-name") == "mine"
    assert not any("gpus" in word for word in pretrain)


def test_gpus_are_asked_for_where_the_trainer_uses_them(calls) -> None:
    launch(["recipe=tiny", "trainer=gpu", "teacher.trainer.devices=2"])
    assert [option(call, "gpus-per-node") for call in calls()] == ["1", "2", "1", "1"]


def test_a_dry_run_is_a_script_that_does_what_was_not_done(calls, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["recipe=tiny", "label.sbatch.array=0-3", "optim.betas=[0.9,0.95]"]
    launch([*arguments, "dry_run=true"])
    script, said = capfd.readouterr()
    assert calls() == []
    assert "not checked, as the label stage writes it: data.unlabeled.target.labels" in said
    subprocess.run(["sh", "-e", "-c", script], check=True)
    by_script = calls()
    Path(os.environ["SEEN"]).unlink()
    launch(arguments)
    assert calls() == by_script


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=tiny", "student.optim.encoder_l=1"], "student: .*optim.encoder_l"),
        (["recipe=tiny", "student.data.batch_size=13"], "student: data.batch_size=13"),
        (["recipe=tiny", "teacher.trainer.devices=3"], "teacher: data.batch_size=8.* 3 ranks"),
        (["recipe=tiny", "sbatch.nodes=2"], "sbatch.nodes=2: give trainer.num_nodes"),
        (["recipe=da_v1"], "teacher: data.labeled.*no such file"),
        (["recipe=da_v9"], r"recipe=da_v9: must be one of \['da_v1', 'da_v2', 'tiny'"),
        (["recipe=tiny", "dry_run=yes"], "dry_run=yes"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_nothing_is_submitted_when_a_stage_cannot_work(arguments, message, calls, capfd) -> None:
    assert main(arguments) == 1
    assert re.search(message, capfd.readouterr().err)
    assert calls() == []


def test_no_sbatch_and_an_sbatch_that_refuses(tmp_path: Path, calls, monkeypatch, capfd) -> None:
    refusing = "[ -e once ] && { echo no such partition >&2; exit 1; }; touch once; echo 7"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\n{refusing}\n")
    assert main(["recipe=tiny"]) == 1
    assert "teacher: no such partition (submitted before it: pretrain 7)" in capfd.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["recipe=tiny"]) == 1
    assert "no sbatch here" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["train", "label"])
def test_batch_scripts_are_shell(name: str) -> None:
    subprocess.run(["bash", "-n", TEMPLATES / f"{name}.sbatch"], check=True)
