"""The DPT decoder (Ranftl et al. 2021) in the form that Depth Anything uses: no batch norm, no class token readout.

Shapes: B images, H/W pixels, D encoder width, s stride in pixels, f decoder width.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 32
"""Channels before the last 1x1 convolution (Depth Anything dpt.py); a narrower decoder keeps its own width."""


class DPTMaps(NamedTuple):
    """What the decoder computes: its values (B, H, W), what its last layer reads (B, 32, H, W), the coarsest map before
    fusion (B, f, h, w), and the four fused maps (B, f, h_i, w_i), coarse to fine.
    """

    values: Tensor
    activation: Tensor
    bottleneck: Tensor
    fused: list[Tensor]


class DPTDecoder(nn.Module):
    """Four tapped maps (B, D_i, H / s_i, W / s_i), shallow first, to one map (B, H, W).

    reassemble: 1x1 to `out_channels[i]`, then to the strides s/4, s/2, s, 2s, where s is that of the third tap (x4, x2,
    x1, x1/2 for a transformer; nothing to do for a pyramid), 3x3 to f; fuse from coarse to fine; head: 3x3 to f/2,
    bilinear to (H, W), 3x3 to 32, ReLU, 1x1 to 1, then ReLU (disparity, >= 0) or, with `max_depth` in metres,
    `max_depth * sigmoid` (depth; Depth Anything V2 metric_depth/dpt.py).
    """

    def __init__(
        self,
        *,
        widths: Sequence[int],
        strides: Sequence[int],
        features: int,
        out_channels: Sequence[int],
        max_depth: float | None = None,
    ) -> None:
        super().__init__()
        self.stride = strides[2]
        self.max_depth = max_depth
        factors = [stride * 4 / (self.stride * 2**i) for i, stride in enumerate(strides)]
        if not set(factors) <= set(RESIZES):
            raise ValueError(f"model.tap_layers: the decoder cannot fuse maps of strides {list(strides)}")
        self.projects = nn.ModuleList([nn.Conv2d(d, c, 1) for d, c in zip(widths, out_channels, strict=True)])
        self.resizes = nn.ModuleList([RESIZES[k](c) for k, c in zip(factors, out_channels, strict=True)])
        self.to_features = nn.ModuleList([nn.Conv2d(c, features, 3, padding=1, bias=False) for c in out_channels])
        self.fusions = nn.ModuleList([FusionBlock(features) for _ in out_channels])
        # The coarsest level has nothing to merge with; official checkpoints hold the unit all the same.
        self.fusions[3].merge.requires_grad_(False)
        self.head_in = nn.Conv2d(features, features // 2, 3, padding=1)
        head_width = min(HEAD_WIDTH, features)
        last = nn.ReLU() if max_depth is None else nn.Sigmoid()
        self.head_out = nn.Sequential(
            nn.Conv2d(features // 2, head_width, 3, padding=1), nn.ReLU(), nn.Conv2d(head_width, 1, 1), last
        )
        if max_depth is None:
            # A ReLU output that starts negative everywhere has no gradient and would never learn.
            nn.init.ones_(self.head_out[2].bias)  # type: ignore[arg-type]

    def forward(self, taps: list[Tensor]) -> Tensor:
        return self.maps(taps, keep_fused=False).values

    def maps(self, taps: list[Tensor], *, keep_fused: bool = True) -> DPTMaps:
        """What `forward` gives, and what it computes on the way; `fused` is empty where it is not kept, which spares
        the memory of maps that no gradient needs."""
        h, w = taps[2].shape[-2:]
        levels = zip(taps, self.projects, self.resizes, self.to_features, strict=True)
        maps = [to_features(resize(project(tap))) for tap, project, resize, to_features in levels]
        fused, kept = maps[3], []
        finest = (2 * maps[0].shape[-2], 2 * maps[0].shape[-1])
        sizes = (maps[2].shape[-2:], maps[1].shape[-2:], maps[0].shape[-2:], finest)
        for level, size in zip((3, 2, 1, 0), sizes, strict=True):
            fused = self.fusions[level](fused, maps[level] if level < 3 else None, size)
            if keep_fused:
                kept.append(fused)
        size = (h * self.stride, w * self.stride)
        activation = F.interpolate(self.head_in(fused), size, mode="bilinear", align_corners=True)
        activation = self.head_out[:2](activation)
        values = self.head_out[2:](activation).squeeze(1)
        values = values if self.max_depth is None else self.max_depth * values
        return DPTMaps(values=values, activation=activation, bottleneck=maps[3], fused=kept)


RESIZES: dict[float, Callable[[int], nn.Module]] = {
    4: lambda channels: nn.ConvTranspose2d(channels, channels, 4, stride=4),
    2: lambda channels: nn.ConvTranspose2d(channels, channels, 2, stride=2),
    1: lambda channels: nn.Identity(),
    0.5: lambda channels: nn.Conv2d(channels, channels, 3, stride=2, padding=1),
}
"""Change of resolution -> the layer that makes it."""


class FusionBlock(nn.Module):
    """Add the finer map (through a residual unit), refine, upsample to `size`, project."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.merge = ResidualUnit(features)
        self.refine = ResidualUnit(features)
        self.project = nn.Conv2d(features, features, 1)

    def forward(self, coarse: Tensor, fine: Tensor | None, size: tuple[int, int]) -> Tensor:
        fused = coarse if fine is None else coarse + self.merge(fine)
        return self.project(F.interpolate(self.refine(fused), size, mode="bilinear", align_corners=True))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))), 3x3."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))
