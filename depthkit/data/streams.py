"""From a position in a stream to a sample, and from slots to batches: what runs in the loader's worker processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from depthkit.config import AugmentConfig
from depthkit.data.clips import ClipReader
from depthkit.data.order import BalancedOrder, Order, rank_slots
from depthkit.data.quarantine import SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.transforms import PhotometricPerturbation, draw_camera, sample_cutmix_box, take_again
from depthkit.data.windows import random_window
from depthkit.types import Batch, Rejection, Sample

MAX_ATTEMPTS = 16
"""Broken samples in a row at one position before the stream gives up; one in a hundred broken never reaches it."""


class Slot(NamedTuple):
    """One sample of a batch: which stream, and the position in it."""

    stream: str
    position: int


class Stream:
    """An endless, shuffled, augmented sequence of samples from some data sets; a pure function of (seed, position)."""

    def __init__(
        self,
        name: str,
        readers: Sequence[DatasetReader | ClipReader],
        weights: Sequence[float],
        *,
        images_per_step: int,
        crop_size: tuple[int, int],
        augment: AugmentConfig,
        seed: int,
        shuffle_block: int,
        balanced: bool = False,
    ) -> None:
        self.name = name
        self.readers = readers
        self.images_per_step = images_per_step
        self.crop_size = crop_size
        self.augment = augment
        # Streams differ in their random numbers, whatever else they share.
        self.seed = int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0])
        self.perturb = PhotometricPerturbation(augment)
        shard_sizes = [reader.shard_sizes for reader in readers]
        lanes = {"num_lanes": images_per_step, "seed": self.seed, "shuffle_block": shuffle_block}
        self.order = BalancedOrder(shard_sizes, **lanes) if balanced else Order(shard_sizes, weights, **lanes)

    def generator(self, position: int) -> np.random.Generator:
        """The random numbers of one position: camera, window, flip, perturbation, CutMix box, in this order."""
        return np.random.default_rng([self.seed, position])

    def load(self, position: int) -> tuple[Sample, tuple[int, int, int, int]]:
        """The sample at `position` and its CutMix box. A broken sample gives way to the next one of its lane."""
        generator = self.generator(position)
        camera = draw_camera(self.augment.camera, generator)
        rejections: list[Rejection] = []
        for attempt in range(MAX_ATTEMPTS):
            location = self.order.locate(position + attempt * self.images_per_step)
            reader = self.readers[location.dataset]
            try:
                sample = reader.read(
                    location.shard,
                    location.sample,
                    lambda size: random_window(
                        size,
                        self.crop_size,
                        generator,
                        flip_probability=self.augment.horizontal_flip,
                        zoom=camera.zoom,
                    ),
                )
            except SampleError as error:
                rejections.append(reader.rejection(location.shard, location.sample, error))
                continue
            take_again(sample, camera, reader.kind)
            sample.image = self.perturb(sample.image, generator)
            sample.rejections = rejections
            return sample, sample_cutmix_box(self.crop_size, self.augment, generator)
        keys: dict[str, list[str]] = {}
        for rejection in rejections:
            keys.setdefault(rejection.reason, []).append(f"{rejection.shard} {rejection.key}")
        others = {why: f" and {len(found) - 1} more" if len(found) > 1 else "" for why, found in keys.items()}
        reasons = "\n".join(f"  {found[0]}{others[why]}: {why}" for why, found in keys.items())
        raise SampleError(f"{MAX_ATTEMPTS} samples in a row are broken in stream {self.name}:\n{reasons}")


class StreamDataset(Dataset[Any]):
    """Map-style over slots, so that the plain DataLoader does the rest with any number of workers."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = dict(streams)

    def __getitem__(self, slot: Slot) -> tuple[str, Sample, tuple[int, int, int, int]]:
        return (slot.stream, *self.streams[slot.stream].load(slot.position))


class StepSampler(Sampler[list[Slot]]):
    """The slots of this rank for every step from `start_step` to `num_steps`: the whole state of the data is the step.

    Its length is `num_steps`, counted from 0 like Lightning's batch index, also when it starts later.
    """

    def __init__(
        self,
        images_per_step: Mapping[str, int],
        *,
        num_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images_per_step = dict(images_per_step)
        self.num_steps = num_steps
        self.start_step = start_step
        self.slots = {name: rank_slots(count, rank, world_size) for name, count in images_per_step.items()}

    def __iter__(self) -> Iterator[list[Slot]]:
        for step in range(self.start_step, self.num_steps):
            yield [
                Slot(name, step * self.images_per_step[name] + slot)
                for name, slots in self.slots.items()
                for slot in slots
            ]

    def __len__(self) -> int:
        return self.num_steps


def collate_streams(items: Sequence[tuple[str, Sample, tuple[int, int, int, int]]]) -> dict[str, Batch]:
    """Loaded slots to one batch for each stream, slots in order."""
    streams = dict.fromkeys(name for name, _, _ in items)
    batches = {}
    for stream in streams:
        batch = collate([sample for name, sample, _ in items if name == stream])
        batch["cutmix_box"] = torch.tensor([box for name, _, box in items if name == stream])
        batches[stream] = batch
    return batches


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one size, or clips of one length, to a batch."""
    batch = Batch(
        image=torch.from_numpy(np.stack([sample.image for sample in samples])).movedim(-1, -3).contiguous(),
        target=torch.from_numpy(np.stack([sample.target for sample in samples])),
        valid_mask=torch.from_numpy(np.stack([sample.valid_mask for sample in samples])),
        intrinsics_px=torch.from_numpy(np.stack([sample.intrinsics_px for sample in samples])),
        key=[sample.key for sample in samples],
        dataset=[sample.dataset for sample in samples],
        shard=[sample.shard for sample in samples],
        rejections=[rejection for sample in samples for rejection in sample.rejections],
    )
    if batch["image"].ndim == 5:
        batch["camera_to_world"] = torch.from_numpy(np.stack([sample.camera_to_world for sample in samples]))
    return batch
