"""Running one of our configs through Hydra's command line."""

import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from depthkit.config import CONF_DIR, register_schemas, to_config
from depthkit.data.quarantine import QuarantineBudgetExceeded


def hydra_main(verb: str, argv: list[str], run: Callable[[Any], Any], *, config_name: str | None = None) -> int:
    """Compose `conf/CONFIG_NAME.yaml` with the overrides in `argv` and call `run` with the dataclass; the exit code.

    A mistake in the settings or the input is one message; any other exception keeps its traceback.
    """
    register_schemas()

    @hydra.main(config_path=str(CONF_DIR), config_name=config_name or verb, version_base="1.3")
    def entry(cfg: DictConfig) -> Any:
        try:
            return run(to_config(cfg))
        except (ValueError, OSError, QuarantineBudgetExceeded) as error:
            print(f"depthkit {verb}: {type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(1) from None

    sys.argv = [f"depthkit {verb}", *argv]
    entry()
    return 0
