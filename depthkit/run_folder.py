"""The folder of a run: its settings, what earlier runs left there, and the checkpoint to go on from."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from depthkit.config import ConfigError, TrainConfig, TrainerConfig
from depthkit.files import atomic_write
from depthkit.provenance import data_digests
from depthkit.runtime.checkpoint import is_whole, newest_checkpoint, read_facts, remove, steps_of
from depthkit.runtime.sharded_checkpoint import describe_split, split_of
from depthkit.trainer_checks import zero_stage

MAY_DIFFER_ON_RESUME = (
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.zero_stage",
    "trainer.offload",
    "trainer.deepspeed_config",
    "trainer.activation_checkpointing",
    "trainer.compile",
    "trainer.channels_last",
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

RESULTS = ["bundle", "checkpoints", "csv", "panels", "quarantine", "summary.json", "wandb_run_id"]
"""What a run writes into its folder, and what one that starts over leaves to the earlier one."""


def enter(config: TrainConfig) -> tuple[Path | None, bool]:
    """Make the folder ready for this start: the checkpoint to go on from, and whether the run is finished.

    ConfigError if settings or data are not those of the run that is to go on. A job that Slurm started again goes on
    from what it left, whatever `resume` says: the command is the same one, and would undo its work.
    """
    run_dir, checkpoints = Path(config.run_dir), Path(config.run_dir) / "checkpoints"
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0
    if is_first_rank():
        for leftover in (*run_dir.glob(".*.tmp"), *checkpoints.glob(".*.tmp")):  # of writers that were killed
            remove(leftover)
    if config.resume == "never" and not restarted:
        set_aside(run_dir, RESULTS)
    path = None if config.resume in ("auto", "never") else Path(config.resume)
    finished = (run_dir / "bundle").is_dir() and (path is None or restarted)
    checkpoint = newest_checkpoint(checkpoints) if path is None or restarted else None
    settings = run_dir / "config.yaml"
    before = OmegaConf.load(settings) if (finished or checkpoint) and settings.exists() else None
    may_differ: tuple[str, ...] = MAY_DIFFER_ON_RESUME
    if checkpoint is None and path is not None:
        checkpoint = check_given(path)
        before, may_differ = read_facts(path)["config"], (*MAY_DIFFER_ON_RESUME, "trainer.max_steps", "sweeps")
        set_aside(run_dir, ["bundle", *later_than(path, checkpoints)])
    if checkpoint is not None:
        check_engine(config.trainer, checkpoint)
        compare_network_and_data(config, checkpoint)
    if before is not None:
        compare_settings(config, before, may_differ, path or run_dir)
    if is_first_rank():
        keep_settings(config, settings)
    return checkpoint, finished


def is_first_rank() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def set_aside(run_dir: Path, names: list[str]) -> None:
    """Move results of earlier runs in this folder to `before-N`, where no later start takes them for its own."""
    old = [name for name in names if (run_dir / name).exists()]
    if old and is_first_rank():
        folder = run_dir / f"before-{1 + len(list(run_dir.glob('before-*')))}"
        for name in old:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).rename(folder / name)


def later_than(path: Path, checkpoints: Path) -> list[str]:
    """Names of the checkpoints after `path` in its own folder: a run that goes back to it leaves them."""
    if path.parent.resolve() != checkpoints.resolve():
        return []
    return [f"checkpoints/{other.name}" for other in steps_of(checkpoints) if other.stem > path.stem]


def check_given(path: Path) -> Path:
    """The checkpoint that `resume` names, which is there, whole, and of a run of ours."""
    given = f"resume={path}"
    if not path.exists():
        raise ConfigError(f"{given}: no such checkpoint; give auto, never or the path of one")
    if not is_whole(path):
        raise ConfigError(f"{given} is damaged; give an earlier one of the same folder, or auto to find it")
    if not read_facts(path):
        raise ConfigError(f"{given} is no checkpoint of a training run; `depthkit import` reads published weights")
    return path


def check_engine(trainer: TrainerConfig, path: Path) -> None:
    """ConfigError where the engine cannot read the checkpoint: DeepSpeed splits optimizer state over its processes."""
    world_size = trainer.devices * trainer.num_nodes
    now, before = describe_split(zero_stage(trainer), world_size), split_of(path)
    if before != now:
        raise ConfigError(
            f"{path} is {before}, and this run is {now}. Go on with that engine (trainer=..., trainer.devices, "
            "trainer.num_nodes). Its weights alone: depthkit export CHECKPOINT --format bundle --out BUNDLE; a new run "
            "starts from their encoder with stage.encoder_weights=BUNDLE"
        )


def compare_network_and_data(config: TrainConfig, path: Path) -> None:
    """ConfigError naming both values where the checkpoint is of another stage or model, or where its data changed."""
    facts = read_facts(path)
    before, now = flatten(facts["config"]), flatten(settings_of(config))
    network = {key for key in before.keys() | now.keys() if key == "stage.name" or key.startswith("model.")}
    if different := differences(before, now, network):
        raise ConfigError(
            f"{path} is a checkpoint of another stage or model:\n  {different}\n"
            "Give the one that made it; a new stage starts from a bundle, by stage.encoder_weights"
        )
    digests = data_digests(config)
    if different := differences(facts["data"], digests, facts["data"].keys() & digests.keys()):
        raise ConfigError(
            f"{path} was made with other data under the same name (sha256 of manifests):\n  {different}\n"
            "A run goes on with the data it began with: bring it back, or choose another run_name"
        )


def compare_settings(config: TrainConfig, before: Any, may_differ: tuple[str, ...], source: Path) -> None:
    """ConfigError naming both values of every setting that is not as before."""
    old, now = flatten(before), flatten(settings_of(config))
    fixed = {key for key in old.keys() | now.keys() if not key.startswith(may_differ)}
    if different := differences(old, now, fixed):
        raise ConfigError(
            f"{source} holds a run with other settings:\n  {different}\n"
            "Choose another run_name, or resume=never to start over in the same folder"
        )


def keep_settings(config: TrainConfig, path: Path) -> None:
    """Write the settings of the run down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.structured(config)).encode())


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """All settings, resolved, as plain values."""
    settings: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return settings


def differences(before: dict[str, Any], now: dict[str, Any], keys: Iterable[str]) -> str:
    """A line `KEY: was VALUE, is VALUE` for each of the keys whose values are not the same."""
    different = [key for key in sorted(keys) if before.get(key) != now.get(key)]
    return "\n  ".join(f"{key}: was {before.get(key)}, is {now.get(key)}" for key in different)


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if value and (isinstance(value, dict) or OmegaConf.is_dict(value)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
