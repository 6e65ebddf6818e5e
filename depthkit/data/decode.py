"""From the bytes of a sample to what the stages work with: RGB images, and targets of the stage's kind with their mask.

Every quantity a data set may hold becomes `disparity` or `depth` here and nowhere else.
"""

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from depthkit import geometry
from depthkit.data.codecs import CODECS, SIZES, imdecode, read_png8
from depthkit.data.manifest import Codec, TargetSpec
from depthkit.data.quarantine import SampleError
from depthkit.types import Kind

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
EXIF_ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
REDUCED_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}
MAX_CODE = 65535
# The low byte of a code is noise: looking for anything but runs (sky) costs time and space (docs/label-storage.md).
PNG_OPTIONS = (cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE)


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of what `decode_image` gives, from the header alone; SampleError if that is unreadable."""
    try:
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        sideways = image.getexif().get(EXIF_ORIENTATION) in SIDEWAYS
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"unreadable image header ({len(data)} bytes): {error}") from error
    width, height = image.size
    return (width, height) if sideways else (height, width)


def decode_image(data: bytes, *, reduce: int = 1) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned upright as EXIF says. Grey is repeated, alpha dropped, 16 bits cut to the upper 8.

    A JPEG is decoded at 1/`reduce` (1, 2, 4 or 8) of its size, rounded up, which costs a fraction of the time; other
    formats have no such short cut and come at full size. SampleError when the image is damaged or cut off.
    """
    is_jpeg = data.startswith(b"\xff\xd8")
    image = imdecode(data, REDUCED_FLAGS[reduce if is_jpeg else 1])
    if image is None or (is_jpeg and not _has_jpeg_end(data)):
        raise SampleError(f"damaged or cut off image ({len(data)} bytes)")
    return image


def _has_jpeg_end(data: bytes) -> bool:
    """Whether an end mark follows the first scan (those before it belong to thumbnails).

    libjpeg notices a file that is cut, but takes a tail of zeros, as interrupted copies leave it, for grey pixels.
    """
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":
        is_fill_byte = data[start + 1 : start + 2] == b"\xff"
        start += 1 if is_fill_byte else 2 + int.from_bytes(data[start + 2 : start + 4])
    return data.rfind(b"\xff\xd9", start) >= 0


def target_size(data: bytes, codec: Codec) -> tuple[int, int]:
    """(height, width) of a label from its header alone; SampleError if it is not what the codec expects."""
    return SIZES[codec](data)


class _Labels(NamedTuple):
    """Valid stored numbers divided by the scale, (H, W) float32, and what a conversion may need to know of them."""

    values: np.ndarray
    rows: np.ndarray
    cols: np.ndarray
    facts: Mapping[str, Any]

    def fact(self, name: str) -> Any:
        return number_fact(self.facts, name)


