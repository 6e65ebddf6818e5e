"""The depth model: encoder + decoder."""

from torch import Tensor, nn

from depthkit.config import ModelConfig
from depthkit.models.dpt import DPTDecoder
from depthkit.models.encoder import Encoder
from depthkit.types import ModelOutput


class DepthModel(nn.Module):
    """Image (B, 3, H, W), sides multiples of the patch, to `ModelOutput`: values (B, H, W) >= 0 and final features."""

    def __init__(self, encoder: Encoder, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, image: Tensor) -> ModelOutput:
        taps, features = self.encoder(image)
        return ModelOutput(values=self.decoder(taps), features=features)


def build_encoder(config: ModelConfig, *, pretrained: bool = False) -> Encoder:
    """The encoder alone, with random weights or, `pretrained`, with timm's (downloaded from its hub)."""
    return Encoder(
        config.encoder,
        tap_layers=config.tap_layers,
        conv_stem=config.conv_stem,
        pretrained=pretrained,
        **config.encoder_args,
    )


def build_model(config: ModelConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    """The model that `config` describes, with random weights (encoder from timm's hub with `pretrained_encoder`)."""
    encoder = build_encoder(config, pretrained=pretrained_encoder)
    decoder = DPTDecoder(
        encoder_width=encoder.width,
        features=config.features,
        out_channels=config.out_channels,
        patch_size=encoder.patch_size,
    )
    return DepthModel(encoder, decoder)
