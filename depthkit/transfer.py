"""How much of an encoder that starts from other weights is trained: all, nothing, its last blocks, LoRA's factors."""

import copy
from typing import Any

from torch import nn

from depthkit.config import ConfigError, TransferConfig, TransferMode
from depthkit.models import DepthModel, Encoder

ADAPTED = (nn.Linear,)
"""Layers inside the blocks that LoRA adds to: all linear ones, as in QLoRA (Dettmers et al. 2023), section 4."""


def apply_transfer(model: DepthModel, config: TransferConfig) -> None:
    """Leave those parameters of the encoder trainable that `config` names; call it once its weights are loaded."""
    apply_to_encoder(model.encoder, config)
    keep_frozen_in_eval(model)


def apply_to_encoder(encoder: Encoder, config: TransferConfig) -> None:
    CHOICES[config.mode](encoder, config)


def train_all(encoder: Encoder, config: TransferConfig) -> None:
    pass


def freeze(encoder: Encoder, config: TransferConfig) -> None:
    encoder.requires_grad_(False)


def train_last_blocks(encoder: Encoder, config: TransferConfig) -> None:
    """The last `config.blocks` blocks, and the norm behind them."""
    blocks = blocks_of(encoder)
    if config.blocks >= len(blocks):
        raise ConfigError(
            f"transfer.blocks={config.blocks}: the encoder has {len(blocks)}; give fewer, or transfer=full"
        )
    freeze(encoder, config)
    for block in blocks[-config.blocks :]:
        for name in block:
            encoder.get_parameter(name).requires_grad_(True)


def add_adapters(encoder: Encoder, config: TransferConfig) -> None:
    """LoRA (Hu et al. 2022): `W x + B A x` in the place of `W x`, W frozen, A and B of rank `config.lora_rank`.

    B starts at 0, so that the network starts as it was. The update has no factor (alpha = rank): the rate does that.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("transfer=lora needs peft: pip install 'depthkit[lora]'") from error
    in_blocks = {name.rpartition(".")[0] for block in blocks_of(encoder) for name in block}
    targets = [name for name, layer in encoder.named_modules() if isinstance(layer, ADAPTED) and name in in_blocks]
    if not targets:
        raise ConfigError("transfer=lora: the encoder has no linear layers in its blocks; use transfer=last_blocks")
    inject_adapter_in_model(
        LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets), encoder
    )


CHOICES = {
    TransferMode.full: train_all,
    TransferMode.frozen: freeze,
    TransferMode.last_blocks: train_last_blocks,
    TransferMode.lora: add_adapters,
}


def blocks_of(encoder: Encoder) -> list[list[str]]:
    """Names of the parameters of each block, from the image to the features, as timm groups them; no stem.

    A block is one of a transformer, or a residual one of a network with stages; a last norm belongs to the last block.
    """
    from timm.models import group_parameters

    children: list[tuple[str, Any]] = [*encoder.named_children()]
    prefix, net = children[0] if len(children) == 1 else ("", None)
    if net is None or not hasattr(net, "group_matcher"):
        raise ConfigError(f"transfer: {type(encoder).__name__} has no blocks to choose from; use full or frozen")
    groups = group_parameters(net, net.group_matcher(coarse=False))
    return [[f"{prefix}.{name}" for name in names] for _, names in sorted(groups.items())][1:]


def keep_frozen_in_eval(model: nn.Module) -> None:
    """Put every module that has parameters, none of them trainable, in eval mode: BatchNorm keeps its statistics."""
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def merge_adapters(model: DepthModel, config: TransferConfig) -> DepthModel:
    """A copy without adapters that predicts the same, B A added to W; without LoRA the model itself."""
    if config.mode is not TransferMode.lora:
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, layer in list(merged.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(merged.get_submodule(parent), child, layer.get_base_layer())
    return merged
