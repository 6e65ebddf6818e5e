"""What a sweep has found out, read from its folder: lists and searches alike."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from depthkit.bundle import read_facts
from depthkit.sweeps.job import read_record
from depthkit.sweeps.study import JOURNAL, load_study, need_optuna


@dataclass(kw_only=True)
class Trial:
    number: int
    state: str  # complete | pruned | failed | unfinished: running, or killed and not started again
    params: dict[str, Any]
    value: float | None = None  # of a complete trial; of a pruned one the last that it reported
    step: int | None = None  # at which a pruned trial ended
    seconds: float = 0.0
    error: str = ""


@dataclass(kw_only=True)
class Sweep:
    folder: Path
    trials: list[Trial]
    log_params: set[str] = field(default_factory=set)  # searched on a logarithmic scale

    @property
    def complete(self) -> list[Trial]:
        """Best first."""
        return sorted((each for each in self.trials if each.state == "complete"), key=lambda each: each.value or 0.0)

    @property
    def params(self) -> list[str]:
        return list(dict.fromkeys(key for trial in self.trials for key in trial.params))

    @property
    def metric(self) -> str:
        """The metric that was minimised, with its protocol."""
        for trial in self.complete:
            bundle = self.folder / str(trial.number) / "bundle"
            if (bundle / "model.json").is_file():
                names = [name for name in read_facts(bundle).provenance["metrics"] if name.endswith("/abs_rel")]
                return names[0] if names else "value"
        return "value"


def read_sweep(folder: Path) -> Sweep:
    """ValueError where the folder is not that of a sweep."""
    sweep = read_search(folder) if (folder / JOURNAL).is_file() else read_lists(folder)
    if not sweep.trials:
        raise ValueError(f"{folder}: no sweep; give the folder of `depthkit train --multirun`, which holds 0, 1, ...")
    return sweep


def read_search(folder: Path) -> Sweep:
    need_optuna()
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    trials, log_params = [], set()
    for each in load_study(folder / JOURNAL).trials:
        record = read_record(folder / str(each.number))
        log_params |= {key for key, values in each.distributions.items() if getattr(values, "log", False)}
        trials.append(
            Trial(
                number=each.number,
                state=states.get(each.state.name, "unfinished"),
                params=dict(each.params),
                value=each.value if each.value is not None else each.intermediate_values.get(each.last_step or 0),
                step=each.last_step if each.state.name == "PRUNED" else None,
                seconds=record.seconds,
                error=record.error or "",
            )
        )
    return Sweep(folder=folder, trials=trials, log_params=log_params)


def read_lists(folder: Path) -> Sweep:
    """The settings that differ between the jobs are the parameters."""
    trials = []
    for path in sorted(folder.glob("[0-9]*/hydra/overrides.yaml"), key=lambda path: int(path.parents[1].name)):
        job = path.parents[1]
        record = read_record(job)
        given = dict(str(item).split("=", 1) for item in OmegaConf.load(path) if "=" in str(item))
        trials.append(
            Trial(
                number=int(job.name),
                state="failed" if record.error else "unfinished" if record.value is None else "complete",
                params={key: as_value(text) for key, text in given.items()},
                value=record.value,
                seconds=record.seconds,
                error=record.error or "",
            )
        )
    for key, value in dict(trials[0].params).items() if trials else ():
        if all(key in trial.params and trial.params[key] == value for trial in trials):
            for trial in trials:
                del trial.params[key]
    sweep = Sweep(folder=folder, trials=trials)
    for key in sweep.params:
        values = [trial.params.get(key) for trial in trials]
        numbers = [value for value in values if isinstance(value, int | float) and value > 0]
        if len(numbers) == len(values) and max(numbers) >= 100 * min(numbers):
            sweep.log_params.add(key)
    return sweep


def as_value(text: str) -> Any:
    """A value of the command line; YAML alone would read 1e-5 as a text."""
    container: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
    return container["value"]


def importances(sweep: Sweep) -> dict[str, float]:
    """Share of each parameter in what makes the best tenth of the complete trials (PED-ANOVA, arXiv 2304.10255).

    Empty without Optuna, below ten complete trials or for a single parameter: it would say nothing.
    """
    try:
        import optuna
    except ImportError:
        return {}
    if len(sweep.complete) < 10 or len(sweep.params) < 2:
        return {}
    study = optuna.create_study()
    for trial in sweep.complete:
        distributions = {key: span(sweep, key) for key in trial.params}
        params = {key: value if is_number(value) else str(value) for key, value in trial.params.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.value))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def span(sweep: Sweep, key: str) -> Any:
    """The range that the values of a parameter cover."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    values = [trial.params[key] for trial in sweep.trials if key in trial.params]
    if not all(map(is_number, values)):
        return CategoricalDistribution(sorted({value if is_number(value) else str(value) for value in values}, key=str))
    return FloatDistribution(float(min(values)), float(max(values)), log=key in sweep.log_params)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
