"""The depth model: encoder + decoder."""

from torch import Tensor, nn

from depthkit.models.encoder import Encoder
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


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
