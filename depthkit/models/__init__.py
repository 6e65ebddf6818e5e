from depthkit.models.build import build_encoder, build_model
from depthkit.models.depth_model import DepthModel, num_parameters
from depthkit.models.encoder import Encoder, PlainEncoder, create_encoder

__all__ = ["DepthModel", "Encoder", "PlainEncoder", "build_encoder", "build_model", "create_encoder", "num_parameters"]
