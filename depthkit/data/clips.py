"""Clips: frames of one video as one sample, found through the runs of consecutive frames that the manifest lists."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from depthkit.config import ConfigError, DatasetConfig
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import Manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.windows import Window
from depthkit.types import Kind, Rejection, Sample

STATIC_LEVELS = 0.5
"""Grey levels: neighbouring frames that differ by less in the mean show no motion. Sensor noise alone makes more."""


class ClipReader:
    """Clips of one data set as samples: `num_frames` frames of one run, `stride` apart.

    Clips are numbered shard by shard, run by run; one begins at every frame of a run, or every `every` frames, that has
    enough frames after it. `image` of a sample is (T, H, W, 3), all frames in one window; `camera_to_world` (T, 4, 4)
    float32 has the axes of the first frame as the world, NaN where a pose is not known. Everything else is that of the
    middle frame, `num_frames // 2`.
    """

    def __init__(
        self,
        name: str,
        config: DatasetConfig,
        kind: Kind | None,
        cache: ShardCache | None = None,
        *,
        num_frames: int,
        stride: int,
        every: int = 1,
    ) -> None:
        self.middle = DatasetReader(name, config, kind, cache)
        without_labels = replace(config, labels=None)
        self.others = self.middle if kind is None else DatasetReader(name, without_labels, None, cache)
        self.kind, self.images, self.labels = kind, self.middle.images, self.middle.labels
        self.num_frames, self.stride, self.every = num_frames, stride, every
        check_clips(f"data set {name!r}", config, self.middle.manifest, num_frames, stride)

    @property
    def shard_sizes(self) -> list[int]:
        return [int(self._counts(shard.runs).sum()) for shard in self.middle.manifest.shards]

    def read(self, shard: int, index: int, choose_window: Callable[[tuple[int, int]], Window]) -> Sample:
        """The clip in the window that `choose_window` picks for the (height, width) of its frames.

        SampleError where the frames are not of one size, show no motion or do not say what camera took them.
        """
        chosen: dict[tuple[int, int], Window] = {}

        def same_window(size: tuple[int, int]) -> Window:
            if not chosen:
                chosen[size] = choose_window(size)
            if size not in chosen:
                raise SampleError(f"a frame of {size} pixels in a video of {next(iter(chosen))} (height, width)")
            return chosen[size]

        clip = self._join(shard, index, lambda reader, frame: reader.read(shard, frame, same_window))
        check_motion(clip.image, clip.key)
        if not np.isfinite(clip.intrinsics_px).all():
            raise SampleError(
                "its facts lack intrinsics_px, [fx, fy, cx, cy] of a pinhole camera, without which nothing can be "
                "learned from its motion; state K in the index that is packed"
            )
        return clip

    def read_whole(self, shard: int, index: int, *, short_side: int, multiple: int) -> Sample:
        """The whole frames at the size a model sees them, and the target of the middle one at its own size.

        SampleError where the poses are not known by which motion is to be judged.
        """
        size = {"short_side": short_side, "multiple": multiple}
        clip = self._join(shard, index, lambda reader, frame: reader.read_whole(shard, frame, **size))
        if not np.isfinite(clip.camera_to_world).all():
            raise SampleError(
                "the facts of its frames lack pose, a 4x4 camera-to-world matrix in metres, to judge motion by; state "
                "pose in the index that is packed, or leave the data set out of data.val_clips"
            )
        return clip

    def rejection(self, shard: int, index: int, error: SampleError) -> Rejection:
        """What the quarantine list says of this clip: the key is that of its middle frame."""
        return self.middle.rejection(shard, self._frames(shard, index)[self.num_frames // 2], error)

    def _join(self, shard: int, index: int, read: Callable[[DatasetReader, int], Sample]) -> Sample:
        numbers = self._frames(shard, index)
        frames = []
        for place, number in enumerate(numbers):
            is_middle = place == self.num_frames // 2
            try:
                frames.append(read(self.middle if is_middle else self.others, number))
            except SampleError as error:
                if is_middle:
                    raise
                raise SampleError(f"frame {place - self.num_frames // 2:+d} of the clip: {error}") from error
        sizes = {frame.image.shape for frame in frames}
        if len(sizes) > 1:
            raise SampleError(f"the frames of the clip are not of one size: {sorted(sizes)}")
        return replace(
            frames[self.num_frames // 2],
            image=np.stack([frame.image for frame in frames]),
            camera_to_world=from_first([frame.camera_to_world for frame in frames]),
        )

    def _counts(self, runs: Sequence[int]) -> np.ndarray:
        return num_clips(runs, self.num_frames, self.stride, self.every)

    def _frames(self, shard: int, index: int) -> list[int]:
        """The samples of the shard that are the frames of a clip."""
        runs = self.middle.manifest.shards[shard].runs
        ends = np.cumsum(self._counts(runs))
        run = int(np.searchsorted(ends, index, side="right"))
        number = index - (int(ends[run - 1]) if run else 0)
        first = sum(runs[:run]) + number * self.every
        return [first + place * self.stride for place in range(self.num_frames)]


def clip_span(num_frames: int, stride: int) -> int:
    """Frames of the video from the first of a clip to its last, both counted."""
    return (num_frames - 1) * stride + 1


def num_clips(runs: Iterable[int], num_frames: int, stride: int, every: int = 1) -> np.ndarray:
    """Clips in each run, (runs,): one begins every `every` frames and ends inside it."""
    return np.maximum((np.array(list(runs), np.int64) - clip_span(num_frames, stride)) // every + 1, 0)


def runs_of(config: DatasetConfig, manifest: Manifest | None) -> list[int]:
    """All runs of a data set; `manifest` is None where its world is still to be rendered."""
    if manifest is not None:
        return [run for shard in manifest.shards for run in shard.runs]
    world = config.world
    return [world.num_frames] * (world.num_images // world.num_frames) if world else []


def check_clips(place: str, config: DatasetConfig, manifest: Manifest | None, num_frames: int, stride: int) -> None:
    """ConfigError unless a data set holds clips; `manifest` is None where its world is still to be rendered."""
    if config.selection is not None:
        raise ConfigError(
            f"{place}: selection={config.selection} keeps single images, which are no clips; leave it out"
        )
    longest = max(runs_of(config, manifest), default=1)
    if longest == 1:
        cure = "set world.num_frames" if config.world else "pack it with the facts sequence and frame (seq, frame)"
        raise ConfigError(f"{place} ({config.manifest}) holds no video, only single images; {cure}")
    if longest < clip_span(num_frames, stride):
        raise ConfigError(
            f"{place} ({config.manifest}): the longest run has {longest} frames, a clip of {num_frames} frames with "
            f"data.clip_stride={stride} spans {clip_span(num_frames, stride)}; take shorter clips or a smaller stride"
        )


def check_motion(frames: np.ndarray, key: str) -> None:
    """SampleError where two neighbouring frames (T, H, W, 3) are the same picture."""
    for number, (frame, later) in enumerate(pairwise(frames.astype(np.int16))):
        difference = np.abs(later - frame).mean()
        if difference < STATIC_LEVELS:
            raise SampleError(
                f"frames {number} and {number + 1} of the clip around {key!r} are the same picture (mean difference "
                f"{difference:.2f} grey levels): the camera stands still; leave such frames out when packing"
            )


def from_first(poses: Sequence[np.ndarray]) -> np.ndarray:
    """Camera-to-world (T, 4, 4) float32 with the first camera as the world, from float64 poses: far from the origin of
    a map the motion between neighbours would be lost in float32."""
    return np.stack([np.linalg.inv(poses[0]) @ pose for pose in poses]).astype(np.float32)
