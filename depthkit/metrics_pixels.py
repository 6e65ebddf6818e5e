"""What the metrics of one pair of maps share: the pixels that count, and quantities that several of them need."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Result = TypeVar("Result")


class Pixels:
    """A prediction and a target, (B, H, W) each, and the pixels of each image that count.

    `maps` are the three as given, the maps in float32. `prediction` and `target` are (B, N) without what lies outside
    the mask: one image on a CPU is reduced to its valid pixels (`weights` is None), which for a LiDAR's fifth of the
    pixels does a fifth of the work; a batch, and anything on a GPU, keeps its size and has 1 at invalid pixels and
    `weights` 0, so that nothing waits for the number of pixels. Gradients do not pass.
    """

    def __init__(self, prediction: Tensor, target: Tensor, valid_mask: Tensor) -> None:
        shapes = [tuple(values.shape) for values in (prediction, target, valid_mask)]
        assert len(set(shapes)) == 1, f"prediction, target and mask have the shapes {shapes}"
        self.maps = (prediction.detach().float(), target.detach().float(), valid_mask)
        self.results: dict[Callable[..., Any], Any] = {}
        self.weights: Tensor | None = None
        prediction, target = (values.flatten(1) for values in self.maps[:2])
        flat_mask = valid_mask.flatten(1)
        if len(flat_mask) == 1 and flat_mask.device.type == "cpu":
            valid = positions(flat_mask)
            if len(valid) > 0:
                self.prediction, self.target = (values.index_select(1, valid) for values in (prediction, target))
                return
        self.prediction, self.target = (torch.where(flat_mask, values, 1.0) for values in (prediction, target))
        self.weights = flat_mask.float()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of (B, N) values over the valid pixels of each image, (B,); 0 / 0 = NaN for an empty mask."""
        if self.weights is None:
            return values.mean(1)
        return (values * self.weights).sum(1) / self.weights.sum(1)

    def share_below(self, values: Tensor, limit: float) -> Tensor:
        """Share of the valid pixels with `value < limit`, (B,); NaN is not below."""
        # Comparing into floats takes a third of the time of comparing into bools and counting them.
        return self.mean(torch.lt(values, limit, out=torch.empty_like(values)))

    def numbered(self, shares: Tensor) -> Tensor:
        """Columns of `prediction` and `target`, (B, K), of the valid pixels that lie at `shares / 2^32` of all valid
        ones in reading order; `shares` is (K,) int64 in [0, 2^32). Any column for an empty mask.
        """
        if self.weights is None:
            return (shares * self.target.shape[1] >> 32)[None]
        seen = self.maps[2].flatten(1).cumsum(1)
        ranks = shares * seen[:, -1:] >> 32
        return torch.searchsorted(seen, ranks + 1).clamp(max=seen.shape[1] - 1)


def shared(function: Callable[[Pixels], Result]) -> Callable[[Pixels], Result]:
    """Computed once for each `Pixels`, whichever metrics ask for it."""

    @wraps(function)
    def once(pixels: Pixels) -> Result:
        if function not in pixels.results:
            pixels.results[function] = function(pixels)
        result: Result = pixels.results[function]
        return result

    return once


def positions(mask: Tensor) -> Tensor:
    """Flat indices of the True elements, (N,)."""
    if mask.device.type == "cpu":  # NumPy finds them in a fifth of torch's time
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero().squeeze(1)
