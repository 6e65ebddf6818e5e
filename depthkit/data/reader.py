"""One data set as training and validation see it: shards, their labels, and the choices of `DatasetConfig`."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.config import ConfigError, DatasetConfig
from depthkit.data.cache import ShardCache
from depthkit.data.cameras import image_facts, image_intrinsics, image_pose, window_intrinsics, window_pose
from depthkit.data.decode import decode_image, decode_target, image_size, read_facts, target_size
from depthkit.data.manifest import Manifest, TargetSpec, load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import is_remote, root_of, shown
from depthkit.data.selection import kept_samples, load_selection
from depthkit.data.shards import RawSample, ShardReader, image_member
from depthkit.data.windows import Window, crop_image, full_window, inference_size, jpeg_reduction, target_grid
from depthkit.types import Kind, Rejection, Sample

TAR_NAME = re.compile(r"[^/\s'\"=:&?]+\.tar\b")


class DatasetReader:
    """Reads samples of one data set with targets in `kind`.

    Labels come from the data set's own shards or, with `config.labels`, from a pseudo-label set whose shards belong one
    for one to the image shards. With `kind` None only images are read and every target is empty of supervision.

    With `needs_camera` a sample whose facts do not say the focal length is refused.

    With `config.selection` shards and samples are those that it keeps: both are numbered as if there were no others.
    """

    def __init__(
        self,
        name: str,
        config: DatasetConfig,
        kind: Kind | None,
        cache: ShardCache | None = None,
        needs_camera: bool = False,
    ) -> None:
        self.name = name
        self.needs_camera = needs_camera
        self.kind = kind
        self.depth_range = config.depth_range
        images = load_manifest(config.manifest)
        labeled = labels_manifest(config, images)
        self.kept = None if config.selection is None else selected_samples(config, images, labeled)
        self.manifest = images
        if self.kept is not None:
            self.manifest, labeled = (keep_shards(manifest, self.kept) for manifest in (images, labeled))
            self.kept = [kept for kept in self.kept if len(kept)]
        self.images = ShardReader(self.manifest, root_of(config.manifest), cache)
        self.labels = None if config.labels is None else ShardReader(labeled, root_of(config.labels), cache)
        self.target = None if kind is None else usable_target(labeled, name, kind, config.depth_range)

    @property
    def shard_sizes(self) -> list[int]:
        if self.kept is not None:
            return [len(kept) for kept in self.kept]
        return [shard.num_samples for shard in self.manifest.shards]

    def _stored(self, shard: int, index: int) -> int:
        """Where a sample lies in the tar of its shard."""
        return index if self.kept is None else int(self.kept[shard][index])

    def read(self, shard: int, index: int, choose_window: Callable[[tuple[int, int]], Window]) -> Sample:
        """The sample cropped to the window that `choose_window` picks for the image's (height, width)."""
        index = self._stored(shard, index)
        raw = self.images.read(shard, index)
        data = image_member(raw.members)
        size = image_size(data)
        window = choose_window(size)
        # The label first: it is where most samples are broken, and its decode is the cheaper one to have done in vain.
        target, valid_mask = self._target(raw, shard, index, size, window)
        image = crop_image(decode_image(data, reduce=jpeg_reduction(window)), window, size)
        return self._sample(raw, shard, size, window, image=image, target=target, valid_mask=valid_mask)

    def read_whole(self, shard: int, index: int, *, short_side: int, multiple: int) -> Sample:
        """The whole image at the size a model sees it, and the target at its own size, untouched."""
        index = self._stored(shard, index)
        raw = self.images.read(shard, index)
        data = image_member(raw.members)
        size = image_size(data)
        window = full_window(size, inference_size(size, short_side, multiple))
        target, valid_mask = self._target(raw, shard, index, size, None)
        image = crop_image(decode_image(data), window, size)
        return self._sample(raw, shard, size, window, image=image, target=target, valid_mask=valid_mask)

    def _sample(self, raw: RawSample, shard: int, size: tuple[int, int], window: Window, **decoded: Any) -> Sample:
        facts = image_facts(raw.members)
        intrinsics_px = image_intrinsics(facts, size)
        if self.needs_camera and not np.isfinite(intrinsics_px).all():
            raise SampleError(
                "its facts lack intrinsics_px, [fx, fy, cx, cy] of a pinhole camera, which stage.canonical_focal_px "
                "needs; state K in the index that is packed"
            )
        return Sample(
            **decoded,
            intrinsics_px=window_intrinsics(intrinsics_px, window),
            camera_to_world=window_pose(image_pose(facts), window),
            key=raw.key,
            dataset=self.name,
            shard=shown(self.images.location(shard)),
        )

    def rejection(self, shard: int, index: int, error: SampleError) -> Rejection:
        """What the quarantine list says of this sample. The key may be unknown when the shard itself is broken."""
        index = self._stored(shard, index)
        try:
            key = self.images.keys(shard)[index]
        except SampleError:
            key = f"sample {index}"
        path = shown(self.images.location(shard))
        return Rejection(dataset=self.name, shard=path, key=key, reason=str(error))

    def _target(
        self, raw: RawSample, shard: int, index: int, size: tuple[int, int], window: Window | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Target and mask of an image of `size` under `window`, or whole."""
        if self.target is None or self.kind is None:
            shape = size if window is None else window.size
            return np.zeros(shape, np.float32), np.zeros(shape, bool)
        label = self._label(raw, shard, index)
        stored = label.members[self.target.extension]
        label_size = target_size(stored, self.target.codec)
        if self.labels is None:
            check_same_view(label_size, size)
        rows, cols = (None, None) if window is None else target_grid(window, size, label_size)
        facts = read_facts(label.members)
        sky = label.members.get("sky.png")
        target, valid_mask = decode_target(stored, self.target, facts, self.kind, rows=rows, cols=cols, sky=sky)
        if self.depth_range is not None:
            valid_mask &= within_range(target, self.kind, self.depth_range)
            target[~valid_mask] = 0
        return target, valid_mask

    def _label(self, raw: RawSample, shard: int, index: int) -> RawSample:
        """The sample that holds the label: the image's own, or the one at the same place of the pseudo-label set."""
        if self.labels is None:
            return raw
        label = self.labels.read(shard, index)
        if label.key != raw.key:
            raise SampleError(f"the pseudo-label at this place is of {label.key!r}; label the shard again")
        return label


def check_same_view(label_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """SampleError unless the label can show what the image shows: its size, or smaller with the same aspect."""
    (height, width), (image_height, image_width) = label_size, image_size
    same_aspect = abs(height * image_width - width * image_height) <= 0.02 * width * image_height
    if not same_aspect or height > image_height or width > image_width:
        raise SampleError(
            f"label of {height}x{width} pixels for an image of {image_height}x{image_width}: not one view"
        )


def within_range(target: np.ndarray, kind: Kind, depth_range: list[float]) -> np.ndarray:
    """Mask of the pixels whose depth lies in [low, high] metres. Sky (disparity 0) has no depth to judge and stays."""
    low, high = depth_range
    if kind == "depth":
        return (target >= low) & (target <= high)
    return (target == 0) | ((target * low <= 1) & (target * high >= 1))


def usable_target(manifest: Manifest, name: str, kind: Kind, depth_range: list[float] | None = None) -> TargetSpec:
    """The target of `manifest` if it can give `kind`, and be held to a `depth_range`; ConfigError otherwise."""
    target = manifest.target
    if target is None:
        raise ConfigError(
            f"data set {name!r} ({manifest.name}, {manifest.split}) holds images without labels; "
            "give its pseudo-labels as labels=PATH/manifest.json"
        )
    if not target.aligned:
        raise ConfigError(f"data set {name!r} ({manifest.name}): its labels are not registered to its images")
    if target.metric:
        return target
    without_unit = f"data set {name!r} ({manifest.name}): {target.quantity} without a unit (metric: false)"
    if kind == "depth":
        raise ConfigError(f"{without_unit} cannot give depth in metres; use it for a stage that learns disparity")
    if depth_range is not None:
        raise ConfigError(f"{without_unit} cannot be held to depth_range={depth_range} in metres; leave it out")
    return target


def labels_manifest(config: DatasetConfig, images: Manifest) -> Manifest:
    """The manifest that holds the labels: the images' own, or those of its `labels`; ConfigError if not of them."""
    if config.labels is None:
        return images
    if not is_remote(config.labels) and not Path(config.labels).is_file():
        raise ConfigError(f"labels={config.labels}: no such file; `depthkit label` writes it when all shards are done")
    labels = load_manifest(config.labels)
    check_labels_belong(labels, images, shown(config.labels), shown(config.manifest))
    return labels


def check_labels_belong(labels: Manifest, images: Manifest, labels_path: Path | str, images_path: Path | str) -> None:
    """ConfigError unless `labels` are pseudo-labels of exactly these images."""
    made_from = labels.labels_of
    if made_from is None:
        raise ConfigError(f"{labels_path} is not a pseudo-label set: it does not say which images it labels")
    if made_from.images_digest != images.digest():
        raise ConfigError(
            f"{labels_path} labels {made_from.images!r} with digest {made_from.images_digest[:12]}, but {images_path} "
            f"is {images.name!r} with digest {images.digest()[:12]}: label these images, or name the right manifest"
        )
    for label, image in zip_longest(labels.shards, images.shards):
        belongs = label and image and (label.path, label.num_samples) == (label_path(image.path), image.num_samples)
        if not belongs:
            found, wanted = (f"{s.path} of {s.num_samples} samples" if s else "nothing" for s in (label, image))
            raise ConfigError(
                f"{labels_path} does not match {images_path} shard for shard: {found} in the place of {wanted}; "
                "run `depthkit label` with stage.verify=true"
            )


def selected_samples(config: DatasetConfig, images: Manifest, labels: Manifest) -> list[np.ndarray]:
    """The indices that `config.selection` keeps of every shard; ConfigError unless it is of these images and labels."""
    path = Path(str(config.selection))
    selection = load_selection(path, images, None if config.labels is None else labels)
    return [kept_samples(selection, label_path(shard.path), shard.num_samples) for shard in images.shards]


def keep_shards(manifest: Manifest, kept: list[np.ndarray]) -> Manifest:
    """The manifest without the shards of which nothing is kept."""
    shards = zip(manifest.shards, kept, strict=True)
    return replace(manifest, shards=tuple(shard for shard, samples in shards if len(samples)))


def label_path(image_shard: str) -> str:
    """The path of the label shard that belongs to an image shard; of a URL, the name of its tar."""
    return TAR_NAME.findall(image_shard)[-1] if is_remote(image_shard) else image_shard
