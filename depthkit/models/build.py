"""From settings to networks with random weights."""

from collections.abc import Callable
from typing import Any

from depthkit.config import DispNetConfig, DPTConfig, Eigen2014Config, MetricBinsConfig, ModelConfig
from depthkit.models.depth_model import DepthModel
from depthkit.models.dispnet import DispNet
from depthkit.models.dpt import HEAD_WIDTH, DPTDecoder
from depthkit.models.eigen import Eigen2014
from depthkit.models.encoder import Encoder, create_encoder
from depthkit.models.linear import LinearDecoder
from depthkit.models.metric_bins import MetricBins, MetricBinsDecoder, MetricBinsModel


def build_encoder(config: DPTConfig, *, pretrained: bool = False) -> Encoder:
    """The encoder alone, with random weights or, `pretrained`, with timm's (downloaded from its hub)."""
    return create_encoder(
        config.encoder,
        tap_layers=config.tap_layers,
        conv_stem=config.conv_stem,
        pretrained=pretrained,
        **config.encoder_args,
    )


def build_dpt(config: DPTConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    encoder = build_encoder(config, pretrained=pretrained_encoder)
    shape: dict[str, Any] = {"widths": encoder.widths, "strides": encoder.strides, "max_depth": config.max_depth}
    if config.decoder == "linear":
        return DepthModel(encoder, LinearDecoder(**shape))
    return DepthModel(encoder, DPTDecoder(**shape, features=config.features, out_channels=config.out_channels))


def build_metric_bins(config: MetricBinsConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    encoder = build_encoder(config, pretrained=pretrained_encoder)
    relative = DPTDecoder(
        widths=encoder.widths, strides=encoder.strides, features=config.features, out_channels=config.out_channels
    )
    bins = MetricBins(
        features=config.features,
        head_width=min(HEAD_WIDTH, config.features),
        heads=config.ranges,
        num_bins=config.num_bins,
        embedding=config.embedding,
        num_attractors=config.num_attractors,
        attractor_alpha=config.attractor_alpha,
        attractor_gamma=config.attractor_gamma,
        min_depth=config.min_depth,
        is_bounded=config.centers == "normed",
    )
    return MetricBinsModel(encoder, MetricBinsDecoder(relative, bins))


def build_eigen2014(config: Eigen2014Config, *, pretrained_encoder: bool = False) -> DepthModel:
    assert not pretrained_encoder, "refused while composing: it is not in timm"
    return Eigen2014(config)


def build_dispnet(config: DispNetConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    assert not pretrained_encoder, "refused while composing: it is not in timm"
    return DispNet(config)


BUILDERS: dict[type[ModelConfig], Callable[..., DepthModel]] = {
    DPTConfig: build_dpt,
    MetricBinsConfig: build_metric_bins,
    Eigen2014Config: build_eigen2014,
    DispNetConfig: build_dispnet,
}
"""Settings -> what builds their network: `build(config, pretrained_encoder=False)`."""


def build_model(config: ModelConfig, *, pretrained_encoder: bool = False) -> DepthModel:
    """The model that `config` describes, with random weights (encoder from timm's hub with `pretrained_encoder`)."""
    return BUILDERS[type(config)](config, pretrained_encoder=pretrained_encoder)
