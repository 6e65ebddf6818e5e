"""An activation that predicts as ReLU does and cannot die."""

from typing import Any

import torch
from torch import Tensor, nn

from depthkit.models.dpt import DPTDecoder


class RisingReLU(nn.Module):
    """max(x, 0), whose gradient also passes where x <= 0 if a step against it would raise x.

    Elsewhere it is that of ReLU: what is 0 and should be smaller stays where it is.
    """

    def forward(self, values: Tensor) -> Tensor:
        return _RisingReLU.apply(values)


class _RisingReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.save_for_backward(values)
        return values.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        return torch.where((values > 0) | (gradient < 0), gradient, 0.0)


def keep_disparity_alive(decoder: nn.Module) -> None:
    """Put it in the place of the ReLU in which a DPT decoder of disparity ends; weights and predictions are the same.

    A loss that sees depth by reprojection alone can push whole images to disparity 0, from where ReLU has no way back.
    """
    if isinstance(decoder, DPTDecoder) and isinstance(decoder.head_out[-1], nn.ReLU):
        decoder.head_out[-1] = RisingReLU()
