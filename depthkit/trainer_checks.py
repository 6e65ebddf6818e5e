"""Which settings of the trainer fit together. Judged where a job is composed: no device is asked for, and nothing is
opened but a user's own DeepSpeed settings."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from depthkit.config import ConfigError, PretrainConfig, PseudoLabelConfig, StageConfig, TrainerConfig

SET_ELSEWHERE = {
    "optimizer": "optim",
    "scheduler": "optim",
    "gradient_clipping": "trainer.gradient_clip_val",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "bf16": "trainer.precision",
    "fp16": "trainer.precision",
    "amp": "trainer.precision",
    "torch_autocast": "trainer.precision",
    "activation_checkpointing": "trainer.activation_checkpointing",
}
"""Keys of a DeepSpeed JSON -> our setting that says the same."""


def check_trainer(trainer: TrainerConfig, stage: StageConfig) -> None:
    """ConfigError for the first two settings that cannot work together, with their values and the reason."""
    values = {f"trainer.{name}": value for name, value in vars(trainer).items()} | {"stage": stage.name}

    def refuse(condition: bool, first: str, second: str, reason: str) -> None:
        if condition:
            raise ConfigError(f"{first}={values[first]} and {second}={values[second]}: {reason}")

    is_deepspeed = trainer.strategy == "deepspeed"
    is_half_on_cpu = trainer.precision == "16-mixed" and trainer.accelerator == "cpu"
    refuse(is_half_on_cpu, "trainer.precision", "trainer.accelerator", "float16 needs a GPU; give bf16-mixed")
    for name in ("zero_stage", "offload", "deepspeed_config"):
        reason = "only trainer.strategy=deepspeed reads it"
        refuse(not is_deepspeed and bool(getattr(trainer, name)), "trainer.strategy", f"trainer.{name}", reason)
    if isinstance(stage, PretrainConfig):
        refuse(
            trainer.compile, "stage", "trainer.compile", "it runs parts of an encoder, and compiled are whole models"
        )
        refuse(trainer.channels_last, "stage", "trainer.channels_last", "it has no decoder")
    if not is_deepspeed:
        return
    alone = "labelling processes work alone, each with the whole teacher; give trainer=gpu or trainer=ddp"
    refuse(isinstance(stage, PseudoLabelConfig), "trainer.strategy", "stage", alone)
    flat = "DeepSpeed copies the weights into flat buffers, where they lose their memory format"
    refuse(trainer.channels_last, "trainer.strategy", "trainer.channels_last", flat)
    if trainer.deepspeed_config is None:
        needed = "give trainer.zero_stage=1, 2 or 3, or trainer.deepspeed_config=FILE"
        refuse(trainer.zero_stage is None, "trainer.strategy", "trainer.zero_stage", needed)
    else:
        for name in ("zero_stage", "offload"):
            reason = "the file says it too; start from trainer=deepspeed"
            refuse(bool(getattr(trainer, name)), "trainer.deepspeed_config", f"trainer.{name}", reason)
    values["trainer.zero_stage"] = zero_stage(trainer)
    breaks = (
        "ZeRO 3 gathers weights before each layer, where a compiled graph breaks, so that hardly anything is compiled"
    )
    is_zero_3 = values["trainer.zero_stage"] == 3
    refuse(trainer.compile and is_zero_3, "trainer.compile", "trainer.zero_stage", breaks)
    if find_spec("deepspeed") is None:
        raise ConfigError("trainer.strategy=deepspeed: the package is missing; pip install 'depthkit[deepspeed]'")


def zero_stage(trainer: TrainerConfig) -> int:
    """What DeepSpeed splits over the ranks: 1 optimizer state, 2 gradients too, 3 weights too; 0 for other strategies.

    ConfigError for a JSON of the user that cannot be read, has no such stage, or says what our settings say.
    """
    if trainer.deepspeed_config is None:
        return trainer.zero_stage or 0
    name = f"trainer.deepspeed_config={trainer.deepspeed_config}"
    try:
        settings: dict[str, Any] = json.loads(Path(trainer.deepspeed_config).read_text())
        stage = settings.get("zero_optimization", {}).get("stage", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name}: cannot be read as a JSON object ({error})") from error
    for key in settings.keys() & SET_ELSEWHERE.keys():
        raise ConfigError(f"{name}: sets {key}, which is {SET_ELSEWHERE[key]} here; take it out of the file")
    if stage not in (1, 2, 3):
        raise ConfigError(f"{name}: zero_optimization.stage={stage} must be 1, 2 or 3; without it, use strategy=ddp")
    return int(stage)
