from depthkit.models.depth_model import DepthModel, build_encoder, build_model
from depthkit.models.encoder import Encoder

__all__ = ["DepthModel", "Encoder", "build_encoder", "build_model"]
