"""What a bundle needs to rebuild a network; no training choice in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from depthkit.errors import check


@dataclass(kw_only=True)
class ModelConfig:
    """What every network says of itself."""

    architecture: str = MISSING  # which of `ARCHITECTURES` it is
    max_depth: float | None = None  # metres, the largest depth that it predicts; null: it predicts disparity, >= 0

    def __post_init__(self) -> None:
        known = ARCHITECTURES.get(self.architecture)
        check(known is type(self), "model.architecture", self.architecture, f"that of {type(self).__name__}")
        check(self.max_depth is None or self.max_depth > 0, "model.max_depth", self.max_depth, "> 0 (metres) or null")

    @property
    def kind(self) -> Literal["disparity", "depth"]:
        """What the values of the network are (`types.Kind`)."""
        return "disparity" if self.max_depth is None else "depth"

    @property
    def unit(self) -> str:
        """Of the values."""
        return "relative, larger = nearer" if self.kind == "disparity" else "metres, planar z"

    @property
    def title(self) -> str:
        """The network in a word or two."""
        return self.architecture


@dataclass(kw_only=True)
class DPTConfig(ModelConfig):
    """A transformer, or a network with stages, and a DPT decoder: the networks of Depth Anything."""

    architecture: str = "dpt"
    encoder: str = MISSING  # timm name: a vision transformer, or a network with stages (ResNet, ConvNeXt, Swin)
    encoder_args: dict[str, Any] = field(default_factory=dict)  # passed to timm: img_size, embed_dim, depth, ...
    conv_stem: bool = False  # stride-2 convolutions instead of the linear patch embedding
    tap_layers: list[int] = MISSING  # the four blocks (or stages) that the decoder reads, 0-based
    features: int = MISSING  # decoder width
    out_channels: list[int] = MISSING  # decoder widths per tap, before they become `features`
    decoder: str = "dpt"  # dpt | linear: one linear layer on all taps, without `features` and `out_channels`

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.decoder in ("dpt", "linear"), "model.decoder", self.decoder, "dpt or linear")
        check(len(self.tap_layers) == 4, "model.tap_layers", self.tap_layers, "four block indices")
        check(list(self.tap_layers) == sorted(set(self.tap_layers)), "model.tap_layers", self.tap_layers, "increasing")
        check(len(self.out_channels) == 4, "model.out_channels", self.out_channels, "four widths")
        check(self.features > 1 and self.features % 2 == 0, "model.features", self.features, "an even number > 1")

    @property
    def title(self) -> str:
        return self.encoder


@dataclass(kw_only=True)
class MetricBinsConfig(DPTConfig):
    """A relative model with a DPT decoder, and metric bins (ZoeDepth) that read its features."""

    architecture: str = "metric_bins"
    heads: dict[str, float] = field(default_factory=dict)  # name of a domain -> its max_depth, a router; {}: one head
    min_depth: float = 1e-3  # metres, of normed bins
    centers: str = "softplus"  # of the bins: softplus, without an upper bound | normed, from min_depth to max_depth
    num_bins: int = 64
    embedding: int = 128  # width of what moves the bins
    num_attractors: list[int] = field(default_factory=lambda: [16, 8, 4, 1])  # per level, coarse to fine
    attractor_alpha: float = 1000.0  # of the published settings, which its layers do not read: they run with 300
    attractor_gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.centers in ("softplus", "normed"), "model.centers", self.centers, "softplus or normed")
        check(self.decoder == "dpt", "model.decoder", self.decoder, "dpt: the bins read its maps")
        check(len(self.heads) != 1, "model.heads", self.heads, "at least two, or {} for one up to model.max_depth")
        largest = max(self.heads.values(), default=self.max_depth)
        allowed = f"{largest}, the largest of model.heads={self.heads}" if self.heads else "metres: bins are of depth"
        is_stated = self.max_depth is not None and self.max_depth == largest
        check(is_stated, "model.max_depth", self.max_depth, allowed)
        depths = [self.min_depth, *self.heads.values(), largest or 0.0]
        check(0 < depths[0] < min(depths[1:]), "model.min_depth", self.min_depth, f"> 0 and below {min(depths[1:])}")
        check(self.num_bins > 1, "model.num_bins", self.num_bins, "> 1")
        check(self.embedding > 1 and self.embedding % 2 == 0, "model.embedding", self.embedding, "an even number > 1")
        counts = self.num_attractors
        check(len(counts) == 4 and min(counts) > 0, "model.num_attractors", counts, "four numbers > 0")
        check(self.attractor_alpha >= 0, "model.attractor_alpha", self.attractor_alpha, ">= 0")
        check(self.attractor_gamma > 0, "model.attractor_gamma", self.attractor_gamma, "> 0")

    @property
    def title(self) -> str:
        return f"metric bins on {self.encoder}"

    @property
    def ranges(self) -> dict[str, float]:
        """Name of each head -> the largest depth that it is for, in metres."""
        return self.heads or {"depth": self.max_depth or 0.0}


@dataclass(kw_only=True)
class Eigen2014Config(ModelConfig):
    """The coarse and the fine network of Eigen et al. 2014 (arXiv 1406.2283, figure 1), which predict log depth."""

    architecture: str = "eigen2014"
    input_size: list[int] = MISSING  # height, width in pixels: to these every image is resized
    predicted_rows: int = MISSING  # pixels of the input, from below, whose depth is predicted
    fine: bool = True  # False: the coarse network alone
    coarse_widths: list[int] = field(default_factory=lambda: [96, 256, 384, 384, 256])  # of its five convolutions
    hidden: int = 4096  # width of its fully connected layer
    fine_width: int = 64  # of the fine network
    dropout: float = 0.5  # not stated in the paper; default from AlexNet, whose layer it is

    def __post_init__(self) -> None:
        super().__post_init__()
        check(len(self.input_size) == 2, "model.input_size", self.input_size, "[height, width]")
        check(
            min(self.input_size) >= 63, "model.input_size", self.input_size, "at least 63 pixels each: coarse5 needs it"
        )
        rows, height = self.predicted_rows, self.input_size[0]
        check(11 <= rows <= height, "model.predicted_rows", rows, f"11 to the {height} rows of model.input_size")
        check(len(self.coarse_widths) == 5, "model.coarse_widths", self.coarse_widths, "five widths")
        check(self.fine_width > 1, "model.fine_width", self.fine_width, "> 1: the coarse map and features of fine1")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 to < 1")

    @property
    def kind(self) -> Literal["disparity", "depth"]:
        return "depth"


@dataclass(kw_only=True)
class DispNetConfig(ModelConfig):
    """The convolutional pyramid of SfMLearner and vid2depth: depth up to scale, learned from video."""

    architecture: str = "dispnet"
    width_factor: float = 1.0  # of all its widths; 1 is the published network

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.width_factor > 0, "model.width_factor", self.width_factor, "> 0")
        check(self.max_depth is None, "model.max_depth", self.max_depth, "null: dispnet does not know metres")

    @property
    def kind(self) -> Literal["disparity", "depth"]:
        return "depth"

    @property
    def unit(self) -> str:
        return "relative"


@dataclass(kw_only=True)
class EgomotionConfig:
    """The network that tells how the camera moved; not part of the depth model."""

    widths: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 256, 256, 256])  # of its convolutions
    search_px: int | None = None  # compare frames at half size at shifts up to this; null: learn to, as published

    def __post_init__(self) -> None:
        check(1 <= len(self.widths) <= 7, "egomotion.widths", self.widths, "one to seven widths")
        check(self.search_px is None or self.search_px > 0, "egomotion.search_px", self.search_px, "> 0 or null")


ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "dpt": DPTConfig,
    "metric_bins": MetricBinsConfig,
    "eigen2014": Eigen2014Config,
    "dispnet": DispNetConfig,
}
"""Name of an architecture in a bundle -> its settings."""


def read_model(settings: Mapping[str, Any]) -> ModelConfig:
    """The settings of a network from their JSON form, which names no architecture where it is as old as DPT alone.

    ConfigError, TypeError or KeyError for what is unknown, missing or out of range.
    """
    name = settings.get("architecture", "dpt")
    check(name in ARCHITECTURES, "model.architecture", name, "one of " + ", ".join(ARCHITECTURES))
    return ARCHITECTURES[name](**settings)
