"""`hydra/launcher=slurm`: Hydra takes plugins from this package alone."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SlurmTrials(Launcher):
    """Submits each job by itself: the stock launcher submits them as one, and if one is killed none gives its result.
    Here that one is a failed job, which the sweep reports when all have ended."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        self.one = SlurmLauncher(**self.settings)
        self.one.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        def launch(number: int, overrides: Sequence[str]) -> JobReturn:
            try:
                (job,) = self.one.launch([overrides], number)
            except Exception as error:  # of any kind, in the job or on the way back
                job = JobReturn(overrides=overrides, status=JobStatus.FAILED)
                job.return_value = error
            return job

        with ThreadPoolExecutor(self.settings["array_parallelism"]) as pool:
            return list(pool.map(launch, range(initial_job_idx, initial_job_idx + len(job_overrides)), job_overrides))
