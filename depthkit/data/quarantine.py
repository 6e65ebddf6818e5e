"""Bad samples: named, written down, and bounded.

A sample that cannot be decoded raises `SampleError`; the data set replaces it by the next one of its lane and reports
a `Rejection`, which travels to the main process inside the batch. `Quarantine` appends each to a JSON-lines file and
stops the run when their share passes the budget.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from depthkit.types import BudgetExceeded, Rejection


class SampleError(ValueError):
    """This sample is unusable; the message says why, in terms of the file. The caller adds which sample it was."""


class QuarantineBudgetExceeded(BudgetExceeded):
    """Too many samples were rejected; the message lists counts per data set and the most frequent reasons."""


class Quarantine:
    """Counts rejections and appends them to `path`, one JSON object a line.

    `max_fraction` is the largest share of rejected among all samples seen; it is judged only once `min_samples` samples
    have been seen, so that one bad file at the start does not end a run.
    """

    def __init__(self, path: Path, *, max_fraction: float, min_samples: int = 100) -> None:
        self.path = path
        self.max_fraction = max_fraction
        self.min_samples = min_samples
        self.num_seen = 0
        self.num_rejected = 0
        self.reasons: Counter[tuple[str, str]] = Counter()

    def record(self, num_samples: int, rejections: Iterable[Rejection]) -> None:
        """Add one batch of `num_samples` good samples and what was rejected on the way to them."""
        rejections = list(rejections)
        self.num_seen += num_samples + len(rejections)
        if not rejections:
            return
        self.num_rejected += len(rejections)
        self.reasons.update((r.dataset, r.reason) for r in rejections)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.writelines(json.dumps(asdict(r)) + "\n" for r in rejections)
            file.flush()
            os.fsync(file.fileno())
        if self.num_seen >= self.min_samples and self.num_rejected > self.max_fraction * self.num_seen:
            raise QuarantineBudgetExceeded(self.summary())

    def counts(self) -> dict[str, int]:
        """Rejected samples by data set."""
        counts: Counter[str] = Counter()
        for (dataset, _), count in self.reasons.items():
            counts[dataset] += count
        return dict(counts)

    def summary(self) -> str:
        """One paragraph: how many of how many, the budget, the most frequent reasons, and where the whole list is."""
        lines = [
            f"{self.num_rejected} of {self.num_seen} samples were rejected "
            f"(budget {self.max_fraction:.2%} after {self.min_samples} samples). Most frequent:"
        ]
        lines += [f"  {count} x {dataset}: {reason}" for (dataset, reason), count in self.reasons.most_common(5)]
        lines.append(
            f"The whole list is in {self.path}. Repair or repack these shards, or raise data.quarantine_budget."
        )
        return "\n".join(lines)
