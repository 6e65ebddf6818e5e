"""Random weights under which every part of a model shows in its output.

A fresh model predicts nearly a constant, and two wrong implementations of it agree on that.
"""

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, seed: int = 0) -> Module:
    """Draw every parameter: matrices by their fan-in, norms around 1, biases and tokens around 0, scales around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "token"))
            if is_matrix:
                parameter.copy_(noise * (parameter.numel() / parameter.shape[0]) ** -0.5)
            elif name.endswith("gamma"):
                parameter.copy_(0.5 + 0.1 * noise)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return module.eval()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the span of the expected values; a constant cannot hide behind its size."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))
