"""Predicting with a finished model: images in, `Prediction` out."""

from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch.nn import functional as F

from depthkit.bundle import UNITS, BundleFacts, load_model
from depthkit.data.decode import decode_image
from depthkit.data.quarantine import SampleError
from depthkit.data.windows import crop_image, full_window, inference_size, normalize
from depthkit.models import DepthModel
from depthkit.types import Kind, Prediction


class Predictor:
    """A loaded model with its preprocessing: images in, `Prediction` out."""

    def __init__(self, model: DepthModel, facts: BundleFacts, *, name: str, device: torch.device) -> None:
        self.model = model.to(device)
        self.facts = facts
        self.name = name
        self.device = device
        self.kind: Kind = facts.kind
        self.unit = UNITS[facts.kind]
        self.sha256 = facts.sha256

    @overload
    def predict(self, image: np.ndarray | str | Path, *, short_side: int | None = None) -> Prediction: ...
    @overload
    def predict(self, image: list[np.ndarray | str | Path], *, short_side: int | None = None) -> list[Prediction]: ...
    def predict(
        self, image: np.ndarray | str | Path | list[np.ndarray | str | Path], *, short_side: int | None = None
    ) -> Prediction | list[Prediction]:
        """Predict one image or a list: (H, W, 3) uint8 RGB arrays or paths. Values come at the size of the image.

        The image is resized so that its shorter side is `short_side` (default: as in training), aspect kept, sides
        multiples of the patch; the result is interpolated back (bilinear, align_corners=True, as the released V2).
        """
        if isinstance(image, list):
            return [self._predict_one(item, short_side) for item in image]
        if not isinstance(image, np.ndarray | str | Path):
            raise ValueError(f"expected an (H, W, 3) uint8 RGB image or a path, got {type(image).__name__}")
        return self._predict_one(image, short_side)

    @torch.inference_mode()
    def _predict_one(self, image: np.ndarray | str | Path, short_side: int | None) -> Prediction:
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image))
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0 or pixels.dtype != np.uint8:
            raise ValueError(f"expected an (H, W, 3) uint8 RGB image, got shape {pixels.shape}, {pixels.dtype}")
        size = (pixels.shape[0], pixels.shape[1])
        model_size = inference_size(size, short_side or self.facts.short_side, self.model.encoder.patch_size)
        resized = crop_image(pixels, full_window(size, model_size), size)
        batch = torch.from_numpy(resized).permute(2, 0, 1)[None].to(self.device)
        values = self.model(normalize(batch, self.facts.mean, self.facts.std)).values
        restored = F.interpolate(values[:, None].float(), size, mode="bilinear", align_corners=True)[0, 0]
        return Prediction(values=restored.cpu().numpy(), kind=self.kind, unit=self.unit)


def load(path: str | Path, device: str = "auto") -> Predictor:
    """Load a bundle for prediction; `device` is a torch device or "auto" (a GPU where there is one)."""
    folder = Path(path)
    model, facts = load_model(folder)
    return Predictor(model, facts, name=str(path), device=choose_device(device))


def choose_device(device: str) -> torch.device:
    """The torch device that a name means; "auto" takes CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def read_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 3) uint8 RGB; SampleError names the file."""
    try:
        return decode_image(path.read_bytes())
    except SampleError as error:
        raise SampleError(f"{path}: {error}") from error
