"""Pictures of depth: colour maps, bars that say what a colour means, and grids of pictures.

Near is light and far is dark, for depth and for disparity alike; errors go from white to dark red; pixels without a
value are grey. Images are (H, W, 3) uint8 RGB, maps (H, W) with a bool mask of the pixels that hold a value.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from depthkit.types import Kind

COLORMAPS: dict[Kind, str] = {"depth": "magma_r", "disparity": "magma"}
"""Perceptually uniform: equal steps in value look equally large."""
LABELS: dict[Kind, str] = {"depth": "metres, planar z", "disparity": "relative disparity, larger = nearer"}
ERROR_COLORMAP = "Reds"
NO_VALUE = (150, 150, 150)

TILE_WIDTH = 2.6  # inches, as all lengths below
GAP = 0.06
TITLE_HEIGHT = 0.26
BAR_WIDTH = 0.11
BAR_COLUMN = 0.78  # the bar, its numbers and its label
DPI = 130
TEXT_HEIGHT = 12  # pixels, at least, below a picture

_DRAWING = threading.Lock()
"""matplotlib is not made for threads."""


class ColorScale(NamedTuple):
    """What colours mean: `low` and `high` are the values at the ends of `colormap`, `label` says quantity and unit.

    On a logarithmic scale equal ratios, not equal differences, look equally large.
    """

    low: float
    high: float
    colormap: str
    label: str
    is_logarithmic: bool = False

    def position(self, values: np.ndarray) -> np.ndarray:
        """Where values lie between the ends, 0 to 1; values beyond an end lie at that end."""
        low, high = self.low, max(self.high, self.low + 1e-6)
        if self.is_logarithmic:
            smallest = max(low, 1e-3 * high)
            values, low, high = np.log(np.maximum(values, smallest)), np.log(smallest), np.log(high)
        return np.clip((values - low) / (high - low), 0, 1)

    def ticks(self) -> list[float]:
        """A few round numbers between the ends."""
        is_wide = self.is_logarithmic and self.high > 10 * self.low
        one_two_five = np.outer(10.0 ** np.arange(-4, 5), [1, 2, 5]).ravel()
        ticks = one_two_five if is_wide else MaxNLocator(5).tick_values(self.low, self.high)
        return [float(tick) for tick in ticks if self.low <= tick <= self.high]


class Tile(NamedTuple):
    title: str
    image: np.ndarray


class PictureRow(NamedTuple):
    """Pictures of one image side by side, and the colour scales that explain them."""

    tiles: Sequence[Tile]
    scales: Sequence[ColorScale]


def colorize(values: np.ndarray, valid_mask: np.ndarray | None, scale: ColorScale) -> np.ndarray:
    """(H, W, 3) uint8: values beyond an end of the scale take the colour of that end, pixels without one are grey."""
    has_value = np.isfinite(values) if valid_mask is None else valid_mask & np.isfinite(values)
    position = scale.position(np.where(has_value, values, scale.low))
    colors = matplotlib.colormaps[scale.colormap](position, bytes=True)[..., :3]
    return np.where(has_value[..., None], colors, np.array(NO_VALUE, np.uint8))


def value_range(values: np.ndarray, valid_mask: np.ndarray | None = None) -> tuple[float, float]:
    """2nd and 98th percentile of the valid values, so that a few outliers do not take all colours; (0, 1) if none."""
    has_value = np.isfinite(values) if valid_mask is None else valid_mask & np.isfinite(values)
    if not has_value.any():
        return 0.0, 1.0
    low, high = np.percentile(values[has_value], [2, 98])
    return float(low), float(high)


def depth_scale(values: np.ndarray, valid_mask: np.ndarray | None, unit: str) -> ColorScale:
    """A logarithmic scale over the `value_range` of depths: the near part of a street keeps its colours."""
    return ColorScale(*value_range(values, valid_mask), COLORMAPS["depth"], unit, is_logarithmic=True)


def kind_scale(kind: Kind, low: float, high: float) -> ColorScale:
    """The scale from `low` to `high` for predictions of a kind, with a label that says what they are."""
    return ColorScale(low, high, COLORMAPS[kind], LABELS[kind], is_logarithmic=kind == "depth")


def error_scale(high: float) -> ColorScale:
    return ColorScale(0.0, high, ERROR_COLORMAP, "abs rel error")


def relative_error(prediction: np.ndarray, target: np.ndarray, valid_mask: np.ndarray) -> np.ndarray:
    """`|prediction - target| / target` per pixel, 0 where invalid."""
    safe_target = np.where(valid_mask, target, 1)
    return np.where(valid_mask, np.abs(prediction - safe_target) / safe_target, 0)


def panel(
    image: np.ndarray,
    target: np.ndarray,
    prediction: np.ndarray,
    valid_mask: np.ndarray,
    *,
    unit: str,
    title: str = "",
    aligned: bool = True,
) -> np.ndarray:
    """One labelled picture: image, ground truth depth, predicted depth, relative error (red from 0.25 on).

    Ground truth and prediction share one colour scale, taken from the ground truth.
    """
    scale = depth_scale(target, valid_mask, unit)
    error = relative_error(prediction, target, valid_mask)
    tiles = [
        Tile(title or "image", image),
        Tile("ground truth", colorize(target, valid_mask, scale)),
        Tile("prediction, aligned" if aligned else "prediction", colorize(prediction, None, scale)),
        Tile("error", colorize(error, valid_mask, error_scale(0.25))),
    ]
    return render(picture_grid([PictureRow(tiles, [scale, error_scale(0.25)])]))


def picture_grid(rows: Sequence[PictureRow], *, tile_width: float = TILE_WIDTH) -> Figure:
    """A matplotlib figure with one line of titled pictures per row and its labelled colour bars at the right.

    The pictures of a row are shown in the aspect of its first one. `tile_width` is in inches.
    """
    heights = [tile_width * row.tiles[0].image.shape[0] / row.tiles[0].image.shape[1] for row in rows]
    width = max(len(row.tiles) * (tile_width + GAP) + len(row.scales) * BAR_COLUMN for row in rows) + GAP
    title_heights = [TITLE_HEIGHT if any(tile.title for tile in row.tiles) else 0 for row in rows]
    height = sum(heights) + sum(title_heights) + (len(rows) + 1) * GAP
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    top = height - GAP
    for row, tile_height, title_height in zip(rows, heights, title_heights, strict=True):
        top -= title_height
        _draw_row(figure, row, top, tile_width, tile_height)
        top -= tile_height + GAP
    return figure


def with_color_bar(picture: np.ndarray, scale: ColorScale) -> np.ndarray:
    """(H, W, 3) uint8 with a bar added below: the label at its left, numbers under it, all as wide as the picture.

    A picture should be at least 480 pixels wide, so that there is room for the label.
    """
    height, width = picture.shape[:2]
    text_height = max(TEXT_HEIGHT, round(min(width / 40, (height * width) ** 0.5 / 50)))
    return np.concatenate([picture, _horizontal_bar(scale, width, text_height)])


def _horizontal_bar(scale: ColorScale, width: int, text_height: int) -> np.ndarray:
    height = 3 * text_height
    with _DRAWING:  # half a pixel more: a figure rounds its size down
        figure = Figure(figsize=((width + 0.5) / DPI, (height + 0.5) / DPI), dpi=DPI, facecolor="white")
        points = 72 * text_height / DPI
        label = figure.text(text_height / width, 0.62, scale.label, fontsize=points, va="center")
        end = label.get_window_extent(FigureCanvasAgg(figure).get_renderer()).x1
        left, right = end + 1.5 * text_height, width - 1.5 * text_height
        axes = figure.add_axes((left / width, 0.45, (right - left) / width, 0.34))
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), scale.colormap), cax=axes, orientation="horizontal")
        bar.set_ticks(scale.position(np.array(scale.ticks())).tolist(), labels=[f"{tick:g}" for tick in scale.ticks()])
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=0.85 * points, length=0.2 * points, pad=0.1 * points)
        return render(figure)


def render(figure: Figure) -> np.ndarray:
    """The pixels of a figure, (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_row(figure: Figure, row: PictureRow, top: float, tile_width: float, tile_height: float) -> None:
    left = GAP
    for tile in row.tiles:
        axes = _axes(figure, left, top - tile_height, tile_width, tile_height)
        axes.imshow(tile.image, aspect="auto")
        axes.set_axis_off()
        axes.set_title(tile.title, fontsize=8.5, loc="left", pad=3)
        left += tile_width + GAP
    for scale in row.scales:
        axes = _axes(figure, left + GAP, top - 0.94 * tile_height, BAR_WIDTH, 0.88 * tile_height)
        _draw_bar(figure, axes, scale)
        left += BAR_COLUMN


def _draw_bar(figure: Figure, axes: Axes, scale: ColorScale) -> None:
    # Positions, not values: the scale itself knows where its values lie.
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), scale.colormap), cax=axes)
    bar.set_ticks(scale.position(np.array(scale.ticks())).tolist(), labels=[f"{tick:g}" for tick in scale.ticks()])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2, pad=2)
    bar.set_label(scale.label, fontsize=7.5, labelpad=3)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches."""
    total_width, total_height = figure.get_size_inches()
    box = (left / total_width, bottom / total_height, width / total_width, height / total_height)
    return figure.add_axes(box)
