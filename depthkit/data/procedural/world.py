"""Views of the procedural world: ray-cast rooms, streets and parks with exact depth, in two visual domains.

`source` stands for synthetic data (clean, vivid, regular textures), `target` for a real camera (muted, rough textures,
blur, noise, vignette, another lens and mounting). A picture is a pure function of (seed, domain, split, index).
"""

import zlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from depthkit.data.procedural.objects import STYLES
from depthkit.data.procedural.render import develop, make_lens, render
from depthkit.data.procedural.scenes import PATH_PERIOD, make_scene

DOMAINS = ("source", "target")


class Frame(NamedTuple):
    """One view: `image` (H, W, 3) uint8, `depth` (H, W) float32 planar z in metres, 0 = sky, `sky_mask` (H, W) bool.

    `intrinsics_px` is (fx, fy, cx, cy), `camera_to_world` (4, 4) float64; world axes are x right, y down, z forward in
    metres, and the ground is y = 0.
    """

    image: np.ndarray
    depth: np.ndarray
    sky_mask: np.ndarray
    intrinsics_px: tuple[float, float, float, float]
    camera_to_world: np.ndarray


def render_clip(
    *,
    domain: str,
    split: str,
    index: int,
    seed: int,
    size: tuple[int, int],
    num_frames: int = 1,
    frame_step: int = 1,
    indoor_share: float | None = None,
) -> list[Frame]:
    """`num_frames` views of one scene, `frame_step` places apart on the path of the camera.

    The scene is a room with probability `indoor_share`, by default that of the domain.
    The first ones do not depend on how many follow. The path comes back to where it began after `PATH_PERIOD` places.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    style = STYLES[domain]
    if indoor_share is not None:
        style = replace(style, indoor_share=indoor_share)
    streams = np.random.SeedSequence([seed, DOMAINS.index(domain), zlib.crc32(split.encode()), index])
    scene_stream, lens_stream, *noise_streams = streams.spawn(2 + num_frames)
    scene = make_scene(np.random.default_rng(scene_stream), style)
    lens = make_lens(np.random.default_rng(lens_stream), style)
    focal_px = float(size[1] / 2 / np.tan(scene.field_of_view / 2))
    intrinsics_px = (focal_px, focal_px, size[1] / 2, size[0] / 2)

    frames = []
    for number, noise_stream in enumerate(noise_streams):
        pose = scene.poses[number * frame_step % PATH_PERIOD]
        linear, depth = render(scene, pose, size, intrinsics_px)
        image = develop(linear, lens, np.random.default_rng(noise_stream))
        frames.append(Frame(image, depth, depth == 0, intrinsics_px, pose))
    return frames
