"""Which data sets, in which crops and batches, under which perturbations."""

from dataclasses import dataclass, field
from pathlib import PurePath

from omegaconf import MISSING

from depthkit.errors import check


@dataclass(kw_only=True)
class WorldConfig:
    """A procedural data set, rendered when its manifest is not there yet (`data/procedural.py`)."""

    root: str | None = None  # folder that it is rendered into; a data set elsewhere is another one; null: any folder
    domain: str = MISSING  # source | target
    split: str = MISSING  # train | val | test: different scenes
    num_images: int = MISSING
    size: list[int] = field(default_factory=lambda: [96, 128])  # height, width in pixels
    seed: int = 0
    labeled: bool = True  # False: images alone
    num_frames: int = 1  # images of each scene, a clip; num_images counts all of them
    frame_step: int = 1  # places on the path of the camera between two of them, of 2 to 30 cm
    indoor_share: float | None = None  # of the scenes that are rooms; null: that of the domain, 0.4

    def __post_init__(self) -> None:
        check(self.domain in ("source", "target"), "world.domain", self.domain, "source or target")
        check(self.num_frames > 0, "world.num_frames", self.num_frames, "> 0")
        check(self.frame_step > 0, "world.frame_step", self.frame_step, "> 0")
        share = self.indoor_share
        check(share is None or 0 <= share <= 1, "world.indoor_share", share, "0 to 1, or null")
        allowed = f"> 0, a multiple of world.num_frames={self.num_frames}"
        check(
            self.num_images > 0 and self.num_images % self.num_frames == 0, "world.num_images", self.num_images, allowed
        )


@dataclass(kw_only=True)
class DatasetConfig:
    """How to use one data set; what it is stands in its manifest."""

    manifest: str = MISSING  # path or URL of the manifest; shards are found beside it
    labels: str | None = None  # path or URL of a pseudo-label manifest for these images
    selection: str | None = None  # path of a file by `depthkit select`: train on its samples alone
    weight: float = 1.0  # samples per sweep relative to the data set's own size; 1 = plain concatenation
    depth_range: list[float] | None = None  # metres; pixels outside are not supervised
    world: WorldConfig | None = None  # render the data set when the manifest is missing

    def __post_init__(self) -> None:
        check(self.weight > 0, "dataset.weight", self.weight, "> 0 (drop a data set with '~data.labeled.NAME')")
        if self.depth_range is not None:
            low, high = self.depth_range
            check(0 <= low < high, "dataset.depth_range", self.depth_range, "[low, high] in metres, 0 <= low < high")
        # Settings that name another manifest inherit the world of the data set that they began with.
        if self.world and self.world.root is not None and PurePath(self.world.root) != PurePath(self.manifest).parent:
            self.world = None


@dataclass(kw_only=True)
class CameraAugmentConfig:
    """Another camera in another place, image and target alike; off as it stands. Ranges are uniform."""

    zoom: list[float] = field(default_factory=lambda: [1.0, 1.0])  # on top of covering the crop; depth is divided by it
    rotation: float = 0.0  # degrees, +- this
    color: float = 0.0  # probability of the three below, together
    gamma: list[float] = field(default_factory=lambda: [1.0, 1.0])  # exponent of the grey levels
    brightness: list[float] = field(default_factory=lambda: [1.0, 1.0])  # factor
    channel_gain: list[float] = field(default_factory=lambda: [1.0, 1.0])  # factor, another one for each channel

    def __post_init__(self) -> None:
        for name, lowest in (("zoom", 1.0), ("gamma", 0.0), ("brightness", 0.0), ("channel_gain", 0.0)):
            bounds = getattr(self, name)
            fits = len(bounds) == 2 and lowest <= bounds[0] <= bounds[1]
            check(fits, f"data.augment.camera.{name}", bounds, f"[low, high], {lowest:g} <= low <= high")
        check(0 <= self.rotation <= 90, "data.augment.camera.rotation", self.rotation, "0 to 90 degrees")
        check(0 <= self.color <= 1, "data.augment.camera.color", self.color, "a probability, 0 to 1")


