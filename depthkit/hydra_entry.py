"""Running one of our configs through Hydra's command line."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR
from depthkit.runtime.quiet import keep_back_noise
from depthkit.sweeps.job import run_job
from depthkit.types import BudgetExceeded


def hydra_main(
    verb: str,
    argv: list[str],
    run: Callable[[Any], Any],
    *,
    config_name: str | None = None,
    convert: Callable[[DictConfig], Any] = to_config,
) -> int:
    """Compose `conf/CONFIG_NAME.yaml` with the overrides in `argv` and call `run` with the dataclass; the exit code.

    A mistake in the settings or the input is one message; any other exception keeps its traceback, and so does every
    one with HYDRA_FULL_ERROR=1. A job of a sweep that fails leaves its error in `job.json`, and the sweep goes on.
    """
    register_schemas()
    keep_back_noise()
    script = sys.argv[0]

    @hydra.main(config_path=str(CONF_DIR), config_name=config_name or verb, version_base="1.3")
    def entry(cfg: DictConfig) -> Any:
        # Lightning starts the other ranks of a node by repeating this command.
        sys.argv = [script, verb, *job_overrides(cfg)]
        job = HydraConfig.get()
        if job.mode is RunMode.MULTIRUN:  # Hydra keeps an exception and goes on with the next job
            return run_job(Path(job.runtime.output_dir), lambda: run(convert(cfg)))
        try:
            return run(convert(cfg))
        except (ValueError, OSError, BudgetExceeded) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"depthkit {verb}: {type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    sys.argv = [f"depthkit {verb}", *argv]
    entry()
    return 0


def job_overrides(cfg: DictConfig) -> list[str]:
    """The overrides of this job; one of a sweep gets its own `run_dir`, which is changed in `cfg` too."""
    job = HydraConfig.get()
    folders = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    overrides = [*(f"--config-dir={folder}" for folder in folders), *job.overrides.task]
    if job.mode is RunMode.MULTIRUN and "run_dir" in cfg:
        cfg.run_dir = job.runtime.output_dir
        overrides.append(f"run_dir='{cfg.run_dir}'")
    return overrides
