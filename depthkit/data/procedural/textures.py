"""Textures of the procedural world: functions of surface coordinates, averaged over the width of a pixel.

A pattern takes `u`, `v` and `width`, all (N,) and in periods of the pattern, and gives the share of the second colour,
0..1. Without the averaging, far surfaces would be noise instead of their mean colour.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from depthkit.data.procedural.objects import Material


@cache
def lattice() -> np.ndarray:
    return np.random.default_rng(0).random((256, 256), dtype=np.float32)


def value_noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smoothly interpolated random values at the integer lattice, 0..1, with period 256."""
    column, row = np.floor(u), np.floor(v)
    x, y = u - column, v - row
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    left, top = column.astype(np.int32) & 255, row.astype(np.int32) & 255
    right, bottom, table = (left + 1) & 255, (top + 1) & 255, lattice()
    above = table[top, left] * (1 - x) + table[top, right] * x
    below = table[bottom, left] * (1 - x) + table[bottom, right] * x
    return above * (1 - y) + below * y


def fractal_noise(u: np.ndarray, v: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Three octaves of value noise; an octave finer than a pixel fades to its mean, so that distant ground is calm."""
    total = np.full_like(u, 0.5)
    for octave, frequency in enumerate((1.5, 4.0, 11.0)):
        visible = np.clip(1.5 - width * frequency, 0, 1)
        if visible.any():
            total += 1.2 * 0.65**octave * visible * (value_noise(u * frequency + 7 * octave, v * frequency) - 0.5)
    return np.clip(total, 0, 1)


def pulse(x: np.ndarray, width: np.ndarray, duty: float = 0.5) -> np.ndarray:
    """Periodic box that is 1 on [0, duty) of each period, averaged over a pixel: `(F(x + w/2) - F(x - w/2)) / w`."""

    def integral(x: np.ndarray) -> np.ndarray:
        whole = np.floor(x)
        return whole * duty + np.minimum(x - whole, duty)

    width = np.maximum(width, 1e-3)
    return (integral(x + width / 2) - integral(x - width / 2)) / width


def checker(u: np.ndarray, v: np.ndarray, width: np.ndarray) -> np.ndarray:
    a, b = pulse(u, width), pulse(v, width)
    return a + b - 2 * a * b


def bricks(u: np.ndarray, v: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Courses half as high as wide, each second one shifted by half a brick; the mortar is the second colour."""
    rows = 4 * v
    course = np.floor(rows)
    brick = pulse(2 * u + 0.5 * (course % 2), 2 * width, 0.92) * pulse(rows, 4 * width, 0.86)
    shade = value_noise(np.floor(2 * u + 0.5 * (course % 2)), course)
    return 1 - brick * (0.6 + 0.4 * shade)


def planks(u: np.ndarray, v: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Boards along v, each of its own shade, with a streaky grain."""
    board = np.floor(5 * u)
    shade = value_noise(board, np.floor(v + 0.37 * board))
    streaks = fractal_noise(9 * u, 0.5 * v + 3 * board, 9 * width)
    return np.clip(0.5 * shade + 0.5 * streaks + 0.5 * (1 - pulse(5 * u, 5 * width, 0.94)), 0, 1)


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "plain": lambda u, v, width: np.zeros_like(u),
    "checker": checker,
    "stripes": lambda u, v, width: pulse(u, width),
    "tiles": lambda u, v, width: 1 - pulse(u, width, 0.92) * pulse(v, width, 0.92),
    "dots": lambda u, v, width: pulse(2 * u, 2 * width, 0.4) * pulse(2 * v, 2 * width, 0.4),
    "windows": lambda u, v, width: pulse(u + 0.25, width, 0.5) * pulse(v + 0.2, width, 0.6),
    "noise": fractal_noise,
    "speckle": lambda u, v, width: np.clip(3 * fractal_noise(3 * u, 3 * v, 3 * width) - 1, 0, 1),
    "bricks": bricks,
    "planks": planks,
}


def albedo(material: Material, u: np.ndarray, v: np.ndarray, pixel_m: np.ndarray) -> np.ndarray:
    """(3, N) display colour of the material where one pixel covers `pixel_m` metres of surface."""
    scale = np.float32(1 / material.period_m)
    second = PATTERNS[material.pattern](u * scale, v * scale, pixel_m * scale)
    first_colour, second_colour = (colour[:, None] for colour in material.colours)
    colour = first_colour + (second_colour - first_colour) * second
    grain = np.clip(1.5 - 6 * pixel_m, 0, 1) * (value_noise(u * 6, v * 6) - 0.5)
    return colour * (1 + material.grain * grain)
