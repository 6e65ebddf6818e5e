"""Predicting with a finished model: images in, `Prediction` out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from depthkit.bundle import BundleFacts
from depthkit.data.decode import decode_image
from depthkit.data.quarantine import SampleError
from depthkit.data.windows import inference_size, normalize
from depthkit.inference.tiling import Box, blend_tiles
from depthkit.types import Kind, Prediction

BATCH_SIZE = 8
"""Images (or tiles of an image) that the network sees at once."""
BATCHES_WAITING = 4
"""Images of different sizes wait for others of their size, at most as many as fill this number of batches."""

Network = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) float32 to values (B, H, W) float32, both on the predictor's device."""
Image = np.ndarray | str | Path
"""(H, W, 3) uint8 RGB, or the path of an image file."""
Images = list[np.ndarray] | list[str] | list[Path] | list[Image]


class Predictor:
    """A network with its preprocessing: images in, `Prediction` out.

    The preprocessing is that of the released Depth Anything models: RGB in [0, 1] as floats, resized by
    OpenCV's INTER_CUBIC to `inference_size`, normalised by mean and standard deviation (of `facts`). `multiple` is what
    the sides of the network's input must be multiples of.
    """

    def __init__(self, network: Network, facts: BundleFacts, *, name: str, multiple: int, device: torch.device) -> None:
        self.network = network
        self.facts = facts
        self.name = name
        self.multiple = multiple
        self.device = device
        self.kind: Kind = facts.kind
        self.unit = facts.model.unit
        self.sha256 = facts.sha256

    @overload
    def predict(
        self,
        image: Image,
        *,
        short_side: int | None = None,
        flip: bool = False,
        tile: int | None = None,
        focal_px: float | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prediction: ...
    @overload
    def predict(
        self,
        image: Images,
        *,
        short_side: int | None = None,
        flip: bool = False,
        tile: int | None = None,
        focal_px: float | Sequence[float] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> list[Prediction]: ...
    def predict(
        self,
        image: Image | Images,
        *,
        short_side: int | None = None,
        flip: bool = False,
        tile: int | None = None,
        focal_px: float | Sequence[float] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Prediction | list[Prediction]:
        """Predict one image or a list: (H, W, 3) uint8 RGB arrays or paths. Values come at the size of the image.

        The image is resized so that its shorter side is `short_side` pixels (default: as in training), aspect kept,
        sides multiples of the patch; the result is interpolated back (bilinear, align_corners=True, as the released
        V2). `flip` averages with the mirrored prediction of the mirrored image, at twice the time.

        With `tile`, an image that is larger than that many pixels is also predicted in overlapping tiles of `tile` x
        `tile` pixels at its own resolution, on the scale of the prediction at `short_side` (`tiling.blend_tiles`);
        for one that the network sees at its own resolution anyway, tiles change nothing and are left out.

        `focal_px` is the horizontal focal length in pixels of the image as it is given, one for all images or one for
        each: what a model with `canonical_focal_px` in its facts needs to say metres, and others do not take.

        Images of a list are read one after the other and go through the network in batches of up to `batch_size` that
        have the same size for it. SampleError and OSError name the file that cannot be read, ValueError what is no
        image.
        """
        sizes = {"short_side": self.facts.short_side if short_side is None else short_side, "batch_size": batch_size}
        for name, value in {**sizes, "tile": tile}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        images = image if isinstance(image, list) else [image]
        focal_lengths = self.focal_lengths(focal_px, len(images))
        if tile is None:
            predictions = self._predict_batched(images, focal_lengths, flip=flip, **sizes)
        else:
            predictions = [
                self._predict_tiled(read_image(item), focal, tile, flip=flip, **sizes)
                for item, focal in zip(images, focal_lengths, strict=True)
            ]
        return predictions if isinstance(image, list) else predictions[0]

    def focal_lengths(self, focal_px: float | Sequence[float] | None, num_images: int) -> list[float | None]:
        """One for each image, None where the model takes none; ValueError where one is missing or not needed."""
        if self.facts.canonical_focal_px is None:
            if focal_px is not None:
                raise ValueError(f"focal_px={focal_px}: {self.name} was trained without focal lengths; leave it out")
            return [None] * num_images
        given: list[float | None] = [*focal_px] if isinstance(focal_px, Sequence) else [focal_px] * num_images
        if len(given) != num_images or not all(value is not None and 0 < value < float("inf") for value in given):
            raise ValueError(
                f"focal_px={focal_px}: {self.name} needs the horizontal focal length of each image, in its pixels, "
                "above 0 (--focal-px on the command line)"
            )
        return given

    @torch.inference_mode()
    def _predict_batched(
        self, images: Images, focal_lengths: list[float | None], *, short_side: int, flip: bool, batch_size: int
    ) -> list[Prediction]:
        predictions: dict[int, Prediction] = {}
        inputs = (
            self._input(index, read_image(image), short_side, focal)
            for index, (image, focal) in enumerate(zip(images, focal_lengths, strict=True))
        )
        for batch in batches_of_one_size(inputs, batch_size):
            maps = self._run([item.pixels for item in batch], flip=flip)
            for item, one in zip(batch, maps, strict=True):
                values = resize_values(one[None], item.image_size)[0] * item.factor
                predictions[item.index] = self._prediction(values)
        return [predictions[index] for index in range(len(images))]

    @torch.inference_mode()
    def _predict_tiled(
        self, pixels: np.ndarray, focal_px: float | None, tile: int, *, short_side: int, flip: bool, batch_size: int
    ) -> Prediction:
        whole = self._input(0, pixels, short_side, focal_px)
        resolution = whole.pixels.shape[0], whole.pixels.shape[1]
        # Tiles are brought to the scale of this one, so they need no focal length.
        coarse = resize_values(self._run([whole.pixels], flip=flip), whole.image_size)[0] * whole.factor
        if max(whole.image_size) <= tile or all(
            r >= side for r, side in zip(resolution, whole.image_size, strict=True)
        ):
            return self._prediction(coarse)

        def predict_boxes(boxes: list[Box]) -> Tensor:
            crops = [pixels[box] for box in boxes]
            size = crops[0].shape[0], crops[0].shape[1]
            tile_size = inference_size(size, min(size), self.multiple)
            values = self._run([resize_image(crop, tile_size) for crop in crops], flip=flip)
            return resize_values(values, size)

        fine = blend_tiles(coarse, predict_boxes, tile=tile, resolution=resolution, batch_size=batch_size)
        return self._prediction(fine.clamp_(min=0))

    def _input(self, index: int, pixels: np.ndarray, short_side: int, focal_px: float | None) -> "Input":
        image_size = pixels.shape[0], pixels.shape[1]
        resized = resize_image(pixels, inference_size(image_size, short_side, self.multiple))
        canonical, factor = self.facts.canonical_focal_px, 1.0
        if canonical is not None and focal_px is not None:
            factor = focal_px * resized.shape[1] / image_size[1] / canonical
        return Input(index=index, image_size=image_size, pixels=resized, factor=factor)

    def _run(self, images: list[np.ndarray], *, flip: bool) -> Tensor:
        """Resized images of one size, (h, w, 3) float32 of 0 to 255, to values (B, h, w) on the device."""
        batch = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).contiguous()
        batch = normalize(batch, self.facts.mean, self.facts.std)
        values = self.network(batch)
        return (values + self.network(batch.flip(-1)).flip(-1)) / 2 if flip else values

    def _prediction(self, values: Tensor) -> Prediction:
        return Prediction(values=values.cpu().numpy(), kind=self.kind, unit=self.unit)


@dataclass(frozen=True, kw_only=True)
class Input:
    """An image of a list on its way to the network: `pixels` (h, w, 3) float32 of 0 to 255, and what the values that
    come back are multiplied by."""

    index: int
    image_size: tuple[int, int]
    pixels: np.ndarray
    factor: float


def batches_of_one_size(inputs: Iterable[Input], batch_size: int) -> Iterator[list[Input]]:
    """Batches of up to `batch_size` inputs of one size; few are held at a time, whatever the number of sizes."""
    waiting: dict[tuple[int, ...], list[Input]] = {}
    for item in inputs:
        group = waiting.setdefault(item.pixels.shape, [])
        group.append(item)
        if len(group) == batch_size or sum(map(len, waiting.values())) == BATCHES_WAITING * batch_size:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


def resize_image(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 to (h, w, 3) float32: cubic, neither antialiased nor rounded or cut to 0 to 255.

    As Depth Anything (util/transform.py) and its released weights have it, unlike most resizing functions.
    """
    # float64 as there: for float32 OpenCV may take another path, with other weights (1e-4 after normalisation).
    return cv2.resize(pixels.astype(np.float64), size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)


def resize_values(values: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, h, w) to (B, H, W): bilinear, the corners on the corners (Depth Anything V2 `infer_image`)."""
    return F.interpolate(values[:, None], size, mode="bilinear", align_corners=True)[:, 0]


def read_image(image: Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an array or a file; SampleError names the file, ValueError says what is no image."""
    if isinstance(image, str | Path):
        try:
            return decode_image(Path(image).read_bytes())
        except SampleError as error:
            raise SampleError(f"{image}: {error}") from error
    if not isinstance(image, np.ndarray):
        raise ValueError(f"expected an (H, W, 3) uint8 RGB image or a path, got {type(image).__name__}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.uint8:
        raise ValueError(f"expected an (H, W, 3) uint8 RGB image, got shape {image.shape}, {image.dtype}")
    return image
