"""Error over depth: which ranges of true depth a model gets wrong, added up while images are scored."""

from math import log10

import torch
from torch import Tensor

from depthkit.evaluation.protocols import Comparison
from depthkit.evaluation.settings import DepthUnit, ProtocolConfig

NUM_BINS = 24
DECADES = 3
"""Of depth below the protocol's cap that get bins of their own; what is nearer falls into the first one."""
UNCAPPED = {DepthUnit.metres: 100.0, DepthUnit.image_maximum: 1.0}
"""The last border for a protocol without a cap; what is farther falls into the last bin."""


def depth_edges(protocol: ProtocolConfig) -> Tensor:
    """The borders of the bins of true depth, (NUM_BINS + 1,) float64: equal ratios up to the protocol's cap."""
    high = protocol.max_depth or max(UNCAPPED[protocol.unit], 2 * protocol.min_depth)
    low = max(protocol.min_depth, high / 10**DECADES)
    return torch.logspace(log10(low), log10(high), NUM_BINS + 1, dtype=torch.float64)


def error_by_depth(comparison: Comparison, edges: Tensor) -> Tensor:
    """For each bin `(edges[i], edges[i + 1]]` of true depth the sum of `|p - t| / t` and the number of pixels.

    (2, bins) float64 over all pixels that count: those of several images add up, and the first row by the second is
    the mean. Pixels beyond an end fall into the bin at that end.
    """
    prediction, target = (values[comparison.valid_mask].double() for values in comparison[:2])
    bins = torch.bucketize(target, edges[1:-1].to(target.device))
    errors = (prediction - target).abs() / target
    num_bins = len(edges) - 1
    sums = torch.bincount(bins, errors, minlength=num_bins)
    return torch.stack([sums, torch.bincount(bins, minlength=num_bins).double()])
