"""Sweeps as a user runs them: lists, searches that are interrupted, trials that fail or are pruned."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from depthkit.config import TrainConfig
from depthkit.hydra_entry import hydra_main
from depthkit.sweeps import job, search
from depthkit.sweeps.pruning import report as report_value
from depthkit.sweeps.results import read_sweep
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
