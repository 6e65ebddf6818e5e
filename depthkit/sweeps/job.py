"""One job of a sweep: what it leaves behind in its folder, and nothing in the process, which may run the next one."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from depthkit.files import atomic_write

log = logging.getLogger(__name__)


@dataclass
class JobRecord:
    """`job.json`: how a job of a sweep ended, over every time that it was started."""

    deaths: int = 0  # starts that nothing was heard of again: killed, out of memory, or still running
    seconds: float = 0.0  # of the other ones
    value: float | None = None  # what the sweep minimises
    error: str | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "job.json") as file:
            file.write(json.dumps(asdict(self)).encode())


def read_record(folder: Path) -> JobRecord:
    """The record in a job's folder; an empty one where the job was never started."""
    path = folder / "job.json"
    return JobRecord(**json.loads(path.read_text())) if path.is_file() else JobRecord()


def run_job(folder: Path, run: Callable[[], float | None]) -> float | None:
    """Call `run` and record its value or its error, which is raised again: Hydra keeps it, and goes on."""
    from lightning.pytorch.utilities import rank_zero_only

    def write() -> None:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            record.write(folder)

    before = read_record(folder)
    record = JobRecord(deaths=before.deaths + 1, seconds=before.seconds)
    write()
    start = time.monotonic()
    try:
        with process_left_as_it_was():
            record.value = run()
    except Exception as error:
        record.error = f"{type(error).__name__}: {error}"
        log.exception("this job of the sweep failed")  # with Hydra, into a file in the folder too
        raise
    finally:
        record.deaths = before.deaths
        record.seconds += time.monotonic() - start
        write()
    return record.value


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Undo what Lightning and wandb leave in a process, which would hold the next job for a part of this one."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        import torch

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if "wandb" in sys.modules and sys.modules["wandb"].run is not None:
            sys.modules["wandb"].finish()
        os.environ.clear()
        os.environ.update(environment)
