"""The LightningDataModule of every training stage."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from depthkit.config import AugmentConfig, DataConfig, DatasetConfig
from depthkit.data.cache import ShardCache
from depthkit.data.clips import ClipReader, clip_span
from depthkit.data.first_samples import check_cameras, check_poses
from depthkit.data.procedural import WorldSpec, write_world
from depthkit.data.quarantine import SampleError
from depthkit.data.read_ahead import ReadAhead
from depthkit.data.reader import DatasetReader
from depthkit.data.streams import StepSampler, Stream, StreamDataset, collate, collate_streams
from depthkit.data.transforms import cutmix
from depthkit.data.windows import normalize
from depthkit.data.workers import answer_to_the_parent_alone
from depthkit.types import Batch, Kind, Rejection


class DepthDataModule(L.LightningDataModule):
    """Batches `{"labeled": Batch, "unlabeled": Batch}`, the ratio exact on every rank; whole images to validate.

    `num_steps` counts batches. Training targets are in `target_kind`; None reads images alone. Validation images keep
    their aspect: shorter side as the crop, sides multiples of `multiple`; their targets are depth in metres. Validation
    clips, whose batches have images (1, T, 3, H, W), come after all single images. Remote shards are fetched into
    `cache`, those of the next steps in the background. With `needs_camera` an image of unknown focal length is broken;
    with `learns_normals` one of the labeled data sets must know its cameras.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        num_steps: int,
        multiple: int,
        target_kind: Kind | None = "disparity",
        limit_val: int | None = None,
        cache: ShardCache | None = None,
        needs_camera: bool = False,
        learns_normals: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.num_steps = num_steps
        self.multiple = multiple
        self.target_kind = target_kind
        self.limit_val = limit_val
        self.cache = cache
        self.needs_camera = needs_camera
        self.learns_normals = learns_normals

    def prepare_data(self) -> None:
        for group in (self.config.labeled, self.config.unlabeled, self.config.val, self.config.val_clips):
            render_missing(group)

    def setup(self, stage: str) -> None:
        """ConfigError where the first samples say that a metric or a loss would have nothing to work with."""
        if stage != "fit":
            return
        if self.learns_normals:
            readers = [DatasetReader(name, each, None, self.cache) for name, each in self.config.labeled.items()]
            check_cameras(readers)
        for reader in val_readers(self.config, self.cache):
            if isinstance(reader, ClipReader):
                check_poses(reader)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        return self.train_loader(
            start_step=trainer.global_step * trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def train_loader(self, *, start_step: int = 0, rank: int = 0, world_size: int = 1) -> DataLoader:
        """This rank's part of the batches from `start_step` on, whatever the workers and earlier interruptions."""
        streams = build_streams(self.config, self.target_kind, self.seed, self.cache, self.needs_camera)
        sampler = StepSampler(
            {name: stream.images_per_step for name, stream in streams.items()},
            num_steps=self.num_steps,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
        )
        dataset = ReadAhead(StreamDataset(streams), num_steps=self.num_steps)
        return self._loader(dataset, batch_sampler=sampler, collate_fn=collate_streams)

    def val_dataloader(self) -> DataLoader | list[Any]:
        if not self.config.val and not self.config.val_clips:
            return []
        readers = val_readers(self.config, self.cache, self.needs_camera)
        dataset = WholeImages(
            readers, short_side=min(self.config.crop_size), multiple=self.multiple, limit=self.limit_val
        )
        assert self.trainer is not None
        # Every rank takes its own images and none is padded, so the mean is over each image once.
        indices = range(self.trainer.global_rank, len(dataset), self.trainer.world_size)
        return self._loader(dataset, sampler=indices, batch_size=None)

    def _loader(self, dataset: Dataset, **arguments: Any) -> DataLoader:
        num_workers = self.config.num_workers
        return DataLoader(
            dataset,
            num_workers=num_workers,
            persistent_workers=num_workers > 0 and "batch_sampler" in arguments,
            pin_memory=torch.cuda.is_available(),
            # Workers decode; the threads of the main process belong to the model.
            worker_init_fn=single_thread if num_workers else None,
            **arguments,
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, Tensor):
            return batch.to(device, non_blocking=True)
        if isinstance(batch, dict):
            return {name: self.transfer_batch_to_device(value, device, dataloader_idx) for name, value in batch.items()}
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise, and CutMix where the loader drew boxes, on the device."""
        if isinstance(batch, Rejection):
            return batch
        for part in [batch] if "image" in batch else batch.values():
            part["image"] = normalize(part["image"])
        if "unlabeled" in batch and self.config.augment.cutmix:
            batch["unlabeled"]["cutmix_region"] = cutmix(batch["unlabeled"])
        return batch


class WholeImages(Dataset):
    """Every image or clip of some data sets once, uncropped, as a `Batch` of one; a `Rejection` where it is broken."""

    def __init__(
        self, readers: Sequence[DatasetReader | ClipReader], *, short_side: int, multiple: int, limit: int | None = None
    ) -> None:
        self.readers = readers
        self.short_side = short_side
        self.multiple = multiple
        self.places = [place for reader in enumerate(readers) for place in spread(every_place(*reader), limit)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch | Rejection:
        dataset, shard, sample = self.places[index]
        reader = self.readers[dataset]
        try:
            return collate([reader.read_whole(shard, sample, short_side=self.short_side, multiple=self.multiple)])
        except SampleError as error:
            return reader.rejection(shard, sample, error)


def val_readers(
    config: DataConfig, cache: ShardCache | None = None, needs_camera: bool = False
) -> list[DatasetReader | ClipReader]:
    """Readers of `data.val` and, after them, of `data.val_clips`: images and poses of clips that share no frame."""
    length = {"num_frames": config.val_clip_frames, "stride": config.clip_stride}
    return [
        *(DatasetReader(name, dataset, "depth", cache, needs_camera) for name, dataset in config.val.items()),
        *(
            ClipReader(name, dataset, None, cache, **length, every=clip_span(**length))
            for name, dataset in config.val_clips.items()
        ),
    ]


def every_place(dataset: int, reader: DatasetReader | ClipReader) -> list[tuple[int, int, int]]:
    """(data set, shard, sample) of every sample of a reader."""
    return [(dataset, shard, sample) for shard, size in enumerate(reader.shard_sizes) for sample in range(size)]


def spread(places: list[tuple[int, int, int]], limit: int | None) -> list[tuple[int, int, int]]:
    """At most `limit` of `places`, evenly spread; all for None."""
    if limit is None or limit >= len(places):
        return places
    return [places[i * len(places) // limit] for i in range(limit)]


def build_streams(
    config: DataConfig,
    target_kind: Kind | None,
    seed: int,
    cache: ShardCache | None = None,
    needs_camera: bool = False,
) -> dict[str, Stream]:
    """The training streams that have data sets, by name."""
    streams = {}
    clips = partial(ClipReader, num_frames=config.clip_frames or 0, stride=config.clip_stride)
    images = partial(DatasetReader, needs_camera=needs_camera)
    for name, images_per_step in config.images_per_step().items():
        group: Mapping[str, DatasetConfig] = getattr(config, name)
        read = clips if name == "unlabeled" and config.clip_frames else images
        if group:
            streams[name] = Stream(
                name,
                [read(key, dataset, target_kind, cache) for key, dataset in group.items()],
                [dataset.weight for dataset in group.values()],
                images_per_step=images_per_step,
                crop_size=(config.crop_size[0], config.crop_size[1]),
                augment=config.augment if name == "unlabeled" else weak(config.augment),
                seed=seed,
                shuffle_block=config.shuffle_block,
                balanced=config.balanced,
            )
    return streams


def weak(augment: AugmentConfig) -> AugmentConfig:
    """What labeled images get: the horizontal flip (V1 section 4) and, if asked, another camera."""
    return AugmentConfig(horizontal_flip=augment.horizontal_flip, camera=augment.camera)


def render_missing(group: Mapping[str, DatasetConfig]) -> None:
    """Render the procedural data sets of `group` that are not on disk yet."""
    for dataset in group.values():
        if dataset.world is not None:
            settings = asdict(dataset.world) | {"size": tuple(dataset.world.size)}
            del settings["root"]
            world = WorldSpec(**settings)
            write_world(Path(dataset.manifest).parent, world)


def single_thread(worker: int) -> None:
    import cv2

    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    answer_to_the_parent_alone()
