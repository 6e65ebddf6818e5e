"""Pseudo-label shards: reading images for the teacher, writing its labels one shard for one image shard."""

import json
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from depthkit.config import ConfigError
from depthkit.data.codecs import read_png8
from depthkit.data.decode import decode_image, encode_disparity, image_size
from depthkit.data.manifest import LabelsOf, Manifest, TargetSpec, load_manifest, save_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import ShardReader, image_member
from depthkit.data.windows import crop_image, full_window, inference_size
from depthkit.data.writer import ShardWriter, describe_shard
from depthkit.files import atomic_write
from depthkit.types import Rejection

LABEL = "disparity.png"
TARGET = TargetSpec(quantity="disparity", codec="png16", extension=LABEL, metric=False)


class ImageGroup(NamedTuple):
    """Images of one size: `indices` (n,) within their shard, `images` (n, 3, H, W) uint8, `sky` (n, H, W) bool."""

    indices: list[int]
    images: Tensor
    sky: Tensor


class ImageChunk(NamedTuple):
    """Consecutive samples of one shard, grouped by size; what could not be read is in `rejections`, by index."""

    shard: int
    keys: list[str]
    first: int
    is_last: bool
    groups: list[ImageGroup]
    rejections: dict[int, Rejection]


class ImageChunks(Dataset):
    """The images of some shards in order, `chunk_size` at a time, at the size the teacher sees them."""

    def __init__(
        self, manifest_path: Path, shards: list[int], *, chunk_size: int, short_side: int, multiple: int
    ) -> None:
        manifest = load_manifest(manifest_path)
        self.name = manifest.name
        self.reader = ShardReader(manifest, manifest_path.parent)
        self.short_side = short_side
        self.multiple = multiple
        self.chunks = [
            (shard, first, min(first + chunk_size, manifest.shards[shard].num_samples))
            for shard in shards
            for first in range(0, manifest.shards[shard].num_samples, chunk_size)
        ]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> ImageChunk:
        shard, first, end = self.chunks[index]
        keys = self.reader.keys(shard)
        by_size: dict[tuple[int, ...], list[tuple[int, np.ndarray, np.ndarray]]] = defaultdict(list)
        rejections = {}
        for sample in range(first, end):
            try:
                image, sky = self._read(shard, sample)
            except SampleError as error:
                path = self.reader.root / self.reader.manifest.shards[shard].path
                rejections[sample] = Rejection(dataset=self.name, shard=str(path), key=keys[sample], reason=str(error))
                continue
            by_size[image.shape].append((sample, image, sky))
        groups = [
            ImageGroup(
                indices=[sample for sample, _, _ in items],
                images=torch.from_numpy(np.stack([image for _, image, _ in items])).permute(0, 3, 1, 2).contiguous(),
                sky=torch.from_numpy(np.stack([sky for _, _, sky in items])),
            )
            for items in by_size.values()
        ]
        return ImageChunk(shard, keys[first:end], first, end == len(keys), groups, rejections)

    def _read(self, shard: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) at the teacher's size and its sky mask (H, W), empty where the data set has none."""
        members = self.reader.read(shard, sample).members
        data = image_member(members)
        size = image_size(data)
        window = full_window(size, inference_size(size, self.short_side, self.multiple))
        image = crop_image(decode_image(data), window, size)
        if "sky.png" not in members:
            return image, np.zeros(window.size, bool)
        sky = cv2.resize(read_png8(members["sky.png"]), window.size[::-1], interpolation=cv2.INTER_NEAREST)
        return image, sky > 0


class LabelShards:
    """The folder of a label set: which shards are done, writing the others, and the manifest at the end.

    A label shard has the name and the keys of its image shard, and its final name only once it is whole. A sample whose
    image is broken keeps its place with `KEY.json` alone, which says why. ConfigError when the folder holds labels of
    another teacher, resolution or image set, or no labels. As a context manager it removes the unfinished shard after
    an exception.
    """

    def __init__(self, folder: Path, images: Manifest, labels_of: LabelsOf) -> None:
        self.folder = folder
        self.images = images
        self.labels_of = labels_of
        self.manifest_path = folder / "manifest.json"
        self._writer: ShardWriter | None = None
        self._open = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        origin = folder / "labels_of.json"
        if not origin.exists():
            self._check_free()
        keep_origin(origin, labels_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def _check_free(self) -> None:
        """ConfigError when a file that is no label has the place of one: above all, the folder of the images."""
        for path in (self.manifest_path, *map(self.path, range(len(self.images.shards)))):
            if path.exists():
                raise ConfigError(f"{path} is there, but {self.folder} holds no labels: choose another out=FOLDER")

    def path(self, shard: int) -> Path:
        return self.folder / self.images.shards[shard].path

    def pending(self) -> list[int]:
        """Image shards without a finished label shard."""
        return [shard for shard in range(len(self.images.shards)) if not self.path(shard).is_file()]

    def write(self, chunk: ImageChunk, disparity: dict[int, np.ndarray]) -> None:
        """Append one chunk's labels, `disparity` by index in the shard; the last chunk of a shard finishes it."""
        if self._writer is None:
            self.path(chunk.shard).parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._open.enter_context(ShardWriter(self.path(chunk.shard)))
        for index, key in enumerate(chunk.keys, start=chunk.first):
            if index in disparity:
                png, facts = encode_disparity(disparity[index])
                self._writer.add(key, {LABEL: png, "json": json.dumps(facts).encode()})
            else:
                self._writer.add(key, {"json": json.dumps({"rejected": chunk.rejections[index].reason}).encode()})
        if chunk.is_last:
            self._open.close()
            self._writer = None

    def finish(self) -> Path:
        """Write the manifest; returns its path. ValueError when a shard is missing or lacks samples."""
        missing = [self.path(shard).name for shard in self.pending()]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} label shards are missing, {missing[0]} the first; run again"
            )
        manifest = Manifest(
            name=self.images.name,
            split=self.images.split,
            target=TARGET,
            shards=tuple(describe_shard(self.folder, shard.path) for shard in self.images.shards),
            licence=self.images.licence,
            source=f"pseudo-labels of teacher {self.labels_of.teacher_sha256[:12]}",
            labels_of=self.labels_of,
        )
        for label, image in zip(manifest.shards, self.images.shards, strict=True):
            if label.num_samples != image.num_samples:
                raise ValueError(
                    f"{self.folder / label.path} holds {label.num_samples} labels for {image.num_samples} images: "
                    "delete it and run again"
                )
        save_manifest(manifest, self.manifest_path)
        return self.manifest_path


def keep_origin(path: Path, labels_of: LabelsOf) -> None:
    """Write down what the labels in a folder are made from, or check that it is still the same."""
    text = json.dumps(asdict(labels_of), indent=2) + "\n"
    if not path.exists():
        with atomic_write(path) as file:
            file.write(text.encode())
        return
    found = json.loads(path.read_text())
    # Of a field that the folder does not know yet nothing can be said.
    different = [name for name, value in asdict(labels_of).items() if found.get(name, value) != value]
    if different:
        pairs = "; ".join(f"{name} {found.get(name)!r}, now {getattr(labels_of, name)!r}" for name in different)
        raise ConfigError(f"{path.parent} holds labels of another origin ({pairs}): choose another out=FOLDER")
