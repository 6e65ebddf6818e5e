"""Ray casting, light and camera of the procedural world, vectorised over rays.

Rays are columns of (3, N) float32 arrays. A viewing ray has direction (x, y, 1) in camera axes, so the ray parameter of
a hit is its planar depth.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from depthkit.data.procedural.objects import Primitive, Style, rotation_y
from depthkit.data.procedural.scenes import Lighting, Scene
from depthkit.data.procedural.textures import albedo, fractal_noise
from depthkit.geometry import pixel_rays

Intrinsics = tuple[float, float, float, float]
Interval = tuple[np.ndarray, np.ndarray]


def slab_interval(origin: np.ndarray, direction: np.ndarray) -> Interval:
    """Ray parameters between the planes -1 and +1 of each axis: elementwise over (..., N)."""
    inverse = 1 / direction
    low, high = (-1 - origin) * inverse, (1 - origin) * inverse
    return np.minimum(low, high), np.maximum(low, high)


def round_interval(origin: np.ndarray, direction: np.ndarray) -> Interval:
    """Roots of `|origin + t direction| = 1` over the given axes: a sphere with three, an endless cylinder with two.

    Measured from the point of the ray nearest to the axis: the textbook discriminant loses a far, thin pole in float32.
    """
    squared_length = (direction * direction).sum(axis=0)
    nearest = -(origin * direction).sum(axis=0) / squared_length
    miss = origin + nearest * direction
    half_chord = np.sqrt((1 - (miss * miss).sum(axis=0)) / squared_length)
    return nearest - half_chord, nearest + half_chord


def box_interval(origin: np.ndarray, direction: np.ndarray) -> Interval:
    enter, leave = slab_interval(origin, direction)
    return enter.max(axis=0), leave.min(axis=0)


def cylinder_interval(origin: np.ndarray, direction: np.ndarray) -> Interval:
    enter, leave = round_interval(origin[[0, 2]], direction[[0, 2]])
    low, high = slab_interval(origin[1], direction[1])
    return np.maximum(enter, low), np.minimum(leave, high)


INTERVALS: dict[str, Callable[[np.ndarray, np.ndarray], Interval]] = {
    "box": box_interval,
    "cylinder": cylinder_interval,
    "sphere": round_interval,
}


def intersect(primitive: Primitive, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """(N,) ray parameter of the first visible surface, inf where the ray misses; `origin` is (3, 1) or (3, N)."""
    to_local = (rotation_y(-primitive.yaw) / primitive.half_size[:, None]).astype(np.float32)
    shift = origin - primitive.centre[:, None].astype(np.float32)
    enter, leave = INTERVALS[primitive.shape](to_local @ shift, to_local @ direction)
    first = leave if primitive.hollow else enter
    return np.where((enter <= leave) & (first > 0), first, np.float32(np.inf))


def surface(primitive: Primitive, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit normal (3, N), and texture coordinates u, v (N,) in metres, of world points on the primitive."""
    half_size = primitive.half_size[:, None].astype(np.float32)
    turn = rotation_y(primitive.yaw).astype(np.float32)
    local = turn.T @ (points - primitive.centre[:, None].astype(np.float32))
    unit = local / half_size
    around, radius = np.arctan2(unit[0], unit[2]), primitive.half_size[0]
    if primitive.shape == "sphere":
        normal, u, v = unit, around * radius, np.arcsin(np.clip(unit[1], -1, 1)) * radius
    elif primitive.shape == "cylinder":
        cap = np.abs(unit[1]) > np.hypot(unit[0], unit[2])
        normal = np.where(cap, [[0], [1], [0]] * np.sign(unit), [[1], [0], [1]] * unit)
        u, v = np.where(cap, local[0], around * radius), np.where(cap, local[2], local[1])
    else:
        axis = np.abs(unit).argmax(axis=0)
        normal = np.where(axis == np.arange(3)[:, None], np.sign(unit), 0)
        u, v = np.where(axis == 0, local[2], local[0]), np.where(axis == 1, local[2], local[1])
    normal = turn @ (normal / half_size)
    normal *= (-1 if primitive.hollow else 1) / np.linalg.norm(normal, axis=0)
    return normal, u, v


