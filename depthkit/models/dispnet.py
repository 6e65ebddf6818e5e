"""DispNet as SfMLearner and vid2depth use it: a convolutional pyramid with skips that gives disparity at four scales.

Shapes: B images, H/W pixels.
"""

from collections.abc import Sequence

from torch import Tensor, cat, nn
from torch.nn import functional

from depthkit.config import DispNetConfig
from depthkit.models.depth_model import DepthModel
from depthkit.models.encoder import Encoder
from depthkit.types import ModelOutput

NUM_SCALES = 4
MULTIPLE = 2 ** (NUM_SCALES - 1)
"""Pixels: the coarsest disparity is an eighth of the image."""

WIDTHS = (32, 64, 128, 256, 512, 512, 512)
KERNELS = (7, 5, 3, 3, 3, 3, 3)
DECODER_WIDTHS = (16, 32, 64, 128, 256, 512, 512)
"""Finest first: level i has the stride 2^i."""

LARGEST_DISPARITY, SMALLEST_DISPARITY = 10.0, 0.01
"""`disparity = 10 sigmoid + 0.01`, so that depth is between 0.1 and 100 units."""


def scaled(widths: Sequence[int], factor: float) -> list[int]:
    """Widths times `factor`, at least 1."""
    return [max(1, round(width * factor)) for width in widths]


class ConvBlock(nn.Sequential):
    """Convolution, batch norm, ReLU; the size divided by `stride`, rounded up."""

    def __init__(self, channels: int, width: int, kernel: int, *, stride: int = 1) -> None:
        convolution = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(width, eps=1e-3), nn.ReLU())


class DispNetEncoder(Encoder):
    """Image (B, 3, H, W) to the maps of its seven levels, strides 2 to 128; the coarsest are the features."""

    def __init__(self, width_factor: float = 1.0) -> None:
        widths = scaled(WIDTHS, width_factor)
        strides = [2 ** (level + 1) for level in range(len(widths))]
        super().__init__(tap_layers=[*range(len(widths))], widths=widths, strides=strides, multiple=MULTIPLE)
        levels = zip([3, *widths[:-1]], widths, KERNELS, strict=True)
        self.levels = nn.ModuleList(
            nn.Sequential(ConvBlock(before, width, kernel, stride=2), ConvBlock(width, width, kernel))
            for before, width, kernel in levels
        )

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        maps: list[Tensor] = []
        for level in self.levels:
            maps.append(level(maps[-1] if maps else image))
        return maps, maps[-1]


class DispNetDecoder(nn.Module):
    """The encoder's maps to disparities (B, H / 2^s, W / 2^s), s = 0 to 3, finest first.

    Each level: transposed convolution to twice the size, the skip and (below stride 8) the coarser disparity beside it,
    3x3. Where a size was rounded up on the way down, the map is resized to that of the skip (nearest).
    """

    def __init__(self, encoder_widths: list[int], width_factor: float = 1.0) -> None:
        super().__init__()
        widths = scaled(DECODER_WIDTHS, width_factor)
        skips = [0, *encoder_widths[:-1]]
        coarser = [*widths[1:], encoder_widths[-1]]
        has_disparity = [level < NUM_SCALES - 1 for level in range(len(widths))]
        self.ups = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(before, width, 3, stride=2, padding=1, output_padding=1, bias=False),
                nn.BatchNorm2d(width, eps=1e-3),
                nn.ReLU(),
            )
            for before, width in zip(coarser, widths, strict=True)
        )
        self.merges = nn.ModuleList(
            ConvBlock(width + skip + more, width, 3)
            for width, skip, more in zip(widths, skips, has_disparity, strict=True)
        )
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for width in widths[:NUM_SCALES])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        values = maps[-1]
        disparities: list[Tensor] = []
        for level in reversed(range(len(self.ups))):
            values = self.ups[level](values)
            beside = []
            if level > 0:
                beside.append(maps[level - 1])
                if values.shape[-2:] != beside[0].shape[-2:]:
                    values = functional.interpolate(values, beside[0].shape[-2:])
            if disparities:
                beside.append(functional.interpolate(disparities[-1], values.shape[-2:], mode="bilinear"))
            values = self.merges[level](cat([values, *beside], 1))
            if level < NUM_SCALES:
                disparity = self.heads[level](values).float().sigmoid()
                disparities.append(LARGEST_DISPARITY * disparity + SMALLEST_DISPARITY)
        return [disparity.squeeze(1) for disparity in reversed(disparities)]


class DispNet(DepthModel):
    """Depth up to scale, `1 / disparity`, between 0.1 and 100 units; `disparities` at all four scales, in float32.

    Source: SfMLearner, vid2depth `nets.py`. Evaluation takes the means of batch norm that training kept; the published
    models were tested with those of the test batch.
    """

    def __init__(self, config: DispNetConfig) -> None:
        encoder = DispNetEncoder(config.width_factor)
        super().__init__(encoder, DispNetDecoder(encoder.widths, config.width_factor))

    def forward(self, image: Tensor) -> ModelOutput:
        maps, features = self.encoder(image)
        disparities = self.decoder(maps)
        return ModelOutput(values=disparities[0].reciprocal(), features=features, disparities=disparities)
