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
        check(min(self.input_size) >= 63, "model.input_size", self.input_size, "at least 63 pixels each: coarse5 needs it")
        rows, height = self.predicted_rows, self.input_size[0]
        check(11 <= rows <= height, "model.predicted_rows", rows, f"11 to the {height} rows of model.input_size")
        check(len(self.coarse_widths) == 5, "model.coarse_widths", self.coarse_widths, "five widths")
        check(self.fine_width > 1, "model.fine_width", self.fine_width, "> 1: the coarse map and features of fine1")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "0 to < 1")

    @property
    def kind(self) -> Literal["disparity", "depth"]:
        return "depth"


ARCHITECTURES: dict[str, type[ModelConfig]] = {"dpt": DPTConfig, "eigen2014": Eigen2014Config}
"""Name of an architecture in a bundle -> its settings."""


def read_model(settings: Mapping[str, Any]) -> ModelConfig:
    """The settings of a network from their JSON form, which names no architecture where it is as old as DPT alone.

    ConfigError, TypeError or KeyError for what is unknown, missing or out of range.
    """
    name = settings.get("architecture", "dpt")
    check(name in ARCHITECTURES, "model.architecture", name, "one of " + ", ".join(ARCHITECTURES))
    return ARCHITECTURES[name](**settings)
