"""The depth model: encoder + decoder."""

from collections.abc import Callable

from torch import Tensor, nn

from depthkit.config import DPTConfig, ModelConfig
from depthkit.models.dpt import DPTDecoder
from depthkit.models.encoder import Encoder, create_encoder
from depthkit.types import ModelOutput


class DepthModel(nn.Module):
    """Image (B, 3, H, W), sides multiples of `encoder.multiple`, to `ModelOutput`: values (B, H, W) and features."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, image: Tensor) -> ModelOutput:
        taps, features = self.encoder(image)
        return ModelOutput(values=self.decoder(taps), features=features)


def build_encoder(config: DPTConfig, *, pretrained: bool = False) -> Encoder:
    """The encoder alone, with random weights or, `pretrained`, with timm's (downloaded from its hub)."""
    return create_encoder(
        config.encoder,
        tap_layers=config.tap_layers,
        conv_stem=config.conv_stem,
        pretrained=pretrained,
        **config.encoder_args,
    )


def build_dpt(config: DPTConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    encoder = build_encoder(config, pretrained=pretrained_encoder)
    decoder = DPTDecoder(
        widths=encoder.widths,
        strides=encoder.strides,
        features=config.features,
        out_channels=config.out_channels,
        max_depth=config.max_depth,
    )
    return DepthModel(encoder, decoder)


BUILDERS: dict[type[ModelConfig], Callable[..., DepthModel]] = {DPTConfig: build_dpt}
"""Settings -> what builds their network: `build(config, pretrained_encoder=False)`."""


def build_model(config: ModelConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    """The model that `config` describes, with random weights (encoder from timm's hub with `pretrained_encoder`)."""
    return BUILDERS[type(config)](config, pretrained_encoder=pretrained_encoder)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