def cast(primitives: list[Primitive], origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Planar depth (N,) of the nearest hit (inf = none) and the index of the primitive hit (-1 = none)."""
    depth = np.full(directions.shape[1], np.inf, np.float32)
    hit = np.full(directions.shape[1], -1, np.int32)
    length = np.linalg.norm(directions, axis=0)
    for index, primitive in enumerate(primitives):
        offset = primitive.centre - origin[:, 0]
        distance, radius = float(np.linalg.norm(offset)), float(np.linalg.norm(primitive.half_size))
        rays: np.ndarray | slice = slice(None)
        if distance > radius:
            rays = np.flatnonzero(offset.astype(np.float32) @ directions >= length * np.sqrt(distance**2 - radius**2))
        t = intersect(primitive, origin, directions[:, rays])
        nearer = t < depth[rays]
        depth[rays] = np.where(nearer, t, depth[rays])
        hit[rays] = np.where(nearer, index, hit[rays])
    return depth, hit


def in_shadow(primitives: list[Primitive], points: np.ndarray, to_light: np.ndarray) -> np.ndarray:
    """(N,) True where a primitive lies on the segment from the point to the light."""
    shadow = np.zeros(points.shape[1], bool)
    unit = to_light / np.linalg.norm(to_light, axis=0)
    point_along, squared_point = (points * unit).sum(axis=0), (points * points).sum(axis=0)
    for primitive in primitives:
        if not primitive.casts_shadow:
            continue
        centre = primitive.centre.astype(np.float32)
        along = np.maximum(centre @ unit - point_along, 0)
        squared_miss = centre @ centre - 2 * (centre @ points) + squared_point - along * along
        near = squared_miss < np.sum(primitive.half_size**2)
        rays = np.flatnonzero(near & ~shadow)
        shadow[rays] = intersect(primitive, points[:, rays], to_light[:, rays]) < 1
    return shadow


def sky_colour(lighting: Lighting, directions: np.ndarray) -> np.ndarray:
    """(3, N) linear colour: from haze at the horizon to blue above, with noise clouds on a plane overhead."""
    up = np.clip(-directions[1] / np.linalg.norm(directions, axis=0), 0, 1)
    blue = np.clip(up * 2.5, 0, 1) ** 0.7
    height = np.maximum(up, 0.05)
    cover = lighting.clouds * fractal_noise(directions[0] / height, directions[2] / height, 0.02 / height**2)
    blue = blue * (1 - np.clip(cover * 1.6 - 0.3, 0, 1))
    haze, sky = lighting.haze_colour[:, None] ** 2, lighting.sky_colour[:, None] ** 2
    return haze + (sky - haze) * blue


def shade(
    scene: Scene, origin: np.ndarray, directions: np.ndarray, depth: np.ndarray, hit: np.ndarray, *, focal_px: float
) -> np.ndarray:
    """(3, N) linear colour of each ray: texture, ambient light, one lamp or sun with shadows, haze, sky."""
    lighting, colour = scene.lighting, np.empty_like(directions)
    colour[:, hit < 0] = sky_colour(lighting, directions[:, hit < 0])
    seen = np.flatnonzero(hit >= 0)
    view = directions[:, seen]
    points = origin + view * depth[seen]
    normals = np.empty_like(points)
    paint = np.empty_like(points)
    slant = np.linalg.norm(view, axis=0)
    for index in np.unique(hit[seen]):
        rays, primitive = np.flatnonzero(hit[seen] == index), scene.primitives[index]
        normals[:, rays], u, v = surface(primitive, points[:, rays])
        facing = np.abs((normals[:, rays] * view[:, rays]).sum(axis=0)) / slant[rays]
        pixel_m = depth[seen[rays]] / focal_px / np.sqrt(np.maximum(facing, 0.02))
        paint[:, rays] = albedo(primitive.material, u, v, pixel_m) ** 2
    light = illuminate(scene, points, normals)
    clear = np.exp(-lighting.haze_per_m * depth[seen] * slant)
    colour[:, seen] = paint * light * clear + (1 - clear) * lighting.haze_colour[:, None] ** 2
    return colour


def illuminate(scene: Scene, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """(N,) light that arrives at surface points: ambient, brighter from above, plus the lamp where it is not hidden."""
    lighting = scene.lighting
    lifted = points + 2e-3 * normals
    to_light = lighting.position[:, None].astype(np.float32) - lifted
    distance = np.linalg.norm(to_light, axis=0)
    facing = (normals * to_light).sum(axis=0) / distance
    direct = np.maximum(facing, 0) / (1 + (distance / lighting.falloff_m) ** 2)
    lit = np.flatnonzero(direct > 0)
    direct[lit] *= ~in_shadow(scene.primitives, lifted[:, lit], to_light[:, lit])
    return lighting.ambient * (1 - 0.3 * normals[1]) + (1.5 if np.isfinite(lighting.falloff_m) else 0.9) * direct


class Lens(NamedTuple):
    """What one camera does to a picture: drawn once a clip. `tint` scales the channels, `noise` is in display units."""

    exposure: float
    vignette: float
    blur_px: float
    noise: float
    tint: np.ndarray


def make_lens(rng: np.random.Generator, style: Style) -> Lens:
    return Lens(
        exposure=rng.uniform(*style.exposure),
        vignette=rng.uniform(*style.vignette),
        blur_px=rng.uniform(*style.blur_px),
        noise=rng.uniform(*style.noise),
        tint=np.array(style.tint, np.float32),
    )


def develop(linear: np.ndarray, lens: Lens, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) linear light to uint8: blur, vignette, exposure, display curve (square root), sensor noise."""
    height, width = linear.shape[:2]
    if lens.blur_px > 0:
        linear = cv2.GaussianBlur(linear, (0, 0), lens.blur_px)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)
    gain = lens.exposure * (1 - lens.vignette * (x * x + y * y) / 2)
    display = np.sqrt(np.clip(linear * gain[..., None] * lens.tint, 0, 1))
    display += lens.noise * rng.standard_normal(display.shape, dtype=np.float32)
    return (np.clip(display, 0, 1) * 255 + 0.5).astype(np.uint8)


