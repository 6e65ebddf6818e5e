"""Ready sweeps, what a sweep leaves to look at, wandb's agent, and the page that describes them."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_sweeps import OPTUNA, RATE, ROOT, environment, multirun, quick, trials, value_of

from depthkit.__main__ import main
from depthkit.bundle import read_facts
from depthkit.checks import check_sizes, check_steps, check_streams
from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig
from depthkit.hydra_entry import hydra_main
from depthkit.sweeps import report
from depthkit.sweeps.pruning import report as report_value
from depthkit.sweeps.results import importances, read_sweep
from depthkit.sweeps.space import as_overrides, probes, split
from depthkit.sweeps.study import JOURNAL
from depthkit.train import run as run_training

pytest.importorskip("optuna", reason="pip install 'depthkit[sweep]'")


# --- the ready ones --------------------------------------------------------------------------------------------------


def composed_points(name: str, experiment: str) -> list[TrainConfig]:
    """The points of a ready sweep at which every choice and both ends of every range occur."""
    register_schemas()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        base = [f"experiment={experiment}", f"sweep={name}"]
        whole = hydra.compose("train", base, return_hydra_config=True)
        space = split(OverridesParser.create().parse_overrides(as_overrides(dict(whole.hydra.sweeper.params))))[1]
        return [to_config(hydra.compose("train", [*base, *as_overrides(point)])) for point in probes(space)]


@pytest.mark.parametrize("experiment", ["tiny_student", "da_v1_student"])
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF_DIR / "sweep").glob("*.yaml")))
def test_ready_sweep_works_with(name, experiment):
    configs = composed_points(name, experiment)
    assert len(configs) > 1
    for config in configs:
        check_streams(config)
        check_sizes(config)
        check_steps(config)
    assert all(configs[0] != other for other in configs[1:])


@pytest.mark.parametrize("path", sorted((CONF_DIR / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_command_in_the_head_of_a_ready_sweep(path, compose):
    commands = [line for line in path.read_text().splitlines() if line.startswith("#   depthkit train --multirun ")]
    assert len(commands) == 2
    for line in commands:
        assert compose(*line.split()[4:]).data.val, "nothing to judge a trial by"


def test_ready_grid_runs_every_combination_in_a_folder_of_its_own(tmp_path):
    assert multirun(tmp_path / "student", "sweep=tolerance", "stage.tolerance_margin=0.1,0.2") == 0
    found = read_sweep(tmp_path / "student_tolerance")
    assert [tuple(trial.params.values()) for trial in found.trials] == [
        (margin, strength) for margin in (0.1, 0.2) for strength in (0.25, 0.5, 0.75)
    ]


# --- the report ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A search with complete, pruned and failed trials."""
    folder = tmp_path_factory.mktemp("searched")

    def run(config: TrainConfig) -> float | None:
        number = int(Path(config.run_dir).name)
        if number == 3:
            raise RuntimeError("out of memory")
        if number == 8 and report_value(folder / JOURNAL, number, 250, 99.0):
            return None
        assert number == 8 or not report_value(folder / JOURNAL, number, 250, 1.0)
        return quick(config)

    space = [RATE, "stage.loss=choice(affine_invariant,scale_shift_invariant)"]
    assert multirun(folder, OPTUNA, *space, "hydra.sweeper.n_trials=13", "optim.weight_decay=0.02", run=run) == 1
    return folder


