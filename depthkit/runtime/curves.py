"""The curves of a run in one CSV file, which every continuation of the run goes on writing."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from depthkit.files import atomic_write


class CsvCurves(Logger):
    """Writes `folder/metrics.csv`: one row for each step that logs anything, and every number logged at it.

    A run that goes on from a checkpoint does some steps again. Its first row takes the place of all rows from that step
    on, so each step stands there once. (Lightning's CSVLogger begins a new file, or deletes the old one.)
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._names: list[str] = []
        self._row: dict[str, Any] = {}
        self._place = 0  # byte at which the newest row begins

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They stand in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None, "curves need a step"
        if step != self._row.get("step"):
            self._row = {"step": step}
            self._place = self.path.stat().st_size if self._names else 0
        self._row |= {name: float(value) for name, value in metrics.items()}
        if self._row.keys() <= set(self._names):
            with self.path.open("r+b") as file:
                file.seek(self._place)
                file.write(as_line(self._names, self._row))
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        """The newest row after those of earlier steps, under the names of all."""
        rows = [row for row in read_curves(self.path) if row["step"] < self._row["step"]]
        self._names = ["step", *sorted(set().union(*rows, self._row) - {"step"})]
        lines = [as_line(self._names, row) for row in (dict(zip(self._names, self._names, strict=True)), *rows)]
        self._place = sum(map(len, lines))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.writelines([*lines, as_line(self._names, self._row)])


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file: `step`, and what was logged at it. A last row that a killed process cut is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [{name: int(text) if name == "step" else float(text) for name, text in row.items() if text} for row in rows]


def as_line(names: list[str], row: Mapping[str, Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([row.get(name, "") for name in names])
    return text.getvalue().encode()
