"""The smallest decoder: what a frozen encoder knows of depth, seen through one linear layer."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class LinearDecoder(nn.Module):
    """Tapped maps (B, D_i, H / s_i, W / s_i) to one map (B, H, W): one linear layer on all taps of a location.

    Each tap goes through a 1x1 convolution to one channel and bilinear to (H, W); their sum becomes disparity, >= 0, by
    `softplus`, or with `max_depth` in metres depth, by `max_depth * sigmoid`. That is a linear layer on the taps put
    side by side, as linear probes of DINOv2 read them, for interpolation and sum may change places.
    """

    def __init__(self, *, widths: Sequence[int], strides: Sequence[int], max_depth: float | None = None) -> None:
        super().__init__()
        self.stride = strides[0]
        self.max_depth = max_depth
        first, *others = widths
        self.projects = nn.ModuleList([nn.Conv2d(first, 1, 1), *(nn.Conv2d(d, 1, 1, bias=False) for d in others)])

    def forward(self, taps: list[Tensor]) -> Tensor:
        size = [side * self.stride for side in taps[0].shape[-2:]]
        maps = [
            F.interpolate(project(tap), size, mode="bilinear") for project, tap in zip(self.projects, taps, strict=True)
        ]
        total = sum(maps[1:], maps[0]).squeeze(1)
        return F.softplus(total) if self.max_depth is None else self.max_depth * total.sigmoid()