def test_report_shows_every_trial(searched, tmp_path, capsys):
    assert report.main([str(searched), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "pruned at 250" in shown
    assert "trial 3: RuntimeError: out of memory" in shown
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows if row["state"] != "complete"] == ["failed", "pruned"]
    assert len(rows) == 13
    best = min((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["value"]))
    assert f"best: trial {best['trial']}" in shown
    for name in ("parallel_coordinates", "history", "importance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_best_settings_are_an_experiment(searched, tmp_path):
    """The file composes to the settings of the best trial, whatever stands in conf by then."""
    assert report.main([str(searched), "--out", str(tmp_path)]) == 0
    ran = []
    argv, sys.argv = sys.argv, sys.argv
    try:
        assert hydra_main("train", ["--config-dir", str(tmp_path), "experiment=best"], ran.append) == 0
    finally:
        sys.argv = argv
    (config,) = ran
    best = read_sweep(searched).complete[0]
    assert value_of(config) == pytest.approx(best.value)
    expected = OmegaConf.load(searched / str(best.number) / "hydra" / "config.yaml")
    expected.run_name, expected.run_dir = f"{searched.name}_best", "${paths.runs}/${run_name}"
    del expected.callbacks["pruning"]
    assert OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True) == OmegaConf.to_container(
        expected, resolve=True
    )


def test_importance_names_what_matters(searched):
    found = importances(read_sweep(searched))
    assert found["optim.encoder_lr"] > 0.8 > found["stage.loss"]


def test_report_of_a_folder_without_a_sweep(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    assert "no sweep" in capsys.readouterr().err


def test_report_of_a_sweep_without_a_complete_trial(tmp_path, capsys):
    def fail(config: TrainConfig) -> float:
        raise ValueError("nothing works")

    assert multirun(tmp_path, "optim.encoder_lr=1e-4,1e-3", run=fail) == 1
    assert report.main([str(tmp_path)]) == 0
    assert "no trial is complete" in capsys.readouterr().out


# --- wandb -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_of_a_wandb_agent_logs_the_metric_of_the_sweep(tiny_settings, tmp_path, monkeypatch):
    """What `wandb agent` starts for one trial of scripts/wandb_sweep.yaml, as wandb itself makes the command of it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    settings = OmegaConf.to_container(OmegaConf.load(ROOT / "scripts" / "wandb_sweep.yaml"), resolve=False)
    values = {"optim.encoder_lr": 1e-05, "optim.decoder_lr_multiplier": 7.5, "stage.tolerance_margin": 0.1}
    assert values.keys() == settings["parameters"].keys()
    arguments = {name: {"value": value} for name, value in values.items()}
    macros = create_sweep_command_args({"args": arguments}) | {"env": ["/usr/bin/env"]}
    command = []
    for part in create_sweep_command(list(settings["command"])):
        is_macro = part.startswith("${") and part.endswith("}")
        command += macros[part[2:-1]] if is_macro else [part]
    assert command[:3] == ["/usr/bin/env", settings["program"], "train"]
    tiny = [item for item in tiny_settings("student", tmp_path) if not item.startswith(("run_dir", "optim"))]
    tiny += ["optim.warmup_steps=0", "trainer.val_check_interval=3", "stage.encoder_weights=null"]
    offline = environment(WANDB_MODE="offline", WANDB_RUN_ID="abc123", WANDB_SWEEP_ID="s1", WANDB_SILENT="true")
    start = [sys.executable, "-m", "depthkit", *command[2:], *tiny]
    result = subprocess.run(start, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "runs" / "wandb_sweep" / "abc123"
    settings_of_run = OmegaConf.load(run_dir / "config.yaml")
    assert settings_of_run.optim.encoder_lr == 1e-5
    assert settings_of_run.stage.tolerance_margin == 0.1
    (record,) = run_dir.rglob("run-*.wandb")
    assert settings["metric"]["name"].encode() in record.read_bytes()


# --- the page --------------------------------------------------------------------------------------------------------


def test_commands_of_the_page(tmp_path, monkeypatch, capsys):
    """docs/sweeps.md from top to bottom, `quick` in the place of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("depthkit.train.run", quick)
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "sweeps.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    assert len(lines) == 7
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert main() == 0, line
    assert len(list(Path("runs/tiny_student").glob("*/job.json"))) == 4
    assert len(list(Path("runs/tiny_student_tolerance").glob("*/job.json"))) == 6
    assert len(trials(Path("runs/tiny_student_learning_rate"))) == 6
    assert "experiment=best" in capsys.readouterr().out
    assert Path("runs/tiny_student_learning_rate_best/bundle").is_dir()
    assert len(trials(Path("runs/weights"))) == 3


@pytest.mark.slow
def test_search_that_trains(tiny_settings, tmp_path, capsys):
    """Real trainings: the value is that of the bundle, the report names its protocol, the best settings train again."""
    folder = tmp_path / "search"
    settings = [*tiny_settings("student", folder), OPTUNA, "stage.tolerance_margin=interval(0.1,0.2)"]
    settings += ["trainer.max_steps=2", "trainer.val_check_interval=1", "hydra.sweeper.n_trials=2"]
    argv, sys.argv = sys.argv, sys.argv
    try:
        assert hydra_main("train", ["--multirun", *settings], run_training) == 0
        assert report.main([str(folder)]) == 0
        again = ["--config-dir", str(folder / "report"), "experiment=best", f"run_dir={tmp_path / 'again'}"]
        assert hydra_main("train", again, run_training) == 0
    finally:
        sys.argv = argv
    sweep = read_sweep(folder)
    assert sweep.metric.startswith("val/affine_disparity@")
    metrics = read_facts(folder / "0" / "bundle").provenance["metrics"]
    assert sweep.trials[0].value == metrics[sweep.metric]
    assert all(list(trial.intermediate_values) == [1] for trial in trials(folder))
    assert read_facts(tmp_path / "again" / "bundle").provenance["metrics"][sweep.metric] == sweep.complete[0].value
