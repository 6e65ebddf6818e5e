"""What the report shows of a chosen image: maps at the size of the page, clouds of points, colour bars, data URIs.

A cloud is a depth map thinned to a grid. The page back-projects it, and takes the colours from the picture that it
holds anyway, so a point costs two bytes.
"""

import base64
from dataclasses import dataclass
from math import radians, tan
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from depthkit.data.decode import number_fact, read_facts
from depthkit.evaluation.ground_truth import Case, compare_case
from depthkit.evaluation.results import Evaluation, ScoredImage
from depthkit.evaluation.settings import DepthUnit
from depthkit.visualize import ColorScale, relative_error

UNIT_LABELS = {DepthUnit.metres: "metres, planar z", DepthUnit.image_maximum: "share of the largest depth"}
MAX_TILE_WIDTH = 560
"""Pixels of a picture in the HTML file."""
MAX_POINTS = 20_000
"""Points of a cloud."""
ASSUMED_FIELD_OF_VIEW = 60.0
"""Degrees across the width of an image whose intrinsics are unknown."""
FARTHEST = 1.5
"""Points beyond this many times the far end of the ground truth (98 %) are left out of a cloud: sky at the cap."""
NO_POINT = 0
MAX_CODE = 65535

Intrinsics = tuple[float, float, float, float]
"""fx, fy, cx, cy in pixels."""


