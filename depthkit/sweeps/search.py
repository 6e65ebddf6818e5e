"""A search by Optuna as a sweep of Hydra: ask for settings, launch, tell the result; the study says where it stands."""

import math
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from depthkit.compose import unknown_keys
from depthkit.config import ConfigError, check
from depthkit.run_folder import MAY_DIFFER_ON_RESUME, flatten
from depthkit.sweeps.job import read_record
from depthkit.sweeps.settings import SearchConfig
from depthkit.sweeps.space import Space, as_overrides, probes, split
from depthkit.sweeps.study import JOURNAL, need_optuna, own_study

if TYPE_CHECKING:
    import optuna

MAX_DEATHS = 3
"""Times that a trial may die with its process; one that runs out of memory must not kill the search for ever."""


def search(
    settings: dict[str, Any],
    arguments: list[str],
    context: HydraContext,
    task_function: TaskFunction,
    master: DictConfig,
) -> None:
    """Run the trials that the study in the sweep's folder still lacks; SystemExit(1) if any trial of it has failed."""
    try:
        need_optuna()
        config = SearchConfig(**settings)
        parser = OverridesParser.create(config_loader=context.config_loader)
        given = [*as_overrides(config.params), *arguments]
        fixed, space = split(parser.parse_overrides(given))
        composed = [compose(context, master, [*fixed, *as_overrides(point)]) for point in probes(space)]
        check_search(config, composed)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=task_function, config=master
        )
        folder = Path(str(master.hydra.sweep.dir)).resolve()
        with own_study(folder) as study:
            keep_search_settings(study, folder, composed[0], space)
            ok = Search(config, folder, study, fixed, space, launcher).run()
    except ConfigError as error:
        print(f"depthkit: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    if not ok:
        raise SystemExit(1)


def compose(context: HydraContext, master: DictConfig, overrides: list[str]) -> DictConfig:
    """The settings of one trial; an error of Hydra names what is misspelt or of a wrong type."""
    composed: DictConfig = context.config_loader.load_sweep_config(master, overrides)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def check_search(config: SearchConfig, composed: list[DictConfig]) -> None:
    import optuna

    for where, field_name, name in (
        (optuna.samplers, "sampler", config.sampler),
        (optuna.pruners, "pruner", config.pruner),
    ):
        known = [each for each in where.__all__ if each.endswith(field_name.capitalize())]
        check(name is None or name in known, f"hydra.sweeper.{field_name}", name, "one of " + ", ".join(known))
    unknown = sorted({key for each in composed for key in unknown_keys(each)})
    check(not unknown, "unknown setting", ", ".join(unknown), "one of those that `--cfg job` prints")
    allowed = "a data set with ground truth, the judge of a trial: +dataset@data.val.NAME=DATASET"
    check(all(each.data.val for each in composed), "data.val", {}, allowed)


def keep_search_settings(study: "optuna.Study", folder: Path, composed: DictConfig, space: Space) -> None:
    """Write down what all trials share; ConfigError if the study is one of other settings."""
    from optuna.distributions import check_distribution_compatibility

    text = OmegaConf.to_yaml(composed)
    before, now = (flatten(OmegaConf.create(each)) for each in (study.user_attrs.get("settings", text), text))
    different = [
        f"{key}: was {before.get(key)}, is {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in space and not key.startswith(MAY_DIFFER_ON_RESUME)
    ]
    for trial in study.get_trials(deepcopy=False)[-1:]:
        for key in trial.distributions.keys() & space.keys():
            try:
                check_distribution_compatibility(trial.distributions[key], space[key])
            except ValueError:
                different.append(f"{key}: was {trial.distributions[key]}, is {space[key]}")
    if different:
        raise ConfigError(
            f"{folder} holds a search with other settings:\n  " + "\n  ".join(different) + "\n"
            "Choose another folder with hydra.sweep.dir=DIR"
        )
    study.set_user_attr("settings", text)


class Search:
    """Trials of one study, `n_jobs` at a time. Only this process asks and tells; the trials themselves report."""

    def __init__(
        self,
        config: SearchConfig,
        folder: Path,
        study: "optuna.Study",
        fixed: list[str],
        space: Space,
        launcher: Launcher,
    ) -> None:
        self.config, self.folder, self.study = config, folder, study
        self.fixed, self.space, self.launcher = fixed, space, launcher
        self.in_process = type(launcher).__name__ == "BasicLauncher"  # Hydra loads plugins twice: two classes
        allowed = "1 with the basic launcher, which runs jobs in this process; see hydra/launcher=submitit_local"
        check(config.n_jobs == 1 or not self.in_process, "hydra.sweeper.n_jobs", config.n_jobs, allowed)
        if config.pruner:
            study.set_user_attr("pruner", {"name": config.pruner, "args": config.pruner_args})
        self.lock = threading.Lock()
        self.stopped = False
        self.waiting = self.of_state("RUNNING")  # of an earlier process that was killed

    def of_state(self, *names: str) -> list[int]:
        return [trial.number for trial in self.study.get_trials(deepcopy=False) if trial.state.name in names]

    def run(self) -> bool:
        """True if every trial is there and none has failed."""
        if self.waiting:
            print(f"{self.folder}: going on with interrupted trials {self.waiting}")
        if self.config.n_jobs == 1:  # in the main thread, where signals arrive
            self.work()
        else:
            threads = [threading.Thread(target=self.work, daemon=True) for _ in range(self.config.n_jobs)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        counts = {name.lower(): len(self.of_state(name)) for name in ("COMPLETE", "PRUNED", "FAIL", "RUNNING")}
        print(f"{self.folder}: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count))
        if counts["complete"]:
            print(f"best: {self.study.best_value:.6g}, trial {self.study.best_trial.number}")
        print(f"  depthkit sweep-report {self.folder}")
        return not counts["fail"] and not counts["running"]

    def work(self) -> None:
        while (number := self.next_trial()) is not None:
            self.run_trial(number)

    def next_trial(self) -> int | None:
        import optuna

        with self.lock:
            if self.stopped:
                return None
            if self.waiting:
                return self.waiting.pop(0)
            count = len(self.study.get_trials(deepcopy=False))
            if count >= self.config.n_trials:
                return None
            # A seed per trial: what is drawn does not depend on how often the search was interrupted.
            sampler = getattr(optuna.samplers, self.config.sampler)
            self.study.sampler = sampler(seed=self.config.seed + count, **self.config.sampler_args)
            return self.study.ask(self.space).number

    def run_trial(self, number: int) -> None:
        """Launch a trial, tell its result."""
        folder = self.folder / str(number)
        if read_record(folder).deaths >= MAX_DEATHS:
            self.fail(number, f"its process was killed {MAX_DEATHS} times")
            return
        overrides = [*self.fixed, *as_overrides(self.study.trials[number].params), f"hydra.sweep.subdir={number}"]
        if self.config.pruner:
            pruning = "{_target_:depthkit.sweeps.pruning.Pruning,journal:'%s',trial:%d}"
            overrides.append("+callbacks.pruning=" + pruning % (self.folder / JOURNAL, number))
        try:
            (job,) = self.launcher.launch([overrides], initial_job_idx=number)
            value = job.return_value
        except Exception as error:
            self.fail(number, f"{type(error).__name__}: {error}")
            return
        if number in self.of_state("PRUNED"):
            print(f"trial {number}: pruned")
        elif value is None and not (folder / "bundle").is_dir():
            self.put_back(number)
        elif value is None or not math.isfinite(value):
            self.fail(number, f"validation AbsRel is {value}")
        else:
            self.study.tell(number, value)
            print(
                f"trial {number}: {value:.6g} (best {self.study.best_value:.6g}, trial {self.study.best_trial.number})"
            )

    def fail(self, number: int, reason: str) -> None:
        import optuna

        record = read_record(self.folder / str(number))
        record.error = record.error or reason[:2000]
        record.write(self.folder / str(number))
        self.study.tell(number, state=optuna.trial.TrialState.FAIL)
        print(f"trial {number}: failed: {record.error}", file=sys.stderr)

    def put_back(self, number: int) -> None:
        """A trial that stopped before its last step: preempted. In this process, so are all that would follow."""
        print(f"trial {number}: stopped before its last step; it goes on from its checkpoint")
        with self.lock:
            if self.in_process:
                self.stopped = True
            else:
                self.waiting.append(number)
