"""Sweeps as a user runs them: lists, searches that are interrupted, trials that fail or are pruned, and the report."""

import csv
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from depthkit.__main__ import main
from depthkit.bundle import read_facts
from depthkit.checks import check_sizes, check_steps, check_streams
from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig
from depthkit.hydra_entry import hydra_main
from depthkit.sweeps import job, report, search
from depthkit.sweeps.pruning import report as report_value
from depthkit.sweeps.results import importances, read_sweep
from depthkit.sweeps.space import as_overrides, probes, split
from depthkit.sweeps.study import JOURNAL, load_study
from depthkit.train import run as run_training

optuna = pytest.importorskip("optuna", reason="pip install 'depthkit[sweep]'")

ROOT = Path(__file__).parents[1]
TINY = ["experiment=tiny_student"]
RATE = "optim.encoder_lr=tag(log,interval(1e-6,1e-2))"
OPTUNA = "hydra/sweeper=optuna"


def value_of(config: TrainConfig) -> float:
    """A validation value with its minimum at an encoder rate of 1e-4."""
    return 0.1 + (math.log10(config.optim.encoder_lr) + 4) ** 2 + config.optim.weight_decay


def quick(config: TrainConfig) -> float:
    """In the place of a training."""
    (Path(config.run_dir) / "bundle").mkdir(parents=True, exist_ok=True)
    return value_of(config)


def multirun(folder: Path, *overrides: str, run: Callable[[Any], Any] = quick) -> int:
    """The exit code of `depthkit train --multirun` in this process, `run` in the place of a training."""
    argv = sys.argv
    try:
        return hydra_main("train", ["--multirun", *TINY, f"run_dir={folder}", *overrides], run)
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv


def trials(folder: Path) -> list[Any]:
    return load_study(folder / JOURNAL).trials


def states(folder: Path) -> list[str]:
    return [trial.state.name for trial in trials(folder)]


# --- lists -----------------------------------------------------------------------------------------------------------


def test_failed_job_of_a_list_is_recorded_and_the_others_run(tmp_path, capsys):
    settings = ["optim.encoder_lr=1e-4,-1,1e-3"]
    assert multirun(tmp_path, *settings) == 1
    found = read_sweep(tmp_path)
    assert [(trial.state, trial.params) for trial in found.trials] == [
        ("complete", {"optim.encoder_lr": 1e-4}),
        ("failed", {"optim.encoder_lr": -1}),
        ("complete", {"optim.encoder_lr": 1e-3}),
    ]
    assert found.trials[0].value == pytest.approx(0.11)
    assert found.trials[1].error == "ConfigError: optim.encoder_lr=-1.0: must be >= 0"


def test_repeated_list_starts_every_job_in_its_folder(tmp_path):
    settings = ["optim.encoder_lr=1e-4,1e-3"]
    folders = []

    def remember(config: TrainConfig) -> float:
        folders.append((Path(config.run_dir).name, config.optim.encoder_lr))
        return quick(config)

    assert multirun(tmp_path, *settings, run=remember) == 0
    assert multirun(tmp_path, *settings, run=remember) == 0
    assert folders == [("0", 1e-4), ("1", 1e-3)] * 2


