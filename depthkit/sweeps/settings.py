"""Settings of a search."""

from dataclasses import dataclass, field
from typing import Any

from depthkit.config import check


@dataclass(kw_only=True)
class SearchConfig:
    """`hydra/sweeper=optuna`, written `hydra.sweeper.n_trials=40`. The study lies in the sweep's folder."""

    _target_: str = "hydra_plugins.depthkit_optuna.OptunaSweeper"
    _convert_: str = "all"
    params: dict[str, str] = field(default_factory=dict)  # setting -> range, in the words of the command line
    n_trials: int = 20  # in all, however often the command is repeated
    n_jobs: int = 1  # trials at a time; more than one needs a launcher that starts processes
    seed: int = 0
    sampler: str = "TPESampler"  # a class of optuna.samplers
    sampler_args: dict[str, Any] = field(default_factory=dict)
    pruner: str | None = "MedianPruner"  # a class of optuna.pruners, asked at each validation; null: none
    pruner_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self.n_trials > 0, "hydra.sweeper.n_trials", self.n_trials, "> 0")
        check(self.n_jobs > 0, "hydra.sweeper.n_jobs", self.n_jobs, "> 0")
