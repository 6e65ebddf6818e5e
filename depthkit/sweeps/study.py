"""The file that a search is kept in: Optuna's journal, which several machines may write on a shared disk."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from depthkit.config import ConfigError

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
NAME = "search"


def load_study(journal: Path) -> "optuna.Study":
    """The study in a journal; a new one that minimises where there is none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    return optuna.create_study(storage=storage, study_name=NAME, direction="minimize", load_if_exists=True)


def need_optuna() -> None:
    if find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna: pip install 'depthkit[sweep]'")


@contextmanager
def own_study(folder: Path) -> Iterator["optuna.Study"]:
    """The study of a sweep's folder for the one process that decides about trials; ConfigError for a second one."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "study.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process searches here; let it end, or stop it") from None
        cut_torn_line(folder / JOURNAL)
        yield load_study(folder / JOURNAL)


def cut_torn_line(journal: Path) -> None:
    """Drop the half line that a killed writer left: Optuna would append to it, and never read the file again."""
    if journal.is_file() and (content := journal.read_bytes()) and not content.endswith(b"\n"):
        with journal.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
