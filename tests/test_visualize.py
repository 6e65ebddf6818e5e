"""Pictures: what a colour means, and that missing values look missing."""

import matplotlib
import numpy as np
import pytest

from depthkit.visualize import (
    COLORMAPS,
    ERROR_COLORMAP,
    NO_VALUE,
    ColorScale,
    PictureRow,
    Tile,
    colorize,
    kind_scale,
    panel,
    picture_grid,
    relative_error,
    render,
    value_range,
    with_color_bar,
)


def luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb.astype(np.float64) @ [0.2126, 0.7152, 0.0722]


def test_near_is_light_for_depth_and_for_disparity():
    ramp = np.linspace(1, 5, 50)[None]
    depth = luminance(colorize(ramp, None, ColorScale(1, 5, COLORMAPS["depth"], ""))[0])
    disparity = luminance(colorize(ramp, None, ColorScale(1, 5, COLORMAPS["disparity"], ""))[0])
    assert (np.diff(depth) < 0.5).all()
    assert (np.diff(disparity) > -0.5).all()


def test_values_beyond_the_ends_take_the_end_colours():
    colors = colorize(np.array([[-9.0, 0.0, 1.0, 9.0]]), None, ColorScale(0, 1, ERROR_COLORMAP, ""))
    assert colors.dtype == np.uint8
    assert (colors[0, 0] == colors[0, 1]).all()
    assert (colors[0, 2] == colors[0, 3]).all()
    expected = matplotlib.colormaps[ERROR_COLORMAP](1.0, bytes=True)[:3]
    assert tuple(colors[0, 3]) == tuple(expected)


@pytest.mark.parametrize("hole", [np.nan, np.inf])
def test_missing_values_are_grey(hole: float):
    values = np.array([[0.2, hole, 0.7]])
    colors = colorize(values, np.array([[False, True, True]]), ColorScale(0, 1, "magma", ""))
    assert tuple(colors[0, 0]) == tuple(colors[0, 1]) == NO_VALUE
    assert tuple(colors[0, 2]) != NO_VALUE


def test_a_constant_map_has_a_colour():
    assert colorize(np.full((2, 2), 3.0), None, ColorScale(3, 3, "magma", "")).shape == (2, 2, 3)


def test_value_range_ignores_outliers_and_invalid_pixels():
    values = np.linspace(0, 100, 10001)
    mask = np.ones_like(values, dtype=bool)
    values[0], values[1], mask[1] = 1e9, 1e9, False
    low, high = value_range(values, mask)
    assert low == pytest.approx(2, abs=0.1)
    assert high == pytest.approx(98, abs=0.1)
    assert value_range(values, np.zeros_like(mask)) == (0, 1)


def test_relative_error_is_zero_where_nothing_was_measured():
    target = np.array([[2.0, 0.0, np.nan]])
    error = relative_error(np.array([[3.0, 5.0, 5.0]]), target, np.array([[True, False, False]]))
    assert error.tolist() == [[0.5, 0, 0]]


def test_grid_shows_the_pictures_where_they_belong():
    red, blue = np.zeros((30, 40, 3), np.uint8), np.zeros((30, 40, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    scale = ColorScale(0, 1, "magma", "metres")
    pixels = render(picture_grid([PictureRow([Tile("a", red), Tile("b", blue)], [scale])])).astype(int)
    is_red = (pixels == [255, 0, 0]).all(-1)
    is_blue = (pixels == [0, 0, 255]).all(-1)
    assert is_red.sum() == pytest.approx(is_blue.sum(), rel=0.02)
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min()
    rows, cols = np.nonzero(is_red)
    assert (np.ptp(cols) + 1) / (np.ptp(rows) + 1) == pytest.approx(40 / 30, rel=0.03)


def test_panel_draws_prediction_and_target_on_one_scale():
    rng = np.random.default_rng(0)
    target = rng.uniform(1, 5, (24, 32))
    mask = rng.random((24, 32)) < 0.8
    image = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
    picture = panel(image, target, target, mask, unit="metres")
    other = panel(image, target, target * 1.2, mask, unit="metres")
    assert picture.dtype == np.uint8
    assert picture.shape == other.shape
    third = picture.shape[1] // 3
    assert (picture[:, :third] == other[:, :third]).all(), "image and ground truth do not depend on it"
    assert (picture[:, third:] != other[:, third:]).any()


@pytest.mark.parametrize("size", [(360, 480), (100, 1920), (2000, 480), (900, 1600)])
def test_a_bar_below_leaves_the_picture_alone_and_shows_all_its_colours(size: tuple[int, int]):
    picture = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    scale = kind_scale("disparity", 0.0, 10.0)
    below = with_color_bar(picture, scale)
    assert below.shape[1] == size[1]
    assert (below[: size[0]] == picture).all()
    bar = below[size[0] :]
    assert 36 <= len(bar) <= max(36, size[0] / 10)
    colors = colorize(np.linspace(1, 10, 8)[None], None, scale)[0].astype(int)
    distances = np.abs(bar[:, :, None].astype(int) - colors).max(-1).min(0)  # of each column and colour
    assert (distances.min(0) <= 8).all()
    assert (np.diff(distances.argmin(0)) > 0).all(), "low at the left"
    assert (bar[0] == 255).all()
    assert (bar[:, -5:] == 255).all()


def test_labels_say_what_is_shown_and_stay_inside_the_picture():
    picture = np.zeros((300, 480, 3), np.uint8)
    bars = {}
    for kind in ("disparity", "depth"):
        scale = kind_scale(kind, 0.5, 80.0)
        bars[kind] = with_color_bar(picture, scale)[300:]
        assert (bars[kind][:, :8] == 255).all()
    assert kind_scale("depth", 0.5, 80.0).label == "metres, planar z"
    assert kind_scale("disparity", 0.5, 80.0).label == "relative disparity, larger = nearer"
    assert (bars["disparity"][:, :200] != bars["depth"][:, :200]).any()
    assert kind_scale("depth", 1.0, 80.0).is_logarithmic
    assert not kind_scale("disparity", 1.0, 80.0).is_logarithmic
