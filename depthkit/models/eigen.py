"""The coarse and the fine network of Eigen, Puhrsch and Fergus 2014 (arXiv 1406.2283, section 3.1 and figure 1).

Shapes: B images, H/W pixels of an image, h/w of the output map, a quarter of the network's input without its border.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthkit.config import Eigen2014Config
from depthkit.models.depth_model import DepthModel
from depthkit.models.encoder import Encoder
from depthkit.types import ModelOutput

STRIDE = 4
"""Pixels of the input from one output to the next: the stride and the pooling of fine1."""
BORDER = 3.5
"""Pixels above the first output: fine1 reads 9 + 2 pixels without padding, of which an output stands for the 4 inner
ones."""


def output_size(input_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the map that fine1, 9x9 with stride 2 and 2x2 pooling, leaves of an input."""
    height, width = (((side - 9) // 2 + 1) // 2 for side in input_size)
    return height, width


class CoarseNetwork(Encoder):
    """The whole image, resized to `input_size`, to one map of log depth for `predicted_rows` of it (B, h, w).

    The two taps are the resized image (B, 3, *input_size) and the map; the features are those of coarse5.
    """

    def __init__(self, config: Eigen2014Config) -> None:
        super().__init__(tap_layers=[], widths=[], strides=[], multiple=1)
        self.input_size = (config.input_size[0], config.input_size[1])
        self.layers = coarse_layers(
            self.input_size,
            output_size((config.predicted_rows, config.input_size[1])),
            widths=config.coarse_widths,
            hidden=config.hidden,
            dropout=config.dropout,
        )

    def forward(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        resized = F.interpolate(image, self.input_size, mode="bilinear", align_corners=False, antialias=True)
        features = self.layers[:5](resized)
        return [resized, self.layers[5:](features)], features


def coarse_layers(
    input_size: tuple[int, int], out_size: tuple[int, int], *, widths: Sequence[int], hidden: int, dropout: float
) -> nn.Sequential:
    """coarse1 to coarse7. The table gives sizes and no padding; what is chosen here gives every size of it.

    coarse2 loses a row and a column (KITTI: 71x20 to 35x9 after pooling), so its padding is 3 in total; coarse5 has
    stride 2 and no padding (18x13 to 8x6, 35x9 to 17x4).
    """
    one, two, three, four, five = widths
    # 11x11 with stride 4, pooling, 5x5 and pooling, 3x3 with stride 2.
    height, width = ((((side - 11) // 4 + 1) // 2 - 1) // 2 for side in input_size)
    num_features = five * ((height - 3) // 2 + 1) * ((width - 3) // 2 + 1)
    layers = [
        nn.Sequential(nn.Conv2d(3, one, 11, stride=4), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.Conv2d(one, two, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(two, three, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(three, four, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(four, five, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(num_features, hidden), nn.ReLU(), nn.Dropout(dropout)),
        nn.Sequential(nn.Linear(hidden, out_size[0] * out_size[1]), nn.Unflatten(1, out_size)),
    ]
    return nn.Sequential(OrderedDict((f"coarse{i}", layer) for i, layer in enumerate(layers, start=1)))


class CoarseAlone(nn.Module):
    """The coarse map as it is."""

    def forward(self, taps: list[Tensor]) -> Tensor:
        return taps[1]


class FineNetwork(nn.Module):
    """The lowest `predicted_rows` of the resized image and the coarse map to a refined map of log depth (B, h, w).

    fine2 joins the coarse map to the 63 of fine1 and has no weights.
    """

    def __init__(self, config: Eigen2014Config) -> None:
        super().__init__()
        self.predicted_rows = config.predicted_rows
        width = config.fine_width
        self.fine1 = nn.Sequential(nn.Conv2d(3, width - 1, 9, stride=2), nn.ReLU(), nn.MaxPool2d(2))
        self.fine3 = nn.Sequential(nn.Conv2d(width, width, 5, padding=2), nn.ReLU())
        self.fine4 = nn.Conv2d(width, 1, 5, padding=2)

    def forward(self, taps: list[Tensor]) -> Tensor:
        image, coarse = taps
        fine2 = torch.cat([self.fine1(image[:, :, -self.predicted_rows :]), coarse[:, None]], dim=1)
        return self.fine4(self.fine3(fine2)).squeeze(1)


class Eigen2014(DepthModel):
    """Image (B, 3, H, W) of any size to depth in metres (B, H, W), exp of the fine map (without it, of the coarse one).

    Every pixel takes the nearest output, also beside and above what the outputs stand for (the paper compares on the
    common crop alone).
    """

    encoder: CoarseNetwork

    def __init__(self, config: Eigen2014Config) -> None:
        super().__init__(CoarseNetwork(config), FineNetwork(config) if config.fine else CoarseAlone())
        self.predicted_rows = config.predicted_rows

    def forward(self, image: Tensor) -> ModelOutput:
        taps, features = self.encoder(image)
        log_depth: Tensor = self.decoder(taps)
        height, width = self.encoder.input_size
        pixel_rows, pixel_cols = (torch.arange(side, device=image.device) for side in image.shape[-2:])
        rows = nearest_outputs(pixel_rows, height, height - self.predicted_rows, log_depth.shape[-2])
        cols = nearest_outputs(pixel_cols, width, 0, log_depth.shape[-1])
        # exp of a half-precision number overflows at 11.
        depth = log_depth.float().exp()
        return ModelOutput(values=depth[:, rows][:, :, cols], features=features)


def nearest_outputs(pixels: Tensor, input_length: int, start: int, num_outputs: int) -> Tensor:
    """Which output each of `pixels` 0 to n - 1 along one side takes, (n,) int64.

    The side is `input_length` pixels of the network's input long; the `num_outputs` see those from `start` on.
    """
    centres = (pixels + 0.5) * (input_length / pixels.shape[0])
    return ((centres - start - BORDER) / STRIDE).floor().clamp(0, num_outputs - 1).long()
