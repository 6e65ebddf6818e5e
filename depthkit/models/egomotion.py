"""The ego-motion network: how the camera moved between the frames of a clip."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from depthkit.config import EgomotionConfig
from depthkit.models.dispnet import ConvBlock

KERNELS = (7, 5, 3, 3, 3, 3, 3)
OUTPUT_SCALE = 0.01
"""Small motions at first: from views that do not overlap nothing can be learned (SfMLearner)."""


class EgomotionNet(nn.Module):
    """A clip (B, T, 3, H, W) to the motions of its camera, (B, T - 1, 6).

    Number i takes points from frame i's camera to frame i + 1's: translation in the unit of the depth network, then
    angles in radians (`warping.pose_matrix`), in float32. Convolutions of stride 2 with batch norm, 1x1, mean over
    space, times 0.01. Source: SfMLearner, vid2depth `nets.py`; there, too, the motion backwards in time is the negated
    vector.
    """

    def __init__(self, config: EgomotionConfig, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.matching = FrameMatching(config.search_px) if config.search_px else None
        num_pairs = num_frames - 1
        first = 2 + FrameMatching.channels * num_pairs if self.matching else 3 * num_frames
        widths = [first, *config.widths]
        levels = zip(widths[:-1], widths[1:], KERNELS, strict=False)
        blocks = [ConvBlock(before, after, kernel, stride=2) for before, after, kernel in levels]
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 6 * num_pairs, 1))

    def forward(self, clip: Tensor) -> Tensor:
        if clip.shape[1] != self.num_frames:
            raise ValueError(f"a clip of {clip.shape[1]} frames; this ego-motion network is for {self.num_frames}")
        seen = clip.flatten(1, 2) if self.matching is None else self.matching(clip)
        motions: Tensor = OUTPUT_SCALE * self.net(seen).float().mean((2, 3))
        return motions.view(len(clip), self.num_frames - 1, 6)


class FrameMatching(nn.Module):
    """Where each place of a frame is found in the next one, instead of the frames themselves.

    Half the size; for every place and every shift of at most `search_px` (pixels of the half size) the mean absolute
    difference in a window of 5 x 5; the softmax over shifts gives the expected shift. Result (B, 2 + 4 (T - 1), H / 2,
    W / 2): x and y of the place in -1..1, then of each pair the shift in x and y, how certain it is (sum of the squared
    shares) and the smallest difference. Our addition: from it, motion is learned in hundreds of steps, where the
    published network, which must first learn to compare frames, takes tens of thousands.
    """

    channels = 4
    window = 5

    def __init__(self, search_px: int) -> None:
        super().__init__()
        self.search_px = search_px
        self.sharpness = nn.Parameter(torch.tensor(20.0))
        steps = torch.arange(-search_px, search_px + 1.0)
        shifts = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), 2).flatten(0, 1)
        self.register_buffer("shifts", shifts, persistent=False)  # (S, 2)

    def forward(self, clip: Tensor) -> Tensor:
        small = functional.avg_pool2d(clip.flatten(0, 1), 2)
        small = small.view(*clip.shape[:2], *small.shape[1:])
        height, width = small.shape[-2:]
        differences = self.differences(small[:, :-1].flatten(0, 1), small[:, 1:].flatten(0, 1))
        shares = (-self.sharpness * differences).softmax(1)
        shift = torch.einsum("bshw,sc->bchw", shares, self.shifts)
        certainty, smallest = shares.square().sum(1, keepdim=True), differences.amin(1, keepdim=True)
        found = torch.cat([shift, certainty, smallest], 1).view(len(clip), -1, height, width)
        x, y = (torch.linspace(-1, 1, side, device=clip.device) for side in (width, height))
        place = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(len(clip), -1, -1, -1)
        return torch.cat([place, found], 1)

    @torch.no_grad()
    def differences(self, frame: Tensor, later: Tensor) -> Tensor:
        """(B, S, h, w) mean absolute difference of `frame` and the shifted `later`, both (B, 3, h, w)."""
        reach = self.search_px
        padded = functional.pad(later, (reach,) * 4, mode="replicate")
        shifted = padded.unfold(2, frame.shape[2], 1).unfold(3, frame.shape[3], 1).flatten(2, 3)  # (B, 3, S, h, w)
        difference = (shifted - frame[:, :, None]).abs().mean(1)
        return functional.avg_pool2d(difference, self.window, stride=1, padding=self.window // 2)
