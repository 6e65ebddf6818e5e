"""Layouts of the procedural world: rooms, streets and parks, their light, and the path of the camera through them."""

from typing import NamedTuple

import numpy as np

from depthkit.data.procedural.objects import Maker, Primitive, Style, footprint, moved, rotation_y

PATH_PERIOD = 64
"""Frames after which the camera is back where it started."""

PATH_CLEARANCE_M = 0.35
WORLD_RADIUS_M = 200.0
"""The ground ends here; what would lie beyond is sky, so that every depth stays below 250 m."""

SUN_DISTANCE_M = 2000.0

ROOM_OBJECTS = (
    Maker.block,
    Maker.barrel,
    Maker.ball,
    Maker.table,
    Maker.chair,
    Maker.sofa,
    Maker.floor_lamp,
    Maker.pendant,
)
STREET_OBJECTS = (Maker.car, Maker.pole, Maker.person, Maker.tree, Maker.bush, Maker.barrel, Maker.block)
PARK_OBJECTS = (Maker.tree, Maker.tree, Maker.tree, Maker.bush, Maker.person, Maker.pole, Maker.block)


class Lighting(NamedTuple):
    """`position` of the lamp or sun; at `falloff_m` its light has halved (inf for the sun). Colours are RGB, 0..1.

    `clouds` is the share of the sky that is covered, roughly.
    """

    position: np.ndarray
    falloff_m: float
    ambient: float
    haze_per_m: float
    sky_colour: np.ndarray
    haze_colour: np.ndarray
    clouds: float


class Scene(NamedTuple):
    """`poses` are the `PATH_PERIOD` camera-to-world matrices (4, 4) float64 of a closed path that touches nothing."""

    primitives: list[Primitive]
    lighting: Lighting
    poses: list[np.ndarray]
    field_of_view: float


class Camera(NamedTuple):
    """`path` (PATH_PERIOD, 3) positions; `yaw` and `field_of_view` (horizontal) of the first frame, radians."""

    path: np.ndarray
    poses: list[np.ndarray]
    yaw: float
    field_of_view: float


def make_scene(rng: np.random.Generator, style: Style) -> Scene:
    """One scene in `style`, drawn from `rng`."""
    maker = Maker(rng, style)
    if rng.random() < style.indoor_share:
        camera = make_camera(maker, step_m=(0.02, 0.08), yaw=maker.draw((-0.8, 0.8)))
        primitives, lighting = room(maker, camera)
    else:
        camera = make_camera(maker, step_m=(0.1, 0.3), yaw=maker.draw((-0.4, 0.4)))
        primitives = street(maker, camera) if rng.random() < style.street_share else park(maker, camera)
        lighting = daylight(maker)
    return Scene(primitives, lighting, camera.poses, camera.field_of_view)


def make_camera(maker: Maker, *, step_m: tuple[float, float], yaw: float) -> Camera:
    """A camera that swings along a closed sine path, so that clips of any length stay in the same clear space.

    It moves by at most `step_m` a frame (drawn from the range), mostly forward, and turns by less than one degree.
    """
    style, phase = maker.style, 2 * np.pi * np.arange(PATH_PERIOD) / PATH_PERIOD
    reach = maker.draw(step_m) * PATH_PERIOD / (2 * np.pi)
    heading = yaw + maker.draw((-0.7, 0.7))
    direction = np.array([np.sin(heading), maker.draw((-0.05, 0.05)), np.cos(heading)])
    path = np.array([0.0, -maker.draw(style.camera_height_m), 0.0]) + reach * np.sin(phase)[:, None] * direction
    pitch, roll = (np.deg2rad(maker.draw(bounds)) for bounds in (style.pitch_deg, style.roll_deg))
    yaws = yaw + maker.draw((-0.12, 0.12)) * np.sin(phase)
    pitches = pitch + maker.draw((-0.02, 0.02)) * np.sin(phase)
    poses = [pose(*values, roll) for values in zip(path, yaws, pitches, strict=True)]
    return Camera(path, poses, yaw, np.deg2rad(maker.draw(style.field_of_view_deg)))


