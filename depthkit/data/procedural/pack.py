"""The procedural world as a data set: shards and a manifest, written once and found again by later runs."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from depthkit.data.manifest import Manifest, Shard, TargetSpec, load_manifest, save_manifest
from depthkit.data.procedural.world import DOMAINS, Frame, render_clip
from depthkit.data.workers import worker_pool
from depthkit.data.writer import ShardWriter

VERSION = 1
"""Raise it with any change that alters the pictures, so that data sets of older code are not taken for the same."""

TARGET = TargetSpec(quantity="depth", codec="png16", extension="depth.png", scale=256.0, depth_range=(0.1, 250.0))
JPEG_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class WorldSpec:
    """What `write_world` writes: `size` is (height, width); two splits, named by any words, share no picture.

    With `num_frames` above 1 the images are those of clips, `num_frames` of each scene, `frame_step` places apart on
    the path of the camera: 2 to 8 cm indoors and 10 to 30 cm outdoors a place, less near its turning points.
    `indoor_share` of the scenes are rooms, by default as many as the domain has.
    """

    domain: str
    split: str
    num_images: int
    size: tuple[int, int] = (96, 128)
    seed: int = 0
    labeled: bool = True
    samples_per_shard: int = 128
    num_frames: int = 1
    frame_step: int = 1
    indoor_share: float | None = None

    def __post_init__(self) -> None:
        if self.domain not in DOMAINS:
            raise ValueError(f"unknown domain {self.domain!r}; choose one of {', '.join(DOMAINS)}")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.split):
            raise ValueError(f"split {self.split!r} names files; use letters, digits, - and _")
        for name in ("num_images", "samples_per_shard", "num_frames", "frame_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not positive")
        if self.num_images % self.num_frames:
            raise ValueError(f"num_images: {self.num_images} are no whole clips of num_frames={self.num_frames}")

    @property
    def scenes_per_shard(self) -> int:
        return max(1, self.samples_per_shard // self.num_frames)

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // (self.num_frames * self.scenes_per_shard))

    def shard_range(self, number: int) -> range:
        """Indices of the scenes in one shard."""
        start = number * self.scenes_per_shard
        return range(start, min(start + self.scenes_per_shard, self.num_images // self.num_frames))

    def runs(self, number: int) -> tuple[int, ...]:
        """The runs of frames in one shard."""
        return (self.num_frames,) * len(self.shard_range(number)) if self.num_frames > 1 else ()

    def facts(self) -> dict[str, Any]:
        """The fields as JSON; later ones only where they say something, so that older data sets keep their names."""
        silent = {"num_frames", "frame_step"} if self.num_frames == 1 else set()
        silent |= {"indoor_share"} if self.indoor_share is None else set()
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def shard_name(self, number: int) -> str:
        """Differs between specs, so that a folder never mixes the shards of two."""
        digest = hashlib.sha256(json.dumps([VERSION, self.facts()], sort_keys=True).encode()).hexdigest()
        return f"{self.domain}-{self.split}-{digest[:8]}-{number:06d}.tar"

    def manifest(self, shards: tuple[Shard, ...]) -> Manifest:
        return Manifest(
            name=f"procedural_{self.domain}",
            split=self.split,
            target=TARGET if self.labeled else None,
            shards=shards,
            licence="Apache-2.0 (generated)",
            source="depthkit.data.procedural",
            description=f"Ray-cast rooms, streets and parks, version {VERSION}: {json.dumps(self.facts())}",
        )


def write_world(root: Path, spec: WorldSpec, *, progress: bool = True) -> Path:
    """Write the data set that `spec` describes into `root` and return the path of its manifest.

    A finished one is returned at once; an interrupted one continues with the shards that are missing. ValueError when
    `root` holds the manifest of something else.
    """
    path = root / "manifest.json"
    if path.exists():
        manifest = load_manifest(path)
        if replace(manifest, shards=()) != spec.manifest(()):
            raise ValueError(f"{path} describes another data set ({manifest.description}); choose another folder")
        if all((root / shard.path).is_file() for shard in manifest.shards):
            return path
    root.mkdir(parents=True, exist_ok=True)
    save_manifest(spec.manifest(write_shards(root, spec, progress=progress)), path)
    return path


def write_shards(root: Path, spec: WorldSpec, *, progress: bool) -> tuple[Shard, ...]:
    """All shards of the world, rendered by one process for each CPU where there is more than one to do."""
    with images_progress(f"{spec.domain} {spec.split}", spec.num_images, shown=progress) as advance:
        num_workers = min(os.cpu_count() or 1, spec.num_shards)
        if num_workers == 1:
            shards = []
            for number in range(spec.num_shards):
                shards.append(write_shard(root, spec, number))
                advance(shards[-1].num_samples)
            return tuple(shards)
        pool = worker_pool(num_workers)
        try:
            futures = [pool.submit(write_shard, root, spec, number) for number in range(spec.num_shards)]
            for future in as_completed(futures):
                advance(future.result().num_samples)
            return tuple(future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def write_shard(root: Path, spec: WorldSpec, number: int) -> Shard:
    """Render one shard, unless it is there: a tar has its final name only when it is whole."""
    path = root / spec.shard_name(number)
    if path.is_file():
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        num_samples, num_bytes = len(spec.shard_range(number)) * spec.num_frames, path.stat().st_size
        shard = Shard(path=path.name, num_samples=num_samples, num_bytes=num_bytes, sha256=sha256)
        return replace(shard, runs=spec.runs(number))
    with ShardWriter(path) as writer:
        for scene in spec.shard_range(number):
            write_scene(writer, spec, scene)
    return replace(writer.close(), runs=spec.runs(number))


def write_scene(writer: ShardWriter, spec: WorldSpec, scene: int) -> None:
    """The image of one scene, or the frames of its clip."""
    names = ("domain", "split", "seed", "size", "num_frames", "frame_step", "indoor_share")
    views = {name: getattr(spec, name) for name in names}
    key = f"{spec.split}_{scene:07d}"
    for number, frame in enumerate(render_clip(index=scene, **views)):
        place = {"sequence": key, "frame": number} if spec.num_frames > 1 else {}
        writer.add(f"{key}_{number:03d}" if place else key, encode(frame, labeled=spec.labeled, place=place))


def encode(frame: Frame, *, labeled: bool, place: dict[str, Any]) -> dict[str, bytes]:
    """The tar members of one view, with its place in a video if any; depth is rounded to 1/256 m."""
    facts = {"intrinsics_px": list(frame.intrinsics_px), "camera_to_world": frame.camera_to_world.tolist()} | place
    members = {"jpg": encode_image(".jpg", frame.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])}
    if labeled:
        members["depth.png"] = encode_image(".png", np.round(frame.depth * TARGET.scale).astype(np.uint16))
        if frame.sky_mask.any():
            members["sky.png"] = encode_image(".png", frame.sky_mask.astype(np.uint8) * 255)
    members["json"] = json.dumps(facts).encode()
    return members


def encode_image(extension: str, pixels: np.ndarray, options: list[int] | None = None) -> bytes:
    done, data = cv2.imencode(extension, pixels, options or [])
    assert done, f"cv2 could not write {extension}"
    return data.tobytes()


class RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} images/s")


@contextmanager
def images_progress(label: str, num_images: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and time left; yields the function that advances it by some images."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bars:
        task = bars.add_task(label, total=num_images)
        yield lambda num_done: bars.advance(task, num_done)
