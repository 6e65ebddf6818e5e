"""Reading images for the teacher: pieces of shards in loader workers, batches of one size in the main process."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from depthkit.data.codecs import read_png8
from depthkit.data.decode import decode_image, image_size
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import shown
from depthkit.data.shards import ShardReader, image_member
from depthkit.data.windows import crop_image, full_window, inference_size
from depthkit.types import Rejection

MAX_BATCHES_LATE = 8
"""An image waits for others of its size until this many batches of images came after it: bounds the memory."""


class ImageGroup(NamedTuple):
    """Images of one size: `indices` (n,) within their shard, `images` (n, 3, H, W) uint8, `sky` (n, H, W) bool.

    `sky` is None where the data set has no sky masks.
    """

    indices: list[int]
    images: Tensor
    sky: Tensor | None


class ImageChunk(NamedTuple):
    """Consecutive samples of one shard, grouped by size; what could not be read is in `rejections`, by index.

    `failure` says why the shard itself cannot be read; the chunk then holds nothing else.
    """

    shard: int
    first: int
    keys: list[str]
    is_last: bool
    groups: list[ImageGroup]
    rejections: dict[int, Rejection]
    failure: str = ""


class LabelBatch(NamedTuple):
    """Images of one size and one shard."""

    shard: int
    group: ImageGroup


class ImageChunks(Dataset):
    """`chunks[shard, first, end]` are those samples of a shard, at the size the teacher sees them."""

    def __init__(self, reader: ShardReader, *, short_side: int, multiple: int) -> None:
        self.reader = reader
        self.short_side = short_side
        self.multiple = multiple

    def __getitem__(self, place: tuple[int, int, int]) -> ImageChunk:
        shard, first, end = place
        try:
            return self._read_chunk(shard, first, end)
        except (SampleError, OSError) as error:
            return ImageChunk(shard, first, [], False, [], {}, failure=str(error))

    def _read_chunk(self, shard: int, first: int, end: int) -> ImageChunk:
        keys = self.reader.keys(shard)
        items: list[tuple[int, np.ndarray, np.ndarray | None]] = []
        rejections = {}
        manifest = self.reader.manifest
        for sample in range(first, end):
            try:
                items.append((sample, *self._read(shard, sample)))
            except SampleError as error:
                path = shown(self.reader.location(shard))
                rejections[sample] = Rejection(dataset=manifest.name, shard=path, key=keys[sample], reason=str(error))
        by_size: dict[tuple[tuple[int, ...], bool], list[tuple[int, np.ndarray, np.ndarray | None]]] = defaultdict(list)
        for item in items:
            by_size[item[1].shape, item[2] is None].append(item)
        groups = [_group(group) for group in by_size.values()]
        return ImageChunk(shard, first, keys[first:end], end == len(keys), groups, rejections)

    def _read(self, shard: int, sample: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Image (H, W, 3) at the teacher's size and its sky mask (H, W)."""
        members = self.reader.read(shard, sample).members
        data = image_member(members)
        size = image_size(data)
        window = full_window(size, inference_size(size, self.short_side, self.multiple))
        image = crop_image(decode_image(data), window, size)
        if "sky.png" not in members:
            return image, None
        sky = cv2.resize(read_png8(members["sky.png"]), window.size[::-1], interpolation=cv2.INTER_NEAREST)
        return image, sky > 0


def _group(items: list[tuple[int, np.ndarray, np.ndarray | None]]) -> ImageGroup:
    skies = [sky for _, _, sky in items if sky is not None]
    return ImageGroup(
        indices=[sample for sample, _, _ in items],
        images=torch.from_numpy(np.stack([image for _, image, _ in items])).permute(0, 3, 1, 2).contiguous(),
        sky=torch.from_numpy(np.stack(skies)) if skies else None,
    )


def full_batches(
    chunks: Iterable[ImageChunk], batch_size: int, *, accept: Callable[[ImageChunk], bool]
) -> Iterator[LabelBatch]:
    """Batches of `batch_size` images of one size, smaller where a shard has no more of them in reach.

    Which images share a batch depends on their shard and `batch_size` alone, never on other shards: whoever labels a
    shard gets the same numbers. `accept` sees every chunk first; those it declines are dropped.
    """
    waiting: dict[tuple[int, ...], list[ImageGroup]] = {}
    for chunk in chunks:
        if chunk.first == 0:
            waiting = {}
        if not accept(chunk):
            continue
        for new in chunk.groups:
            kind = (*new.images.shape[1:], new.sky is None)
            waiting.setdefault(kind, []).append(new)
        for kind, groups in list(waiting.items()):
            late = chunk.first - groups[0].indices[0] >= MAX_BATCHES_LATE * batch_size
            if chunk.is_last or late or sum(len(group.indices) for group in groups) >= batch_size:
                joined = join(waiting.pop(kind))
                for start in range(0, len(joined.indices), batch_size):
                    part = cut(joined, start, start + batch_size)
                    if len(part.indices) == batch_size or chunk.is_last or late:
                        yield LabelBatch(chunk.shard, part)
                    else:
                        waiting[kind] = [part]


def join(groups: list[ImageGroup]) -> ImageGroup:
    """Groups of one size as one; all have sky masks, or none."""
    return ImageGroup(
        indices=[index for group in groups for index in group.indices],
        images=torch.cat([group.images for group in groups]),
        sky=None if groups[0].sky is None else torch.cat([group.sky for group in groups if group.sky is not None]),
    )


def cut(group: ImageGroup, start: int, end: int) -> ImageGroup:
    sky = None if group.sky is None else group.sky[start:end]
    return ImageGroup(group.indices[start:end], group.images[start:end], sky)