def test_job_leaves_nothing_in_the_process(tmp_path, monkeypatch):
    """Lightning writes its ranks into the environment; the next job would take itself for one of them."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def leave(config: TrainConfig) -> float:
        assert "LOCAL_RANK" not in os.environ
        os.environ["LOCAL_RANK"] = "0"
        return quick(config)

    assert multirun(tmp_path, "optim.encoder_lr=1e-4,1e-3", run=leave) == 0


# --- a search --------------------------------------------------------------------------------------------------------


def test_search_finds_the_minimum(tmp_path):
    assert multirun(tmp_path, OPTUNA, RATE, "hydra.sweeper.n_trials=16") == 0
    study = load_study(tmp_path / JOURNAL)
    assert len(study.trials) == 16
    assert 10**-4.5 < study.best_params["optim.encoder_lr"] < 10**-3.5
    rates = [trial.params["optim.encoder_lr"] for trial in study.trials]
    assert 1e-6 <= min(rates) < 1e-5 < 1e-3 < max(rates) <= 1e-2


def test_space_in_the_words_of_hydra(tmp_path):
    space = ["stage.loss=choice(affine_invariant,scale_shift_invariant)", "data.crop_size=choice([32,32],[64,32])"]
    space += ["optim.warmup_steps=int(interval(0,7))", "stage.drop_fraction=range(0,0.5,0.1)", "seed=range(2,9,3)"]
    space += ["stage.gradient_matching_weight=0,0.5,2", "optim.weight_decay=interval(0.1,0.2)"]
    seen: list[TrainConfig] = []

    def look(config: TrainConfig) -> float:
        seen.append(config)
        return quick(config)

    assert multirun(tmp_path, OPTUNA, *space, "hydra.sweeper.n_trials=8", run=look) == 0
    assert {config.stage.loss.value for config in seen} == {"affine_invariant", "scale_shift_invariant"}
    assert {tuple(config.data.crop_size) for config in seen} == {(32, 32), (64, 32)}
    assert {config.optim.warmup_steps for config in seen} <= set(range(8))
    assert {round(config.stage.drop_fraction, 6) for config in seen} <= {0.0, 0.1, 0.2, 0.3, 0.4}
    assert {config.seed for config in seen} <= {2, 5, 8}
    assert {config.stage.gradient_matching_weight for config in seen} <= {0.0, 0.5, 2.0}
    assert all(0.1 <= config.optim.weight_decay <= 0.2 for config in seen)


def test_repeated_search_goes_on_where_it_was(tmp_path):
    """Which settings are tried does not depend on interruptions."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert multirun(once, OPTUNA, RATE, "hydra.sweeper.n_trials=12") == 0
    for count in (3, 11, 12, 12):
        assert multirun(twice, OPTUNA, RATE, f"hydra.sweeper.n_trials={count}") == 0
        assert len(trials(twice)) == count
    assert [trial.params for trial in trials(twice)] == [trial.params for trial in trials(once)]
    assert multirun(tmp_path / "other", OPTUNA, RATE, "hydra.sweeper.n_trials=1", "hydra.sweeper.seed=1") == 0
    assert trials(tmp_path / "other")[0].params != trials(once)[0].params


def test_failed_trials_are_recorded_and_the_search_goes_on(tmp_path, capsys):
    def fail(config: TrainConfig) -> float:
        number = int(Path(config.run_dir).name)
        if number == 1:
            raise RuntimeError("out of memory")
        return math.nan if number == 2 else quick(config)

    space = ["optim.weight_decay=choice(0.1)", RATE]
    assert multirun(tmp_path, OPTUNA, *space, "hydra.sweeper.n_trials=4", run=fail) == 1
    assert states(tmp_path) == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert job.read_record(tmp_path / "1").error == "RuntimeError: out of memory"
    assert "trial 2: failed: validation AbsRel is nan" in capsys.readouterr().err
    assert multirun(tmp_path, OPTUNA, *space, "hydra.sweeper.n_trials=5") == 1, "the study has failed trials"
    assert states(tmp_path)[4] == "COMPLETE"


def test_interrupted_trial_goes_on_in_its_folder(tmp_path):
    started = []

    def interrupt(config: TrainConfig) -> float:
        started.append((Path(config.run_dir).name, config.optim.encoder_lr))
        if len(started) == 2:
            raise SystemExit(7)  # what Lightning makes of Ctrl-C
        return quick(config)

    arguments = [OPTUNA, RATE, "hydra.sweeper.n_trials=3"]
    assert multirun(tmp_path, *arguments, run=interrupt) == 7
    assert states(tmp_path) == ["COMPLETE", "RUNNING"]
    assert multirun(tmp_path, *arguments, run=interrupt) == 0
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert [name for name, _ in started] == ["0", "1", "1", "2"]
    assert started[1] == started[2]


