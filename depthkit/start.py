"""What a stage starts from: the weights of a bundle, judged while composing and loaded when training begins."""

from collections.abc import Collection
from pathlib import Path

import torch

from depthkit.bundle import (
    BundleError,
    ReadWeights,
    load_depth_model_weights,
    load_encoder_weights,
    read_shapes,
    read_weights,
)
from depthkit.config import BundleStartConfig, ConfigError, TrainConfig, VideoConfig
from depthkit.egomotion_bundle import load_egomotion_weights
from depthkit.models import DepthModel, build_model
from depthkit.models.egomotion import EgomotionNet


def initialised_model(config: TrainConfig) -> DepthModel:
    """The model with the weights that the stage starts from: those of the encoder, or with `decoder_weights` all."""
    model = build_model(config.model, pretrained_encoder=config.stage.encoder_weights == "timm")
    fill(model, config, read_weights)
    return model


def initialised_egomotion(config: TrainConfig, stage: VideoConfig) -> EgomotionNet:
    assert config.data.clip_frames is not None
    network = EgomotionNet(stage.egomotion, config.data.clip_frames)
    if stage.egomotion_weights is not None:
        load_egomotion_weights(network, Path(stage.egomotion_weights))
    return network


def fill(model: DepthModel, config: TrainConfig, read: ReadWeights) -> None:
    weights = config.stage.encoder_weights
    if weights in (None, "timm"):
        return
    if isinstance(config.stage, BundleStartConfig) and config.stage.decoder_weights:
        load_depth_model_weights(model, Path(str(weights)), read)
    else:
        load_encoder_weights(model.encoder, Path(str(weights)), read)


def check_start(config: TrainConfig, pending: Collection[str] = ()) -> None:
    """The weights are there and fit the model by name and shape; ConfigError. Bundles in `pending` are still to come.

    The model is built without memory, and of the bundle facts and header are read.
    """
    weights = config.stage.encoder_weights
    if weights not in pending:
        with torch.device("meta"):
            model = build_model(config.model)
        try:
            fill(model, config, read_shapes)
        except BundleError as error:
            raise ConfigError(f"stage.encoder_weights={weights} and model {config.model.title}: {error}") from error
    if isinstance(config.stage, VideoConfig):
        try:
            initialised_egomotion(config, config.stage)
        except BundleError as error:
            raise ConfigError(f"stage.egomotion_weights={config.stage.egomotion_weights}: {error}") from error