def read_facts(members: Mapping[str, bytes]) -> dict[str, Any]:
    """The sample's `KEY.json`, empty when there is none; SampleError when it is not a JSON object."""
    try:
        facts = json.loads(members.get("json", b"{}"))
    except ValueError as error:
        raise SampleError(f"KEY.json is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise SampleError(f"KEY.json holds {type(facts).__name__}, not an object of facts")
    return facts


def number_fact(facts: Mapping[str, Any], name: str) -> Any:
    """The number that a sample's facts hold under `name`, of `intrinsics_px` the list of four; else SampleError."""
    if name not in facts:
        raise SampleError(f"the sample's facts lack {name!r}; they hold {', '.join(facts) or 'nothing'}")
    try:
        numbers = np.array(facts[name], np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.array(np.nan)
    if numbers.shape != ((4,) if name == "intrinsics_px" else ()) or not np.isfinite(numbers).all():
        wanted = "four numbers" if name == "intrinsics_px" else "a number"
        raise SampleError(f"the sample's fact {name!r} is {str(facts[name])[:80]}, not {wanted}")
    return numbers.tolist()


def _depth_from_ray_distance(labels: _Labels) -> np.ndarray:
    centre_rows = labels.rows[:, None].astype(np.float32) + 0.5
    centre_cols = labels.cols[None, :].astype(np.float32) + 0.5
    x, y = geometry.pixel_rays(centre_rows, centre_cols, labels.fact("intrinsics_px"))
    return geometry.ray_distance_to_depth(labels.values, x, y)


def _depth_from_stereo(labels: _Labels) -> np.ndarray:
    return geometry.stereo_disparity_to_depth(
        labels.values,
        focal_px=labels.fact("intrinsics_px")[0],
        baseline_m=labels.fact("baseline_m"),
        doffs_px=labels.fact("doffs_px") if "doffs_px" in labels.facts else 0.0,
    )


TO_DEPTH = {
    "depth": lambda labels: labels.values,
    "ray_distance": _depth_from_ray_distance,
    "inverse_depth": lambda labels: geometry.reciprocal(labels.values),
    "stereo_disparity_px": _depth_from_stereo,
}


def decode_target(
    data: bytes,
    spec: TargetSpec,
    facts: Mapping[str, Any],
    kind: Kind,
    *,
    rows: np.ndarray | None = None,
    cols: np.ndarray | None = None,
    sky: bytes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Target (H, W) float32 of `kind` and its `valid_mask` (H, W) bool; invalid pixels hold 0.

    `rows`, `cols` are integer label pixels to take, output (i, j) being label pixel (rows[i], cols[j]); all when None.
    Only those are converted, so a crop costs what it holds.

    `facts` are those of the sample. Ray distance needs `intrinsics_px` in pixels of the label; depth from stereo needs
    `intrinsics_px`, `baseline_m` and, if not 0, `doffs_px`. Stereo without a baseline stays in pixels for `disparity`.
    `sky` is an 8-bit PNG of the label's size, > 0 = sky, as are stored numbers among the data set's `sky_values`:
    disparity 0 and valid where nothing was measured. For depth, sky stays invalid.

    ValueError when the data set cannot give `kind` at all. SampleError when this label cannot be read, lacks facts, or
    has no valid pixel anywhere; a crop without one is not an error.
    """
    if kind == "depth" and not spec.metric:
        raise ValueError(
            f"{spec.quantity} without a unit (metric: false) cannot give depth in metres; use it as disparity"
        )
    stored = CODECS[spec.codec](data)
    rows = np.arange(stored.shape[0]) if rows is None else rows
    cols = np.arange(stored.shape[1]) if cols is None else cols
    taken = stored[rows][:, cols]
    if spec.quantity == "disparity" and spec.codec == "png16":
        return _decode_codes(taken, facts), np.ones(taken.shape, bool)
    valid_mask = _measured(taken, spec)
    labels = _Labels(np.where(valid_mask, taken, 1).astype(np.float32) / np.float32(spec.scale), rows, cols, facts)
    target = _convert(labels, spec, kind)
    valid_mask &= np.isfinite(target) & (target > 0)
    target = np.where(valid_mask, target, np.float32(0))
    sky_mask = _sky_mask(sky, stored, spec) if kind == "disparity" else np.zeros(stored.shape, bool)
    valid_mask |= sky_mask[rows][:, cols]
    if not valid_mask.any() and not (_measured(stored, spec) | sky_mask).any():
        raise SampleError(f"no valid pixel: all {stored.size} stored numbers mean 'no measurement'")
    return target, valid_mask


def _measured(stored: np.ndarray, spec: TargetSpec) -> np.ndarray:
    """Where a stored number is a measurement: finite, positive and none of the data set's invalid values."""
    measured = np.isfinite(stored) & (stored > 0)
    for value in (*spec.invalid_values, *spec.sky_values):
        measured &= stored != value
    return measured


def _convert(labels: _Labels, spec: TargetSpec, kind: Kind) -> np.ndarray:
    """Stored quantity to `kind`, by way of depth unless it is a disparity already."""
    uncalibrated = spec.quantity == "stereo_disparity_px" and "baseline_m" not in labels.facts
    if kind == "disparity" and (uncalibrated or spec.quantity in ("inverse_depth", "disparity")):
        return labels.values
    depth = TO_DEPTH[spec.quantity](labels)
    return depth if kind == "depth" else geometry.reciprocal(depth)


def _sky_mask(sky: bytes | None, stored: np.ndarray, spec: TargetSpec) -> np.ndarray:
    mask = np.isin(stored, spec.sky_values) if spec.sky_values else np.zeros(stored.shape, bool)
    if sky is None:
        return mask
    given = read_png8(sky) > 0
    if given.shape != stored.shape:
        raise SampleError(f"the sky mask is {given.shape}, the label {stored.shape}")
    return mask | given


def encode_disparity(disparity: np.ndarray) -> tuple[bytes, dict[str, float]]:
    """Pseudo-label (H, W) to a 16-bit PNG and the facts that `decode_target` needs to read it back.

    `code = round((disparity - offset) / scale * 65535)` with offset = minimum and scale = maximum - minimum, so the
    error is at most half a code, `scale / 65535 / 2`, plus the rounding of float32. A constant map has scale 0 and is
    exact. ValueError when a value is not finite or the array is not one map.
    """
    if disparity.ndim != 2 or not np.isfinite(disparity).all():
        raise ValueError(f"a pseudo-label must be one finite (height, width) map, got shape {disparity.shape}")
    values = disparity.astype(np.float64)
    offset = float(values.min())
    scale = float(values.max()) - offset
    codes = np.rint((values - offset) * (MAX_CODE / scale if scale > 0 else 0)).astype(np.uint16)
    written, png = cv2.imencode(".png", codes, PNG_OPTIONS)
    assert written
    return png.tobytes(), {"scale": scale, "offset": offset}


def _decode_codes(codes: np.ndarray, facts: Mapping[str, Any]) -> np.ndarray:
    if not {"scale", "offset"} <= facts.keys():
        raise SampleError(f"16-bit disparity needs the facts 'scale' and 'offset', found {', '.join(facts) or 'none'}")
    return (codes * (number_fact(facts, "scale") / MAX_CODE) + number_fact(facts, "offset")).astype(np.float32)
