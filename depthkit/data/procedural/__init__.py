"""A procedural world to learn depth from, so that everything runs in a minute without a download.

`render_clip` makes images with exact depth, `write_world` packs them as a data set like any other.
"""

from depthkit.data.procedural.pack import WorldSpec, write_world
from depthkit.data.procedural.world import DOMAINS, Frame, render_clip

__all__ = ["DOMAINS", "Frame", "WorldSpec", "render_clip", "write_world"]