def test_trial_that_always_kills_the_search_is_given_up(tmp_path):
    def stop(config: TrainConfig) -> float:
        raise SystemExit(9)

    arguments = [OPTUNA, RATE, "hydra.sweeper.n_trials=2"]
    assert multirun(tmp_path, *arguments, run=stop) == 9
    assert job.read_record(tmp_path / "0").deaths == 0, "a preempted trial may stop as often as it likes"
    job.JobRecord(deaths=search.MAX_DEATHS).write(tmp_path / "0")
    assert multirun(tmp_path, *arguments) == 1
    assert states(tmp_path) == ["FAIL", "COMPLETE"]
    assert job.read_record(tmp_path / "0").error == "its process was killed 3 times"


def test_preempted_search_stops_and_goes_on_when_repeated(tmp_path):
    """A run that ends without a bundle was told to stop."""
    stop = [True]
    arguments = [OPTUNA, RATE, "hydra.sweeper.n_trials=2"]
    assert multirun(tmp_path, *arguments, run=lambda config: None if stop else quick(config)) == 1
    assert states(tmp_path) == ["RUNNING"]
    stop.clear()
    assert multirun(tmp_path, *arguments, run=lambda config: None if stop else quick(config)) == 0
    assert states(tmp_path) == ["COMPLETE"] * 2


def test_torn_line_of_a_killed_writer_is_dropped(tmp_path):
    arguments = [OPTUNA, RATE]
    assert multirun(tmp_path, *arguments, "hydra.sweeper.n_trials=2") == 0
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker')
    assert multirun(tmp_path, *arguments, "hydra.sweeper.n_trials=3") == 0
    assert states(tmp_path) == ["COMPLETE"] * 3