@dataclass(kw_only=True)
class AugmentConfig:
    """Perturbations. Labeled images are flipped and, if asked, seen by another camera; the rest is for unlabeled."""

    horizontal_flip: float = 0.5  # probability, labeled and unlabeled
    camera: CameraAugmentConfig = field(default_factory=CameraAugmentConfig)  # labeled and unlabeled
    color_jitter: float = 0.0  # probability
    brightness: float = 0.5  # jitter factor drawn from 1 +- this
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.25  # shift in turns, +- this
    grayscale: float = 0.0  # probability
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])  # pixels, uniform
    cutmix: float = 0.0  # probability per image
    cutmix_area: list[float] = field(default_factory=lambda: [0.02, 0.4])  # share of the image, uniform
    cutmix_aspect: float = 0.3  # box height / width from this to its inverse

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "color_jitter", "grayscale", "blur", "cutmix"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"data.augment.{name}", value, "a probability, 0 to 1")
        check(0 <= self.hue <= 0.5, "data.augment.hue", self.hue, "0 to 0.5 turns")
        low, high = self.cutmix_area
        check(0 < low <= high <= 1, "data.augment.cutmix_area", self.cutmix_area, "[low, high], 0 < low <= high <= 1")
        check(0 < self.cutmix_aspect <= 1, "data.augment.cutmix_aspect", self.cutmix_aspect, "0 < aspect <= 1")


@dataclass(kw_only=True)
class DataConfig:
    labeled: dict[str, DatasetConfig] = field(default_factory=dict)
    unlabeled: dict[str, DatasetConfig] = field(default_factory=dict)
    val: dict[str, DatasetConfig] = field(default_factory=dict)
    val_clips: dict[str, DatasetConfig] = field(default_factory=dict)  # videos with poses, to judge motion by
    crop_size: list[int] = field(default_factory=lambda: [518, 518])  # height, width of a training crop
    batch_size: int = 1  # images per optimizer micro-step over all ranks, labeled and unlabeled together
    unlabeled_per_labeled: int = 2
    balanced: bool = False  # as many images of each data set in every batch, instead of by size and weight
    shuffle_block: int = 4096  # samples of a lane that are shuffled together: bounds the shards open at a time
    clip_frames: int | None = None  # unlabeled samples are clips of that many frames; null: single images
    clip_stride: int = 1  # frames of the video from one frame of a clip to the next
    val_clip_frames: int = 5  # frames of a clip of `val_clips`; 5 as SfMLearner measures ATE
    num_workers: int = 4  # loader processes per rank
    quarantine_budget: float = 0.01  # share of broken samples that ends the run
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check(len(self.crop_size) == 2, "data.crop_size", self.crop_size, "[height, width]")
        check(self.batch_size > 0, "data.batch_size", self.batch_size, "> 0")
        check(self.unlabeled_per_labeled > 0, "data.unlabeled_per_labeled", self.unlabeled_per_labeled, "> 0")
        check(self.shuffle_block > 0, "data.shuffle_block", self.shuffle_block, "> 0")
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, ">= 0")
        check(0 <= self.quarantine_budget < 1, "data.quarantine_budget", self.quarantine_budget, "a share, 0 to < 1")
        if self.labeled and self.unlabeled:
            part = 1 + self.unlabeled_per_labeled
            check(
                self.batch_size % part == 0,
                "data.batch_size",
                self.batch_size,
                f"a multiple of {part}, so that labeled:unlabeled is exactly 1:{self.unlabeled_per_labeled}",
            )

        if self.balanced:
            self._check_balance()
        if self.clip_frames is not None:
            self._check_clips(self.clip_frames)

    def _check_clips(self, clip_frames: int) -> None:
        allowed = "at least 2: one frame shows no motion; null for single images"
        check(clip_frames > 1, "data.clip_frames", clip_frames, allowed)
        check(self.val_clip_frames > 1, "data.val_clip_frames", self.val_clip_frames, "at least 2")
        check(self.clip_stride > 0, "data.clip_stride", self.clip_stride, "> 0")
        check(self.augment.cutmix == 0, "data.augment.cutmix", self.augment.cutmix, "0 with data.clip_frames")
        rotation = self.augment.camera.rotation
        check(rotation == 0, "data.augment.camera.rotation", rotation, "0 with data.clip_frames: it would be a motion")

    def _check_balance(self) -> None:
        for stream, count in self.images_per_step().items():
            datasets: dict[str, DatasetConfig] = getattr(self, stream)
            allowed = (
                f"such that its {count} {stream} images hold as many of each of {', '.join(datasets)} (data.balanced)"
            )
            check(not datasets or count % len(datasets) == 0, "data.batch_size", self.batch_size, allowed)
            for name, dataset in datasets.items():
                allowed = "1 with data.balanced=true, which gives every data set the same share"
                check(dataset.weight == 1, f"data.{stream}.{name}.weight", dataset.weight, allowed)

    def images_per_step(self) -> dict[str, int]:
        """Images of each stream in a batch over all ranks; a stream without data sets has 0."""
        if self.labeled and self.unlabeled:
            labeled = self.batch_size // (1 + self.unlabeled_per_labeled)
            return {"labeled": labeled, "unlabeled": self.batch_size - labeled}
        return {
            "labeled": self.batch_size if self.labeled else 0,
            "unlabeled": self.batch_size if self.unlabeled else 0,
        }