def view_rays(pose: np.ndarray, size: tuple[int, int], intrinsics_px: Intrinsics) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3, 1) and directions (3, N) with unit planar depth: H*W pixel centres, then (H+1)*(W+1) pixel corners."""
    height, width = size
    centres = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    corners = np.meshgrid(np.arange(height + 1.0), np.arange(width + 1.0), indexing="ij")
    rows, cols = (np.concatenate([a.ravel(), b.ravel()]) for a, b in zip(centres, corners, strict=True))
    x, y = pixel_rays(rows, cols, intrinsics_px)
    directions = pose[:3, :3] @ np.stack([x, y, np.ones_like(x)])
    return pose[:3, 3:].astype(np.float32), directions.astype(np.float32)


def render(
    scene: Scene, pose: np.ndarray, size: tuple[int, int], intrinsics_px: Intrinsics
) -> tuple[np.ndarray, np.ndarray]:
    """Linear colour (H, W, 3) and planar depth (H, W) at the pixel centres, 0 for sky.

    Each pixel is half its centre and an eighth of each of its corners, which are shared with its neighbours: edges are
    smooth at twice the rays of one sample a pixel.
    """
    height, width = size
    origin, directions = view_rays(pose, size, intrinsics_px)
    with np.errstate(divide="ignore", invalid="ignore"):
        depth, hit = cast(scene.primitives, origin, directions)
        colour = shade(scene, origin, directions, depth, hit, focal_px=intrinsics_px[0])
    colour = np.ascontiguousarray(np.minimum(colour, 1.5).T)
    centre = colour[: height * width].reshape(height, width, 3)
    corner = colour[height * width :].reshape(height + 1, width + 1, 3)
    image = centre / 2 + (corner[:-1, :-1] + corner[:-1, 1:] + corner[1:, :-1] + corner[1:, 1:]) / 8
    depth = depth[: height * width].reshape(size)
    return image, np.where(np.isfinite(depth), depth, np.float32(0))