@dataclass(frozen=True, kw_only=True)
class ModelMaps:
    """What one model made of an image: aligned depth and relative error, (H, W), and its grid of depths."""

    aligned: np.ndarray
    error: np.ndarray
    grid: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image of the report: why it was chosen, its ground truth, and each model's maps.

    `size` is (height, width) of the ground truth and `intrinsics` (fx, fy, cx, cy) in its pixels, None if unknown.
    """

    reason: str
    scored: ScoredImage
    image: np.ndarray
    target: np.ndarray
    valid_mask: np.ndarray
    grid: np.ndarray
    size: tuple[int, int]
    intrinsics: Intrinsics | None
    models: dict[str, ModelMaps]


def make_picture(evaluation: Evaluation, scored: ScoredImage, reason: str) -> Picture:
    """Reads and predicts the image once more."""
    reading = evaluation.predict(scored)
    case = reading.case
    assert isinstance(case, Case), "it was scored before, on maps"
    models: dict[str, ModelMaps] = {}
    for name, prediction in reading.predictions.items():
        comparison = compare_case(case, prediction, evaluation.protocol)
        aligned, target, valid_mask = (tensor[0].numpy() for tensor in comparison)
        error = relative_error(aligned, target, valid_mask)
        everywhere = np.ones_like(valid_mask)
        models[name] = ModelMaps(
            aligned=shrink(aligned, everywhere)[0],
            error=shrink(error, valid_mask)[0],
            grid=thin(aligned, everywhere, MAX_POINTS),
        )
    small_target, small_mask = shrink(target, valid_mask)
    return Picture(
        reason=reason,
        scored=scored,
        image=case.image,
        target=small_target,
        valid_mask=small_mask,
        grid=thin(target, valid_mask, MAX_POINTS),
        size=target.shape,
        intrinsics=intrinsics_of(scored, target.shape),
        models=models,
    )


def intrinsics_of(scored: ScoredImage, size: tuple[int, int]) -> Intrinsics | None:
    """The intrinsics in pixels of the evaluated ground truth, of `size`; None if unknown or the camera is no pinhole.

    Where a protocol cuts a window, it lies at the bottom centre of the whole (`ground_truth.cut`).
    """
    facts = read_facts(scored.dataset.members(scored.shard, scored.index))
    if "intrinsics_px" not in facts or facts.get("camera", "pinhole") != "pinhole":
        return None
    fx, fy, cx, cy = number_fact(facts, "intrinsics_px")
    height, width = scored.dataset.read(scored.shard, scored.index).depth.shape
    return fx, fy, cx - (width - size[1]) // 2, cy - (height - size[0])


def shrink(values: np.ndarray, valid_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map at most `MAX_TILE_WIDTH` wide: the mean of the valid pixels, so that sparse lidar stays visible."""
    height, width = values.shape
    if width <= MAX_TILE_WIDTH:
        return values, valid_mask
    size = (MAX_TILE_WIDTH, max(1, round(height * MAX_TILE_WIDTH / width)))
    share = cv2.resize(valid_mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    total = cv2.resize(np.where(valid_mask, values, 0).astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return total / np.where(share > 0, share, 1), share > 0


def thin(depth: np.ndarray, valid_mask: np.ndarray, max_points: int) -> np.ndarray:
    """Depth on a grid of at most `max_points` square cells: the lower median of a cell's valid pixels, 0 without one.

    A mean would put points into the empty space between an edge and what lies behind it.
    """
    height, width = depth.shape
    cell = cell_size((height, width), max_points)
    rows, cols = height // cell, width // cell
    values = np.where(valid_mask, depth, np.inf)[: rows * cell, : cols * cell]
    cells = np.sort(values.reshape(rows, cell, cols, cell).swapaxes(1, 2).reshape(rows, cols, -1), axis=-1)
    middle = np.maximum(np.isfinite(cells).sum(-1) - 1, 0) // 2
    median = np.take_along_axis(cells, middle[..., None], axis=-1)[..., 0]
    return np.where(np.isfinite(median), median, 0).astype(np.float32)


def cell_size(size: tuple[int, int], max_points: int) -> int:
    """Pixels of the side of a cell."""
    height, width = size
    cell = 1
    while (height // cell) * (width // cell) > max_points:
        cell += 1
    return cell


def cloud_context(picture: Picture) -> dict[str, Any]:
    """What the page needs to draw the clouds of an image: grids as base64, the codes' range and the camera.

    `depth = near * (far / near) ** ((code - 1) / 65534)` for 16-bit little-endian codes, 0 = no point.
    """
    grids = {"target": picture.grid, **{name: maps.grid for name, maps in picture.models.items()}}
    known = picture.grid[picture.grid > 0]
    far = FARTHEST * float(np.percentile(known, 98)) if known.size else 1.0
    shown = {name: np.where(grid <= far, grid, 0) for name, grid in grids.items()}
    near = min((float(grid[grid > 0].min()) for grid in shown.values() if (grid > 0).any()), default=far / 2)
    rows, cols = picture.grid.shape
    fx, fy, cx, cy = picture.intrinsics or assumed_intrinsics(picture.size)
    cell = cell_size(picture.size, MAX_POINTS)
    return {
        "rows": rows,
        "cols": cols,
        "near": near,
        "far": far,
        # In cells, whose centres are at +0.5 as those of pixels are.
        "intrinsics": [value / cell for value in (fx, fy, cx, cy)],
        "assumed": picture.intrinsics is None,
        "middle": float(np.median(known)) if known.size else far / 2,
        "grids": {name: base64.b64encode(quantize(grid, near, far)).decode() for name, grid in shown.items()},
    }


def assumed_intrinsics(size: tuple[int, int]) -> Intrinsics:
    """A camera that looks straight ahead and sees `ASSUMED_FIELD_OF_VIEW` across the width."""
    height, width = size
    focal = width / 2 / tan(radians(ASSUMED_FIELD_OF_VIEW / 2))
    return focal, focal, width / 2, height / 2


def quantize(depth: np.ndarray, near: float, far: float) -> bytes:
    """16-bit little-endian codes, equal steps in log depth (see `cloud_context`); 0 where depth is 0."""
    share = np.log(np.maximum(depth, near) / near) / np.log(far / near)
    codes = 1 + np.rint(np.clip(share, 0, 1) * (MAX_CODE - 1))
    return np.where(depth > 0, codes, NO_POINT).astype("<u2").tobytes()


def bar(scale: ColorScale) -> dict[str, Any]:
    """A colour bar for the template: a CSS gradient from left to right, and ticks as (place in percent, text)."""
    colors = [to_hex(color) for color in matplotlib.colormaps[scale.colormap](np.linspace(0, 1, 17))]
    places = 100 * scale.position(np.array(scale.ticks()))
    return {
        "gradient": f"linear-gradient(to right, {', '.join(colors)})",
        "ticks": [(f"{place:.1f}", f"{tick:g}") for place, tick in zip(places, scale.ticks(), strict=True)],
        "label": scale.label,
    }


def data_uri(image: np.ndarray, extension: str) -> str:
    """An RGB image, at most `MAX_TILE_WIDTH` wide, as text for the `src` of an HTML image."""
    height, width = image.shape[:2]
    if width > MAX_TILE_WIDTH:
        size = (MAX_TILE_WIDTH, round(height * MAX_TILE_WIDTH / width))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    mime = {".jpg": "image/jpeg", ".png": "image/png"}[extension]
    return f"data:{mime};base64,{base64.b64encode(encode(image, extension)).decode()}"


def encode(image: np.ndarray, extension: str) -> bytes:
    """An RGB image as the bytes of an image file."""
    written, data = cv2.imencode(extension, image[..., ::-1])
    assert written
    return data.tobytes()
