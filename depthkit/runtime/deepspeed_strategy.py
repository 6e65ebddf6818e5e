"""DeepSpeed under Lightning: on GPUs and on the CPU, with the precision of autocast and checkpoints that are whole."""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import nn

from depthkit.config import TrainerConfig
from depthkit.runtime.sharded_checkpoint import write_contents

AUTOCAST = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}


def build_deepspeed(trainer: TrainerConfig, *, images_per_rank: int) -> "EveryDeviceDeepSpeed":
    """The strategy of the settings, or of the user's JSON with what the settings add to it."""
    on_cpu = trainer.accelerator == "cpu"
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    strategy = EveryDeviceDeepSpeed(
        config=trainer.deepspeed_config,
        stage=trainer.zero_stage or 0,  # of the JSON, if it is None
        offload_optimizer=trainer.offload,
        offload_parameters=trainer.offload and trainer.zero_stage == 3,
        pin_memory=not on_cpu,
    )
    assert isinstance(strategy.config, dict)
    strategy.config = {
        "train_micro_batch_size_per_gpu": images_per_rank,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler at run time
        **strategy.config,
    }
    if trainer.precision in AUTOCAST:
        # Not DeepSpeed's own bf16: Lightning would round the targets with the inputs. Without "safe modules" gradients
        # are summed in float32, as DDP does it.
        autocast = {"enabled": True, "dtype": AUTOCAST[trainer.precision], "lower_precision_safe_modules": []}
        strategy.config["torch_autocast"] = autocast
    return strategy


class EveryDeviceDeepSpeed(DeepSpeedStrategy):
    """Lightning's strategy, which refuses to run on a CPU, writes into the final folder and validates in float32."""

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device(device.type, device.index or 0)  # DeepSpeed needs a number

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        if self.root_device.type != "cpu":
            return super().setup_distributed()
        import deepspeed

        # Faster sums in shared memory, at the price of a compiler on every machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        super().init_deepspeed()
        if self.zero_stage_3:
            gather_with_the_root(self.deepspeed_engine.module)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        import deepspeed

        assert isinstance(self.config, dict)
        names = ["torch_autocast", "zero_allow_untested_optimizer", *["zero_optimization"] * self.zero_stage_3]
        config = {name: self.config[name] for name in names if name in self.config}
        remove_module_hooks(model)
        self.model, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config={"train_micro_batch_size_per_gpu": 1, **config},
            model=model,
            model_parameters=[],
            dist_init_required=False,
        )

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """The folder gets its name when every rank's part is on disk."""
        path = Path(self.broadcast(str(filepath)))
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        self.barrier("ready to save")
        super().save_checkpoint(checkpoint, temporary, storage_options)
        self.barrier("saved")
        if self.is_global_zero:
            stage = self.config["zero_optimization"]["stage"]  # type: ignore[index]
            write_contents(temporary, zero_stage=stage, world_size=self.world_size)
            shutil.rmtree(path, ignore_errors=True)
            temporary.rename(path)
        self.barrier("named")


def gather_with_the_root(root: nn.Module) -> None:
    """ZeRO 3 gathers the weights of a module when that is called; tokens and positions of a transformer are read by
    others. They are small: the root gathers them."""
    import deepspeed

    for module in root.modules():
        if module is not root and next(module.children(), None) is not None:
            for parameter in module.parameters(recurse=False):
                deepspeed.zero.register_external_parameter(root, parameter)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Every parameter is there in full on every rank; ZeRO 3 spreads them. All ranks enter together."""
    spread = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread):
        yield


def end_together() -> None:
    """Close what joins the ranks. Left open, gloo's threads now and then abort a process that has done its work."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
