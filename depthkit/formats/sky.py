"""Sky from a segmentation network in an ONNX file."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.data.windows import normalize
from depthkit.formats.onnx import OnnxError, has_cuda, open_session


def load_sky_model(path: Path, device: torch.device, sky_class: int) -> Callable[[Tensor], Tensor]:
    """The function from images (B, 3, H, W) uint8 to sky masks (B, H, W) bool on their device.

    The file takes images (B, 3, H, W) float32, normalised as ImageNet is, and gives scores (B, classes, h, w); sky is
    where `sky_class` has the largest, resized to the image. Sides and a batch of 1 that the file fixes are kept to. It
    runs on `device` where onnxruntime can. OnnxError when it is damaged or of other shapes.
    """
    session = open_session(path, device if device.type == "cpu" or has_cuda() else torch.device("cpu"))
    (given, *more), (scores, *_) = session.get_inputs(), session.get_outputs()
    if more or len(given.shape) != 4 or len(scores.shape) != 4:
        shapes = f"{[each.shape for each in (given, *more)]} to {scores.shape}"
        raise OnnxError(f"{path}: needs one input (B, 3, H, W) and scores (B, classes, h, w), found {shapes}")
    num_classes = scores.shape[1]
    if isinstance(num_classes, int) and sky_class >= num_classes:
        raise OnnxError(f"{path}: stage.sky_class={sky_class}, but there are only {num_classes} classes")
    fixed_batch, _, *fixed_sides = (side if isinstance(side, int) else None for side in given.shape)

    def find_sky(images: Tensor) -> Tensor:
        size = images.shape[-2:]
        wanted = [fixed or side for fixed, side in zip(fixed_sides, size, strict=True)]
        normalized = normalize(images)
        if wanted != list(size):
            normalized = F.interpolate(normalized, wanted, mode="bilinear", antialias=True)
        parts = torch.split(normalized.cpu(), fixed_batch or len(images))
        try:
            found = [session.run([scores.name], {given.name: part.numpy()})[0].argmax(1) == sky_class for part in parts]
        except Exception as error:  # onnxruntime's exceptions share no other base
            raise OnnxError(f"{path} does not run on {tuple(normalized.shape)}: {error}") from error
        masks = torch.cat([torch.from_numpy(each) for each in found]).to(images.device)
        return F.interpolate(masks[:, None].float(), list(size), mode="nearest-exact")[:, 0] > 0

    return find_sky
