"""How each part of the loss, and each data set of a mix, is learned."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from depthkit.types import Batch

STREAMS = {
    "labeled": "labeled",
    "domain": "labeled",
    "normals": "labeled",
    "unlabeled": "unlabeled",
    "feature": "unlabeled",
    **dict.fromkeys(("photometric", "smoothness", "icp"), "unlabeled"),
}
"""Part of the loss -> the stream whose images it is computed on."""


class LossMeans:
    """Sums of the losses of some steps, in an order that all ranks share, and the means that follow from such sums.

    `datasets` are the names of each stream's data sets. The values stay on the device until `sums` is called.
    """

    def __init__(self, datasets: Mapping[str, Sequence[str]]) -> None:
        self.places = [(part, name) for part, stream in STREAMS.items() for name in datasets.get(stream, ())]
        self.size = 2 + 2 * len(self.places)
        self._totals: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._datasets: dict[str, list[str]] = defaultdict(list)

    def add(self, total: Tensor, image_losses: Mapping[str, Tensor], batch: Mapping[str, Batch]) -> None:
        """One batch: its loss, and the parts of it as a value per image, (images,)."""
        self._totals.append(total.detach())
        for part, values in image_losses.items():
            self._values[part].append(values)
            self._datasets[part] += batch[STREAMS[part]]["dataset"]

    def sums(self) -> list[float]:
        """`size` numbers, sum and count in turn, of the loss and of each part on each data set, since the last call."""
        pairs: dict[Any, list[float]] = {place: [0.0, 0.0] for place in (None, *self.places)}
        if self._totals:
            pairs[None] = [float(torch.stack(self._totals).sum()), float(len(self._totals))]
        for part, values in self._values.items():
            for dataset, value in zip(self._datasets[part], torch.cat(values).tolist(), strict=True):
                pairs[part, dataset][0] += value
                pairs[part, dataset][1] += 1
        self._totals.clear()
        self._values.clear()
        self._datasets.clear()
        return [number for pair in pairs.values() for number in pair]

    def means(self, sums: Sequence[float]) -> dict[str, float]:
        """`loss`, `loss/PART` and `loss/PART/DATASET`: the mean over batches, then over images."""
        pairs = list(zip(sums[::2], sums[1::2], strict=True))
        means = {"loss": _mean(pairs[:1])}
        for part in STREAMS:
            of_part = [pair for place, pair in zip(self.places, pairs[1:], strict=True) if place[0] == part]
            means[f"loss/{part}"] = _mean(of_part)
        for (part, name), pair in zip(self.places, pairs[1:], strict=True):
            means[f"loss/{part}/{name}"] = _mean([pair])
        return {name: mean for name, mean in means.items() if mean is not None}


def _mean(pairs: Sequence[tuple[float, float]]) -> float | None:
    count = sum(count for _, count in pairs)
    return sum(total for total, _ in pairs) / count if count else None
