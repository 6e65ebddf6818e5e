"""The DPT decoder (Ranftl et al. 2021) in the form that Depth Anything uses: no batch norm, no class token readout.

Shapes: B images, h/w patches, D encoder width, f decoder width, P patch size.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

HEAD_WIDTH = 32
"""Channels before the last 1x1 convolution (Depth Anything dpt.py); a narrower decoder keeps its own width."""


class DPTDecoder(nn.Module):
    """Four tapped maps (B, D, h, w), shallow first, to one non-negative map (B, h P, w P).

    reassemble: 1x1 to `out_channels[i]`, then x4, x2, x1, x1/2 in resolution, 3x3 to f; fuse from coarse to fine;
    head: 3x3 to f/2, bilinear to h P x w P, 3x3 to 32, ReLU, 1x1 to 1, ReLU.
    """

    def __init__(self, *, encoder_width: int, features: int, out_channels: Sequence[int], patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        c1, c2, _, c4 = out_channels
        self.projects = nn.ModuleList([nn.Conv2d(encoder_width, c, 1) for c in out_channels])
        self.resizes = nn.ModuleList(
            [
                nn.ConvTranspose2d(c1, c1, 4, stride=4),
                nn.ConvTranspose2d(c2, c2, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(c4, c4, 3, stride=2, padding=1),
            ]
        )
        self.to_features = nn.ModuleList([nn.Conv2d(c, features, 3, padding=1, bias=False) for c in out_channels])
        self.fusions = nn.ModuleList([FusionBlock(features) for _ in out_channels])
        # The coarsest level has nothing to merge with; official checkpoints hold the unit all the same.
        self.fusions[3].merge.requires_grad_(False)
        self.head_in = nn.Conv2d(features, features // 2, 3, padding=1)
        head_width = min(HEAD_WIDTH, features)
        self.head_out = nn.Sequential(
            nn.Conv2d(features // 2, head_width, 3, padding=1), nn.ReLU(), nn.Conv2d(head_width, 1, 1), nn.ReLU()
        )
        # A ReLU output that starts negative everywhere has no gradient and would never learn.
        nn.init.ones_(self.head_out[2].bias)  # type: ignore[arg-type]

    def forward(self, taps: list[Tensor]) -> Tensor:
        h, w = taps[0].shape[-2:]
        levels = zip(taps, self.projects, self.resizes, self.to_features, strict=True)
        maps = [to_features(resize(project(tap))) for tap, project, resize, to_features in levels]
        fused = self.fusions[3](maps[3], None, maps[2].shape[-2:])
        fused = self.fusions[2](fused, maps[2], maps[1].shape[-2:])
        fused = self.fusions[1](fused, maps[1], maps[0].shape[-2:])
        fused = self.fusions[0](fused, maps[0], (2 * maps[0].shape[-2], 2 * maps[0].shape[-1]))
        size = (h * self.patch_size, w * self.patch_size)
        full = F.interpolate(self.head_in(fused), size, mode="bilinear", align_corners=True)
        return self.head_out(full).squeeze(1)


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
