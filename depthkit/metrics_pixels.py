"""What the metrics of one pair of maps share: the pixels that count, and quantities that several of them need."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from depthkit.alignment import valid_pixels

Result = TypeVar("Result")


class Pixels:
    """A prediction and a target, (B, H, W) each, and the pixels of each image that count.

    `maps` are the three as given, the maps in float32; `prediction`, `target` and `weights` are those of
    `alignment.valid_pixels`, with 1 outside the mask, where quotients and logarithms are then finite and errors 0.
    Gradients do not pass.
    """

    def __init__(self, prediction: Tensor, target: Tensor, valid_mask: Tensor) -> None:
        self.maps = (prediction.detach().float(), target.detach().float(), valid_mask)
        self.results: dict[Callable[..., Any], Any] = {}
        self.weights, (self.prediction, self.target) = valid_pixels(valid_mask, *self.maps[:2], fill=1.0)

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
