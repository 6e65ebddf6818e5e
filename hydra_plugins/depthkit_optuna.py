"""`hydra/sweeper=optuna`: Hydra takes plugins from this package alone. The search: `depthkit.sweeps.search`."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class OptunaSweeper(Sweeper):
    """A search over settings by Optuna; its settings are `depthkit.config.SearchConfig`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.parts = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        from depthkit.sweeps.search import search

        search(self.settings, arguments, *self.parts)
