"""One evaluation in several processes: those that torchrun or srun started, or `devices` of our own.

Process RANK of N scores the images RANK, RANK + N, ...: no image is repeated to make the shares equal, as a
DistributedSampler would, and none is dropped. The first process gathers what the others found.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
from torch import distributed

Share = TypeVar("Share")
DAY = timedelta(days=1)


class Process(NamedTuple):
    """This process among those that one command started; `local_rank` counts those on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def device(self, device: str) -> str:
        """The GPU of this process, where the setting leaves the choice; else `device` itself."""
        if device not in ("auto", "cuda") or self.world_size == 1 or not torch.cuda.is_available():
            return device
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"


def this_process() -> Process:
    """What torchrun, or srun with several tasks, says of this process."""
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment:
        return Process(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return Process(*(int(environment[name]) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")))
    return Process()


@contextmanager
def joined(process: Process) -> Iterator[Callable[[Share], list[Share]]]:
    """A function that gathers what each process gives it, by rank, in the first one; elsewhere it returns nothing.

    RuntimeError when another process ended before it did.
    """
    if process.world_size == 1:
        yield lambda share: [share]
        return
    distributed.init_process_group(
        "gloo", init_method=_meeting_point(), rank=process.rank, world_size=process.world_size, timeout=DAY
    )

    def gather(share: Share) -> list[Share]:
        shares: list[Share | None] = [None] * process.world_size
        distributed.gather_object(share, shares if process.rank == 0 else None)
        return [each for each in shares if each is not None]

    try:
        yield gather
    finally:
        distributed.destroy_process_group()


def _meeting_point() -> str:
    """As torchrun says; under srun the first node of the step, at a port that follows from the number of the step."""
    if "MASTER_ADDR" in os.environ:
        return "env://"
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    step = int(os.environ["SLURM_JOB_ID"]) * 10 + int(os.environ["SLURM_STEP_ID"])
    node = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
    return f"tcp://{node}:{15000 + step % 10000}"
