"""The folder of a run: its settings, what earlier runs left there, and the checkpoint to go on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from depthkit.config import ConfigError, TrainConfig
from depthkit.files import atomic_write
from depthkit.runtime.checkpoint import newest_checkpoint

MAY_DIFFER_ON_RESUME = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.val_check_interval",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.enable",
    "data.num_workers",
    "data.quarantine_budget",
    "data.val",
    "logger",
    "callbacks",
    "resume",
    "run_dir",
    "run_name",
    "paths",
)
"""Settings that change neither the batches nor the mathematics."""


def set_aside(run_dir: Path) -> None:
    """Move the results of earlier runs in this folder to `before-N`, where no later start takes them for its own."""
    old = [path for path in (run_dir / "bundle", run_dir / "checkpoints") if path.is_dir()]
    if old and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        folder = run_dir / f"before-{1 + len(list(run_dir.glob('before-*')))}"
        folder.mkdir()
        for path in old:
            path.rename(folder / path.name)


def resume_point(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, by `config.resume`."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_checkpoint(Path(config.run_dir) / "checkpoints")
    path = Path(config.resume)
    if not path.exists():
        raise ConfigError(f"resume={config.resume}: no such checkpoint; give auto, never or the path of one")
    return path


def keep_settings(config: TrainConfig, path: Path, *, resumed: bool) -> None:
    """Write the settings of the run down; ConfigError if it goes on from a checkpoint that others made."""
    settings = OmegaConf.to_yaml(OmegaConf.structured(config))
    if resumed and path.exists():
        before, now = flatten(OmegaConf.load(path)), flatten(OmegaConf.create(settings))
        different = [
            f"{key}: was {before.get(key)}, is {now.get(key)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(MAY_DIFFER_ON_RESUME)
        ]
        if different:
            raise ConfigError(
                f"{path.parent} holds a run with other settings:\n  " + "\n  ".join(different) + "\n"
                "Choose another run_name, or resume=never to start over in the same folder"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(settings.encode())


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if OmegaConf.is_dict(value) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
