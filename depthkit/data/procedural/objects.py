"""What the procedural world is made of: the style of each domain, materials, and objects of a few primitive shapes.

World axes are those of a level camera: x right, y down, z forward, metres. The floor or ground is y = 0, so a point at
height h has y = -h. The two domains differ in their `Style` alone.
"""

import colorsys
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Range = tuple[float, float]
Role = Literal["floor", "wall", "ceiling", "object", "ground", "road", "facade", "bark", "leaf"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """What one domain looks like. A pair is a uniform range; colours are hue, saturation and value in 0..1."""

    patterns: dict[Role, tuple[str, ...]]
    hue: Range
    saturation: Range
    value: Range
    indoor_share: float
    street_share: float
    room_width_m: Range
    room_length_m: Range
    num_objects: tuple[int, int]
    field_of_view_deg: Range
    camera_height_m: Range
    pitch_deg: Range
    roll_deg: Range
    ambient: Range
    haze_per_m: Range
    clouds: float
    grain: float
    tint: tuple[float, float, float]
    exposure: Range
    vignette: Range
    blur_px: Range
    noise: Range


STYLES = {
    "source": Style(
        patterns={
            "floor": ("checker", "tiles", "stripes"),
            "wall": ("plain", "stripes", "tiles", "dots"),
            "ceiling": ("plain",),
            "object": ("plain", "checker", "stripes", "dots", "noise"),
            "ground": ("checker", "noise", "tiles"),
            "road": ("plain", "tiles"),
            "facade": ("windows", "tiles", "stripes"),
            "bark": ("plain",),
            "leaf": ("dots", "plain"),
        },
        hue=(0.0, 1.0),
        saturation=(0.25, 0.65),
        value=(0.55, 0.95),
        indoor_share=0.4,
        street_share=0.6,
        room_width_m=(4.0, 8.0),
        room_length_m=(5.0, 12.0),
        num_objects=(2, 5),
        field_of_view_deg=(62.0, 76.0),
        camera_height_m=(1.4, 1.8),
        pitch_deg=(-4.0, 6.0),
        roll_deg=(0.0, 0.0),
        ambient=(0.35, 0.5),
        haze_per_m=(0.015, 0.025),
        clouds=0.0,
        grain=0.05,
        tint=(1.0, 1.0, 1.0),
        exposure=(0.95, 1.05),
        vignette=(0.0, 0.0),
        blur_px=(0.0, 0.0),
        noise=(0.0, 0.004),
    ),
    "target": Style(
        patterns={
            "floor": ("planks", "noise", "tiles"),
            "wall": ("noise", "bricks", "plain"),
            "ceiling": ("noise", "planks"),
            "object": ("noise", "planks", "plain", "speckle"),
            "ground": ("noise", "speckle"),
            "road": ("noise", "bricks"),
            "facade": ("bricks", "windows", "noise"),
            "bark": ("planks",),
            "leaf": ("speckle", "noise"),
        },
        hue=(0.0, 0.2),
        saturation=(0.05, 0.45),
        value=(0.40, 0.85),
        indoor_share=0.4,
        street_share=0.7,
        room_width_m=(3.2, 6.0),
        room_length_m=(4.0, 9.0),
        num_objects=(3, 7),
        field_of_view_deg=(50.0, 66.0),
        camera_height_m=(1.0, 1.6),
        pitch_deg=(0.0, 14.0),
        roll_deg=(-2.5, 2.5),
        ambient=(0.2, 0.4),
        haze_per_m=(0.010, 0.030),
        clouds=0.6,
        grain=0.3,
        tint=(1.06, 1.0, 0.9),
        exposure=(0.75, 1.3),
        vignette=(0.15, 0.45),
        blur_px=(0.3, 0.7),
        noise=(0.008, 0.022),
    ),
}


class Material(NamedTuple):
    """A pattern that mixes two display colours (RGB, 0..1); `period_m` is the size of one repetition."""

    pattern: str
    colours: tuple[np.ndarray, np.ndarray]
    period_m: float
    grain: float


class Primitive(NamedTuple):
    """A unit shape (|x|, |y|, |z| <= 1), scaled by `half_size`, turned by `yaw` about the vertical, moved to `centre`.

    `hollow` means that the camera is inside and sees the inner faces: a room.
    """

    shape: Literal["box", "cylinder", "sphere"]
    centre: np.ndarray
    half_size: np.ndarray
    yaw: float
    material: Material
    hollow: bool = False
    casts_shadow: bool = True

    @property
    def footprint_m(self) -> float:
        """Radius of a circle around `centre`, seen from above, that holds the whole shape."""
        return float(np.hypot(self.half_size[0], self.half_size[2]))


def rotation_y(angle: float) -> np.ndarray:
    """(3, 3) turn about the vertical axis; a positive angle turns forward (z) to the right (x)."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def moved(parts: list[Primitive], x: float, z: float, yaw: float) -> list[Primitive]:
    """The parts of one object, built at the origin, turned by `yaw` and put down at (x, z)."""
    turn, shift = rotation_y(yaw), np.array([x, 0.0, z])
    return [part._replace(centre=turn @ part.centre + shift, yaw=part.yaw + yaw) for part in parts]


def footprint(parts: list[Primitive]) -> float:
    """Radius of the circle around the origin, seen from above, that holds an object built at the origin."""
    return max(float(np.hypot(part.centre[0], part.centre[2])) + part.footprint_m for part in parts)


class Maker:
    """Draws materials and single objects from one random stream in one style."""

    def __init__(self, rng: np.random.Generator, style: Style) -> None:
        self.rng = rng
        self.style = style

    def draw(self, bounds: Range) -> float:
        return float(self.rng.uniform(*bounds))

    def colour(self, hue: Range | None = None) -> np.ndarray:
        style = self.style
        hsv = self.draw(hue or style.hue), self.draw(style.saturation), self.draw(style.value)
        return np.array(colorsys.hsv_to_rgb(*hsv), np.float32)

    def material(self, role: Role, *, hue: Range | None = None, period_m: Range = (0.3, 1.0)) -> Material:
        pattern = str(self.rng.choice(self.style.patterns[role]))
        base = self.colour(hue)
        second = np.clip(base * self.draw((0.35, 0.75)) + 0.15 * self.colour(hue), 0, 1)
        return Material(pattern, (base, second), self.draw(period_m), self.style.grain)

    def part(
        self, shape: Literal["box", "cylinder", "sphere"], size: tuple[float, float, float], material: Material,
        *, x: float = 0.0, base: float = 0.0, z: float = 0.0,
    ) -> Primitive:  # fmt: skip
        """A shape of `size` (width, height, length) whose lowest point is `base` metres above the floor at (x, z)."""
        return Primitive(shape, np.array([x, -(base + size[1] / 2), z]), np.array(size) / 2, 0.0, material)

    def block(self) -> list[Primitive]:
        size = self.draw((0.3, 1.1)), self.draw((0.3, 1.3)), self.draw((0.3, 1.1))
        return [self.part("box", size, self.material("object"))]

    def barrel(self) -> list[Primitive]:
        diameter = self.draw((0.25, 0.8))
        return [self.part("cylinder", (diameter, self.draw((0.4, 1.4)), diameter), self.material("object"))]

    def ball(self) -> list[Primitive]:
        diameter = self.draw((0.2, 0.9))
        return [self.part("sphere", (diameter,) * 3, self.material("object", period_m=(0.15, 0.5)))]

    def table(self) -> list[Primitive]:
        width, height, length = self.draw((0.8, 1.8)), self.draw((0.5, 0.8)), self.draw((0.6, 1.0))
        top, wood = self.material("object"), self.material("object")
        legs = [
            self.part("box", (0.07, height, 0.07), wood, x=sx * (width / 2 - 0.06), z=sz * (length / 2 - 0.06))
            for sx in (-1, 1)
            for sz in (-1, 1)
        ]
        return [self.part("box", (width, 0.06, length), top, base=height), *legs]

    def chair(self) -> list[Primitive]:
        cloth = self.material("object")
        seat = self.part("box", (0.5, 0.1, 0.5), cloth, base=0.4)
        back = self.part("box", (0.5, 0.55, 0.07), cloth, base=0.5, z=0.22)
        return [seat, back, self.part("cylinder", (0.12, 0.4, 0.12), self.material("object"))]

    def sofa(self) -> list[Primitive]:
        cloth, width = self.material("object"), self.draw((1.3, 2.1))
        seat = self.part("box", (width, 0.42, 0.85), cloth)
        return [seat, self.part("box", (width, 0.45, 0.25), cloth, base=0.42, z=0.3)]

    def floor_lamp(self) -> list[Primitive]:
        height = self.draw((1.2, 1.7))
        pole = self.part("cylinder", (0.06, height, 0.06), self.material("object"))
        return [pole, self.part("cylinder", (0.4, 0.3, 0.4), self.material("object"), base=height)]

    def pendant(self) -> list[Primitive]:
        """A lamp on a cable; what reaches above the ceiling is hidden by it."""
        width, base = self.draw((0.3, 0.7)), self.draw((1.5, 1.9))
        shade = self.part("cylinder", (width, 0.3, width), self.material("object"), base=base)
        return [shade, self.part("cylinder", (0.03, 2.0, 0.03), self.material("object"), base=base + 0.3)]

    def shelf(self) -> list[Primitive]:
        size = self.draw((0.7, 1.8)), self.draw((0.9, 2.1)), self.draw((0.3, 0.5))
        return [self.part("box", size, self.material("object"))]

    def tree(self) -> list[Primitive]:
        height, crown = self.draw((1.5, 3.5)), self.draw((1.6, 4.0))
        trunk = self.part("cylinder", (0.3, height + 0.5, 0.3), self.material("bark", hue=(0.05, 0.1)))
        leaf = self.material("leaf", hue=(0.2, 0.38), period_m=(0.3, 0.9))
        shape = self.rng.choice(np.array(["sphere", "box"]), p=[0.85, 0.15])
        return [trunk, self.part(shape, (crown, crown * self.draw((0.8, 1.5)), crown), leaf, base=height)]

    def pole(self) -> list[Primitive]:
        height = self.draw((2.5, 6.0))
        pole = self.part("cylinder", (0.14, height, 0.14), self.material("object"))
        return [pole, self.part("box", (0.7, 0.5, 0.05), self.material("object"), base=height - 0.5, z=-0.1)]

    def car(self) -> list[Primitive]:
        paint, glass = self.material("object"), self.material("object", hue=(0.55, 0.65))
        body = self.part("box", (1.75, 0.7, 4.0), paint, base=0.3)
        cabin = self.part("box", (1.5, 0.55, 2.0), glass, base=1.0, z=0.2)
        wheels = [self.part("box", (1.6, 0.4, 0.6), self.material("object"), z=z) for z in (-1.3, 1.3)]
        return [body, cabin, *wheels]

    def person(self) -> list[Primitive]:
        height = self.draw((1.1, 1.6))
        body = self.part("cylinder", (0.42, height, 0.28), self.material("object"))
        head = self.material("object", hue=(0.05, 0.1))
        return [body, self.part("sphere", (0.24, 0.28, 0.24), head, base=height - 0.02)]

    def bush(self) -> list[Primitive]:
        width = self.draw((0.6, 1.8))
        leaf = self.material("leaf", hue=(0.2, 0.38))
        return [self.part("sphere", (width, width * 0.8, width), leaf, base=-0.1)]

    def building(self) -> list[Primitive]:
        size = self.draw((5.0, 9.0)), self.draw((3.5, 14.0)), self.draw((6.0, 15.0))
        return [self.part("box", size, self.material("facade", period_m=(1.2, 2.5)))]