KILLED = """
import os, signal, sys
from pathlib import Path
from depthkit.hydra_entry import hydra_main
from test_sweeps import quick

def run(config):
    if Path(config.run_dir).name == "1" and not Path(config.run_dir, "again").exists():
        Path(config.run_dir, "again").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return quick(config)

hydra_main("train", sys.argv[1:], run)
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | more


@pytest.mark.slow
def test_killed_search_goes_on(tmp_path):
    arguments = ["--multirun", *TINY, f"run_dir={tmp_path / 's'}", OPTUNA, RATE, "hydra.sweeper.n_trials=3"]
    command = [sys.executable, "-c", KILLED, *arguments]
    codes = [subprocess.run(command, cwd=tmp_path, env=environment(), timeout=300).returncode for _ in range(2)]
    assert codes == [-9, 0]
    assert states(tmp_path / "s") == ["COMPLETE"] * 3
    assert job.read_record(tmp_path / "s" / "1").deaths == 1


# --- refused before a trial starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing to search", "interval"]),
        (["optim.encoder_rl=interval(1e-6,1e-4)"], ["encoder_rl"]),
        (["+optim.rate=interval(1e-6,1e-4)"], ["unknown setting", "optim.rate"]),
        (["model=tiny,vits,vitx"], ["vitx"]),
        ([RATE, "hydra.sweeper.n_trails=3"], ["n_trails"]),
        ([RATE, "hydra.sweeper.n_trials=0"], ["n_trials=0"]),
        ([RATE, "hydra.sweeper.n_jobs=2"], ["n_jobs=2", "launcher"]),
        ([RATE, "hydra.sweeper.sampler=TPE"], ["sampler='TPE'", "TPESampler"]),
        ([RATE, "hydra.sweeper.pruner=Median"], ["pruner='Median'", "MedianPruner"]),
        ([RATE, "~data.val.source"], ["data.val", "+dataset@data.val.NAME"]),
        (["optim.encoder_lr=tag(log,interval(0,1))"], ["tag(log,interval(0,1))"]),
    ],
    ids=lambda value: value[-1] if value else "empty",
)
def test_search_that_cannot_work_is_refused(tmp_path, capsys, arguments, words):
    def never(config: TrainConfig) -> float:
        raise AssertionError("a trial was started")

    assert multirun(tmp_path, OPTUNA, *arguments, run=never) == 1
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("0"))


def test_search_without_optuna_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("depthkit.sweeps.study.find_spec", lambda name: None)
    assert multirun(tmp_path, OPTUNA, RATE) == 1
    assert "pip install 'depthkit[sweep]'" in capsys.readouterr().err


def test_study_of_other_settings_is_refused(tmp_path, capsys):
    arguments = [OPTUNA, RATE, "hydra.sweeper.n_trials=1"]
    assert multirun(tmp_path, *arguments, "stage.loss=choice(affine_invariant)") == 0
    assert multirun(tmp_path, *arguments, "stage.loss=choice(affine_invariant)", "trainer.max_steps=7") == 1
    assert "trainer.max_steps: was 1500, is 7" in capsys.readouterr().err
    assert multirun(tmp_path, *arguments, "stage.loss=choice(affine_invariant,scale_shift_invariant)") == 1
    assert "stage.loss: was CategoricalDistribution" in capsys.readouterr().err
    assert multirun(tmp_path, *arguments, "stage.loss=choice(affine_invariant)", "trainer.log_every_n_steps=3") == 0


def test_second_process_in_a_folder_is_refused(tmp_path, capsys):
    def again(config: TrainConfig) -> float:
        command = [sys.executable, "-c", "import sys; from depthkit.sweeps.study import own_study\n"
                   "from pathlib import Path\nwith own_study(Path(sys.argv[1])): pass"]  # fmt: skip
        result = subprocess.run(
            [*command, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=100
        )
        assert "another process searches here" in result.stderr
        return quick(config)

    assert multirun(tmp_path, OPTUNA, RATE, "hydra.sweeper.n_trials=1", run=again) == 0


# --- trials that others are ahead of ---------------------------------------------------------------------------------


def test_pruner_ends_a_trial_that_is_behind(tmp_path):
    """The study as the callback sees it: five trials are at 0.1 at step 2, the sixth is at 0.2."""

    def validate(config: TrainConfig) -> float | None:
        assert config.callbacks["pruning"]["journal"] == str(tmp_path / JOURNAL)
        number = int(Path(config.run_dir).name)
        is_pruned = report_value(
            tmp_path / JOURNAL, config.callbacks["pruning"]["trial"], 2, 0.2 if number == 5 else 0.1
        )
        return None if is_pruned else quick(config)

    assert multirun(tmp_path, OPTUNA, RATE, "hydra.sweeper.n_trials=7", run=validate) == 0
    assert states(tmp_path) == ["COMPLETE"] * 5 + ["PRUNED", "COMPLETE"]
    pruned = read_sweep(tmp_path).trials[5]
    assert (pruned.state, pruned.value, pruned.step) == ("pruned", 0.2, 2)


def test_search_without_a_pruner_adds_no_callback(tmp_path):
    def look(config: TrainConfig) -> float:
        assert "pruning" not in config.callbacks
        return quick(config)

    assert multirun(tmp_path, OPTUNA, RATE, "hydra.sweeper.n_trials=1", "hydra.sweeper.pruner=null", run=look) == 0


@pytest.mark.slow
def test_pruned_training_stops_at_its_validation(tiny_config, tmp_path):
    """All trials before were at a value that no training reaches."""
    study = load_study(tmp_path / JOURNAL)
    study.set_user_attr("pruner", {"name": "MedianPruner", "args": {"n_startup_trials": 1}})
    study.add_trial(optuna.trial.create_trial(value=1e-6, intermediate_values={2: 1e-6, 4: 1e-6}))
    assert study.ask().number == 1
    callback = f"+callbacks.pruning={{_target_:depthkit.sweeps.pruning.Pruning,journal:'{tmp_path / JOURNAL}',trial:1}}"
    config = tiny_config("student", tmp_path / "1", "trainer.val_check_interval=2", callback)
    seen: list[float] = []

    class Look(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.extend(float(value) for key, value in trainer.callback_metrics.items() if key.endswith("/abs_rel"))

    assert run_training(config, [Look()]) is None
    assert not (tmp_path / "1" / "bundle").exists()
    (_, trial) = trials(tmp_path)
    assert trial.state.name == "PRUNED"
    assert list(trial.intermediate_values) == [2]
    assert seen == [pytest.approx(trial.intermediate_values[2])]


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
