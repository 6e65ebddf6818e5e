"""Metric bins (ZoeDepth, Bhat et al. 2023): depth in metres as an expectation over bins that each pixel places itself.

The layers are those of the published code (isl-org/ZoeDepth), the relative model below them is our DPT decoder.
Shapes: B images, H/W pixels, f width of the decoder, E width of an embedding, K bins.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthkit.models.depth_model import DepthModel
from depthkit.models.dpt import DPTDecoder, DPTMaps
from depthkit.types import ModelOutput

TEMPERATURES = (0.0212, 50.0)
"""Lowest and highest temperature of the distribution over bins."""

EPSILON = 1e-3
"""Added to bounded bin widths and attractors, which a ReLU can make 0."""


class MetricBins(nn.Module):
    """What a DPT decoder computes on the way to a relative map, to depth in metres (B, H, W) > 0.

    The coarsest map places K bins (seeds); each of the four fused maps, coarse to fine, moves them towards points of
    its own (attractors). The finest features give the probability of each bin, and depth is the mean of the centres.
    One head: the relative map is part of these features. Several `heads` (name -> largest depth in metres), one for a
    domain each: a router chooses one for every image, and its logits are the second result (B, heads); None otherwise.
    Sources: zoedepth_v1.py, zoedepth_nk_v1.py, whose layers differ in width between the two. The latter routes a whole
    batch to one head, this one every image by itself.
    """

    def __init__(
        self,
        *,
        features: int,
        head_width: int,
        heads: Mapping[str, float],
        num_bins: int,
        embedding: int,
        num_attractors: Sequence[int],
        attractor_alpha: float,
        attractor_gamma: float,
        min_depth: float,
        is_bounded: bool,
    ) -> None:
        super().__init__()
        is_single = len(heads) == 1
        hidden = embedding if is_single else embedding // 2
        self.bottleneck = nn.Conv2d(features, features, 1)
        self.seed_embedding = pointwise(features, hidden, embedding)
        self.embeddings = nn.ModuleList([pointwise(features, hidden, embedding) for _ in num_attractors])
        self.heads = nn.ModuleDict(
            {
                name: BinHead(
                    features=features,
                    num_bins=num_bins,
                    embedding=embedding,
                    seed_hidden=2 * embedding if is_single else embedding // 2,
                    condition=head_width + is_single + embedding,
                    condition_hidden=(head_width + is_single + embedding) // (2 if is_single else 4),
                    num_attractors=num_attractors,
                    attractor_alpha=attractor_alpha,
                    attractor_gamma=attractor_gamma,
                    depth_range=(min_depth, largest) if is_bounded else None,
                )
                for name, largest in heads.items()
            }
        )
        self.router = None if is_single else Router(features, num_domains=len(heads))

    def forward(self, maps: DPTMaps) -> tuple[Tensor, Tensor | None]:
        bottleneck = self.bottleneck(maps.bottleneck)
        embeddings = [self.seed_embedding(bottleneck)]
        embeddings += [embed(level) for embed, level in zip(self.embeddings, maps.fused, strict=True)]
        guides = [fine + resize(coarse, fine.shape[-2:]) for coarse, fine in pairwise(embeddings)]
        size = maps.activation.shape[-2:]
        relative = [maps.values[:, None]] if self.router is None else []
        condition = torch.cat([maps.activation, *relative, resize(embeddings[-1], size)], dim=1)
        bins = [head(bottleneck, guides, condition) for head in self.heads.values()]
        if self.router is None:
            return expected_depth(*bins[0]), None
        logits = self.router(bottleneck)
        domain = logits.argmax(dim=1)[:, None, None, None]
        chosen = bins[0]
        for number, head in enumerate(bins[1:], start=1):
            chosen = [torch.where(domain == number, *parts) for parts in zip(head, chosen, strict=True)]
        return expected_depth(*chosen), logits


class MetricBinsDecoder(nn.Module):
    """Four tapped maps to depth in metres (B, H, W), and the router's logits (B, heads) or None."""

    def __init__(self, relative: DPTDecoder, bins: MetricBins) -> None:
        super().__init__()
        self.relative = relative
        self.bins = bins
        if bins.router is not None:
            # The relative map itself is not read: its last layer would be a parameter without a gradient.
            relative.head_out[2].requires_grad_(False)

    def forward(self, taps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return self.bins(self.relative.maps(taps))


class MetricBinsModel(DepthModel):
    """An encoder and a `MetricBinsDecoder`."""

    decoder: MetricBinsDecoder

    def forward(self, image: Tensor) -> ModelOutput:
        taps, features = self.encoder(image)
        depth, domain_logits = self.decoder(taps)
        return ModelOutput(values=depth, features=features, domain_logits=domain_logits)

    def relative(self) -> DepthModel:
        """The relative model below the bins, with the same weights."""
        return DepthModel(self.encoder, self.decoder.relative)


class BinHead(nn.Module):
    """Bins of one range of depth: centres (B, K, h, w) in metres at the finest level, then for each pixel the
    probability and the temperature (as a share of `TEMPERATURES`), (B, 1, H, W) each, of the distribution over them.

    Without `depth_range` seeds and attractors are a softplus and centres have no upper bound ("softplus"). With it
    ("normed") centres are those of K widths that fill the range, and they are kept inside.
    """

    def __init__(
        self,
        *,
        features: int,
        num_bins: int,
        embedding: int,
        seed_hidden: int,
        condition: int,
        condition_hidden: int,
        num_attractors: Sequence[int],
        attractor_alpha: float,
        attractor_gamma: float,
        depth_range: tuple[float, float] | None,
    ) -> None:
        super().__init__()
        self.alpha, self.gamma = attractor_alpha, attractor_gamma
        self.depth_range = depth_range
        self.seeds = pointwise(features, seed_hidden, num_bins)
        self.attractors = nn.ModuleList([pointwise(embedding, embedding, count) for count in num_attractors])
        self.distribution = nn.Sequential(
            nn.Conv2d(condition, condition_hidden, 1), nn.GELU(), nn.Conv2d(condition_hidden, 4, 1), nn.Softplus()
        )

    def forward(self, bottleneck: Tensor, guides: list[Tensor], condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centers = self.seed_centers(bottleneck)
        for attract, guide in zip(self.attractors, guides, strict=True):
            points = self.positive(attract(guide))
            centers = resize(centers, points.shape[-2:])
            centers = centers + attraction(points, centers, alpha=self.alpha, gamma=self.gamma)
        if self.depth_range is not None:
            low, high = self.depth_range
            centers = ((high - low) * centers + low).sort(dim=1).values.clamp(low, high)
        pairs = self.distribution(condition).float().unflatten(1, (2, 2)) + 1e-4
        probability, share = (pairs[:, :, :1] / pairs.sum(dim=2, keepdim=True)).unbind(1)
        return centers, probability, share

    def seed_centers(self, bottleneck: Tensor) -> Tensor:
        """Metres, or with a range its share from 0 to 1."""
        seeds = self.positive(self.seeds(bottleneck))
        if self.depth_range is None:
            return seeds
        widths = seeds / seeds.sum(dim=1, keepdim=True)
        return widths.cumsum(dim=1) - widths / 2

    def positive(self, values: Tensor) -> Tensor:
        values = values.float()
        return F.softplus(values) if self.depth_range is None else F.relu(values) + EPSILON


class Router(nn.Module):
    """Which domain an image is of: coarsest map (B, f, h, w) to logits (B, domains), by four transformer layers."""

    def __init__(self, features: int, *, num_domains: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(features, width, 1)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=1024, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_domains))

    def forward(self, bottleneck: Tensor) -> Tensor:
        # The class token is 0; its position is all that it is.
        tokens = F.pad(self.embedding(bottleneck).flatten(2), (1, 0)).transpose(1, 2)
        tokens = tokens + position_encoding(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)
        return self.classifier(self.transformer(tokens)[:, 0]).float()


def pointwise(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two 1x1 convolutions with a ReLU between."""
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, out, 1))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=(size[0], size[1]), mode="bilinear", align_corners=True)


def attraction(points: Tensor, centers: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Mean over the points a of `d / (1 + alpha * |d|^gamma)`, d = a - centre: how far each centre moves.

    points (B, n, h, w), centers (B, K, h, w), result like centers. Source: "inverse attractor", section 3.2.
    """
    moved = torch.zeros_like(centers)
    for point in points.unbind(1):
        distance = point[:, None] - centers
        moved = moved + distance / (1 + alpha * distance.abs() ** gamma)
    return moved / points.shape[1]


def expected_depth(centers: Tensor, probability: Tensor, share: Tensor) -> Tensor:
    """Mean of centres (B, K, h, w), upsampled, under a binomial distribution with a temperature; result (B, H, W).

    Weights are `softmax((ln C(K - 1, k) + k ln p + (K - 1 - k) ln(1 - p)) / t)`, t from `TEMPERATURES` by its
    share (B, 1, H, W), the logarithm of the coefficients by Stirling's formula. Source: section 3.2.
    """
    trials = centers.shape[1] - 1
    successes = torch.arange(trials + 1, device=centers.device, dtype=torch.float32).view(1, -1, 1, 1)
    likelihood = (
        log_binomial_coefficient(trials, successes)
        + successes * probability.clamp(min=1e-4).log()
        + (trials - successes) * (1 - probability).clamp(min=1e-4).log()
    )
    lowest, highest = TEMPERATURES
    weights = (likelihood / (lowest + (highest - lowest) * share)).softmax(dim=1)
    return (weights * resize(centers, probability.shape[-2:])).sum(dim=1)


def log_binomial_coefficient(trials: float, successes: Tensor, epsilon: float = 1e-7) -> Tensor:
    """`ln C(n, k)` as `n ln n - k ln k - (n - k) ln(n - k)`."""
    total, some = torch.full_like(successes, trials) + epsilon, successes + epsilon
    rest = total - some
    return total * total.log() - some * some.log() - rest * (rest + epsilon).log()


def position_encoding(length: int, width: int, device: torch.device) -> Tensor:
    """(length, width): sines, then cosines, of the position at wavelengths from 2 pi to 2 pi * 10000."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
