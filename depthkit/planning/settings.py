"""Settings of `depthkit plan`: those of training, and the machines that are planned for."""

from dataclasses import dataclass

from omegaconf import MISSING

from depthkit.config import TrainConfig, check
from depthkit.hardware import find_device


@dataclass(kw_only=True)
class ClusterConfig:
    """Machines of one kind. Memory in 10^9 bytes, as their makers count it."""

    name: str = MISSING
    device: str = MISSING  # as torch.cuda.get_device_name() gives it, or "cpu"
    gpus_per_node: int = 1  # processes per node; of a machine without GPUs 1
    num_nodes: int = 1
    host_memory_gb: float = MISSING  # of a node
    memory_gb: float | None = None  # of a device; null: from its data sheet (`hardware.py`)

    def __post_init__(self) -> None:
        if self.memory_gb is None:
            device = find_device(self.device)
            allowed = "given (10^9 bytes): the device is not one of depthkit/hardware.py"
            check(device is not None, "cluster.memory_gb", None, f"{allowed}, device={self.device!r}")
            self.memory_gb = device.memory_gb if device else None
        check(self.gpus_per_node > 0, "cluster.gpus_per_node", self.gpus_per_node, "> 0")
        check(self.num_nodes > 0, "cluster.num_nodes", self.num_nodes, "> 0")


@dataclass(kw_only=True)
class PlanConfig(TrainConfig):
    """`depthkit plan experiment=NAME cluster=NAME`: any settings of training, and these."""

    cluster: ClusterConfig = MISSING
    images_per_second: float | None = None  # of one device, measured: scripts/gpu_check.py, or a run like this one
    mfu: float = 0.4  # share of the peak rate that is assumed where images_per_second is not given
    image_kb: float = 200.0  # 10^3 bytes of a packed image, assumed for data sets that are not packed yet
    out: str | None = None  # JSON file for the figures

    def __post_init__(self) -> None:
        rate = self.images_per_second
        check(rate is None or rate > 0, "images_per_second", rate, "> 0 (of one device)")
        check(0 < self.mfu <= 1, "mfu", self.mfu, "a share, > 0 and <= 1")
        check(self.image_kb > 0, "image_kb", self.image_kb, "> 0 (10^3 bytes)")