def pose(position: np.ndarray, yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Camera-to-world (4, 4): roll about the viewing axis, then `pitch` down, then `yaw` to the right."""
    (cp, sp), (cr, sr) = ((np.cos(angle), np.sin(angle)) for angle in (pitch, roll))
    pitched = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    rolled = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation_y(yaw) @ pitched @ rolled
    matrix[:3, 3] = position
    return matrix


class Ground:
    """Puts objects down where they neither overlap each other nor come near the camera's path."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.primitives: list[Primitive] = []
        self.taken: list[tuple[float, float, float]] = []

    def put(self, parts: list[Primitive], x: float, z: float, yaw: float) -> None:
        """Add the object, or leave it out where its place is taken."""
        radius = footprint(parts)
        path_distance = np.hypot(self.camera.path[:, 0] - x, self.camera.path[:, 2] - z).min()
        if path_distance < radius + PATH_CLEARANCE_M:
            return
        if any(np.hypot(x - other_x, z - other_z) < 0.8 * (radius + other) for other_x, other_z, other in self.taken):
            return
        self.taken.append((x, z, radius))
        self.primitives += moved(parts, x, z, yaw)

    def spot_in_view(self, maker: Maker, distance_m: tuple[float, float]) -> tuple[float, float]:
        """A random (x, z) in or just beside the first view, log-uniform in distance, so that near ones are not rare."""
        distance = np.exp(maker.draw((np.log(distance_m[0]), np.log(distance_m[1]))))
        angle = self.camera.yaw + self.camera.field_of_view * maker.draw((-0.6, 0.6))
        return distance * np.sin(angle), distance * np.cos(angle)


def room(maker: Maker, camera: Camera) -> tuple[list[Primitive], Lighting]:
    """A closed room with furniture on the floor, things on the walls and lamps hanging from the ceiling."""
    style, reach = maker.style, np.abs(camera.path[:, [0, 2]]).max() + PATH_CLEARANCE_M + 0.2
    width, length, height = maker.draw(style.room_width_m), maker.draw(style.room_length_m), maker.draw((2.3, 3.4))
    left = -reach - max(width - 2 * reach, 0.3) * maker.draw((0.1, 0.9))
    right, back = max(left + width, reach), -reach - maker.draw((0.0, 0.8))
    front = max(back + length, 3.0)
    walls = shell(maker, (left, right), (back, front), height)

    ground = Ground(camera)
    for _ in range(maker.rng.integers(2, 6)):
        hang_on_wall(maker, ground, (left, right), front)
    for _ in range(maker.rng.integers(*style.num_objects)):
        parts = ROOM_OBJECTS[maker.rng.integers(len(ROOM_OBJECTS))](maker)
        x, z = ground.spot_in_view(maker, (0.9, front))
        radius = footprint(parts)
        if right - left > 2 * radius and front - back > 2 * radius:
            x, z = np.clip(x, left + radius, right - radius), np.clip(z, back + radius, front - radius)
            ground.put(parts, x, z, maker.draw((-np.pi, np.pi)))

    lamp = np.array([maker.draw((left, right)) * 0.6, -height + 0.35, maker.draw((0.2, 0.7)) * front])
    black = np.zeros(3, np.float32)
    lighting = Lighting(lamp, 3.0, maker.draw(style.ambient), 0.0, black, black, clouds=0.0)
    return [*walls, *ground.primitives], lighting


def shell(maker: Maker, x: tuple[float, float], z: tuple[float, float], height: float) -> list[Primitive]:
    """Walls, floor and ceiling: a hollow box, with a slab at each end to hide its own floor and ceiling."""
    size = x[1] - x[0], height + 0.2, z[1] - z[0]
    slab = size[0], 0.2, size[2]
    place = {"x": sum(x) / 2, "z": sum(z) / 2}
    walls = maker.part("box", size, maker.material("wall", period_m=(0.4, 1.2)), base=-0.1, **place)
    floor = maker.part("box", slab, maker.material("floor", period_m=(0.5, 1.4)), base=-0.2, **place)
    ceiling = maker.part("box", slab, maker.material("ceiling"), base=height, **place)
    walls = walls._replace(hollow=True, casts_shadow=False)
    return [walls, floor._replace(casts_shadow=False), ceiling._replace(casts_shadow=False)]


def hang_on_wall(maker: Maker, ground: Ground, x: tuple[float, float], front: float) -> None:
    """A shelf, door or picture with its back to the left, the right or the far wall."""
    side = maker.rng.integers(3)
    flat = maker.draw((0.5, 1.4)), maker.draw((0.5, 1.9)), 0.06
    picture = [maker.part("box", flat, maker.material("object"), base=maker.draw((0.0, 0.9)))]
    parts = maker.shelf() if maker.rng.random() < 0.5 else picture
    half_width, half_length = parts[0].half_size[0], parts[0].half_size[2]
    along = maker.draw((0.6, max(front - half_width, 0.7)))
    places = (
        (x[0] + half_length, along, np.pi / 2),
        (x[1] - half_length, along, np.pi / 2),
        (maker.draw((x[0] + half_width, x[1] - half_width)), front - half_length, 0.0),
    )
    ground.put(parts, *places[side])


def terrain(maker: Maker) -> list[Primitive]:
    """A round ground slab up to `WORLD_RADIUS_M` and a few flat hills near its edge."""
    size = 2 * WORLD_RADIUS_M, 1.0, 2 * WORLD_RADIUS_M
    ground = maker.part("cylinder", size, maker.material("ground", period_m=(1.0, 2.5)), base=-1.0)
    hills = [hill(maker) for _ in range(maker.rng.integers(0, 4))]
    return [ground._replace(casts_shadow=False), *hills]


def hill(maker: Maker) -> Primitive:
    width, height, angle = maker.draw((40.0, 90.0)), maker.draw((10.0, 35.0)), maker.draw((-0.9, 0.9))
    material = maker.material("ground", hue=(0.2, 0.4), period_m=(4.0, 9.0))
    x, z = 130 * np.sin(angle), 130 * np.cos(angle)
    return maker.part("sphere", (width, height, width), material, x=x, z=z, base=-height / 2)


def street(maker: Maker, camera: Camera) -> list[Primitive]:
    """A straight road between two rows of buildings, with cars, poles, people and trees on and beside it."""
    half_width = max(maker.draw((4.5, 10.0)), np.abs(camera.path[:, 0]).max() + 1.0)
    centre = maker.draw((-0.5, 0.5)) * (half_width - np.abs(camera.path[:, 0]).max() - 0.9)
    asphalt = maker.material("road", period_m=(1.0, 3.0))
    road = maker.part("box", (1.1 * half_width, 0.04, 260.0), asphalt, x=centre, base=-0.02)
    rows = [house for side in (-1, 1) for house in house_row(maker, centre, side * half_width)]
    ground = Ground(camera)
    for _ in range(maker.rng.integers(*maker.style.num_objects)):
        parts = STREET_OBJECTS[maker.rng.integers(len(STREET_OBJECTS))](maker)
        x, z = ground.spot_in_view(maker, (2.0, 50.0))
        room_beside = half_width - min(footprint(parts), 0.9 * half_width)
        ground.put(parts, np.clip(x, centre - room_beside, centre + room_beside), z, maker.draw((-0.15, 0.15)))
    return [*terrain(maker), road._replace(casts_shadow=False), *rows, *ground.primitives]


def house_row(maker: Maker, centre: float, offset: float) -> list[Primitive]:
    """Buildings from beside the camera to 100 m, whose fronts stand `offset` from the middle of the road."""
    houses: list[Primitive] = []
    z = maker.draw((-14.0, -4.0))
    while z < 100:
        house = maker.building()[0]
        half_width, _, half_length = house.half_size
        houses += moved([house], centre + offset + np.sign(offset) * half_width, z + half_length, 0.0)
        z += 2 * half_length + maker.draw((0.5, 9.0))
    return houses


def park(maker: Maker, camera: Camera) -> list[Primitive]:
    """Open ground with trees, bushes, people and one or two far houses."""
    ground = Ground(camera)
    for _ in range(maker.rng.integers(0, 3)):
        ground.put(maker.building(), *ground.spot_in_view(maker, (18.0, 70.0)), maker.draw((-np.pi, np.pi)))
    for _ in range(3 + maker.rng.integers(*maker.style.num_objects)):
        parts = PARK_OBJECTS[maker.rng.integers(len(PARK_OBJECTS))](maker)
        ground.put(parts, *ground.spot_in_view(maker, (2.0, 60.0)), maker.draw((-np.pi, np.pi)))
    return [*terrain(maker), *ground.primitives]


def daylight(maker: Maker) -> Lighting:
    azimuth, elevation = maker.draw((-np.pi, np.pi)), np.deg2rad(maker.draw((25.0, 65.0)))
    direction = np.array([np.cos(elevation) * np.sin(azimuth), -np.sin(elevation), np.cos(elevation) * np.cos(azimuth)])
    sky = np.array([0.45, 0.65, 0.95], np.float32) * maker.draw((0.8, 1.0))
    haze = np.array([0.80, 0.86, 0.92], np.float32) * maker.draw((0.85, 1.0))
    style = maker.style
    sun = SUN_DISTANCE_M * direction
    return Lighting(sun, np.inf, maker.draw(style.ambient), maker.draw(style.haze_per_m), sky, haze, style.clouds)
