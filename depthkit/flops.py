"""How much a network computes and holds: counted on the meta device, where tensors have shapes and no memory."""

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from depthkit.config import ModelConfig
from depthkit.models import build_model


def forward_flops(model: ModelConfig | nn.Module, size: tuple[int, int]) -> float:
    """FLOPs of the forward pass of one image of `size`, 2 for each multiplication with its addition.

    Matrix products, attention among them, and convolutions; what is done element by element, a few percent, is left
    out, as is usual (PaLM, Chowdhery et al. 2022, appendix B). A module is counted wherever it lies, and stays there.
    """
    module = describe(model) if isinstance(model, ModelConfig) else model
    weights = {name: each.to("meta") for name, each in (*module.named_parameters(), *module.named_buffers())}
    with torch.no_grad(), FlopCounterMode(display=False) as counter, torch.device("meta"):
        # Two images: batch norm refuses a single value in training.
        functional_call(module, weights, (torch.empty(2, 3, *size),))
    return float(counter.get_total_flops()) / 2


def num_parameters(model: ModelConfig | nn.Module, *, trainable: bool = False) -> int:
    """Weights of a model; with `trainable` those alone that an optimizer changes."""
    module = describe(model) if isinstance(model, ModelConfig) else model
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trainable)


def describe(model: ModelConfig) -> nn.Module:
    """The depth model on the meta device: all its shapes, no memory."""
    with torch.device("meta"):
        return build_model(model)
