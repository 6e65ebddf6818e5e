"""Which sample stands at which position of a stream: a pure function of (seed, position).

A stream is endless. Step s of a run with B images a step reads the positions s B .. s B + B - 1; position p belongs to
*lane* p mod B, and a rank reads a contiguous range of lanes, so the sequence does not depend on the number of ranks or
workers, and a resumed run needs nothing but its step. One sweep visits every sample (times its data set's weight) once:

    sweep    the shards of all data sets, shuffled, form one line of samples, cut into B stretches, one for each lane:
             a rank touches only the shards of its own lanes
    lane     a stretch is shuffled in blocks of `shuffle_block` samples, which bounds the shards open at a time

Memory and start-up grow with the number of shards, not of samples. `BalancedOrder` gives each data set its own sweeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Location(NamedTuple):
    """Sample `sample` of shard `shard` of data set `dataset`, all indices."""

    dataset: int
    shard: int
    sample: int


@dataclass(frozen=True)
class Sweep:
    """One pass over the stream from position `start` on: runs of consecutive samples of a shard, in shuffled order."""

    start: int
    dataset: np.ndarray  # (runs,)
    shard: np.ndarray  # (runs,)
    first: np.ndarray  # (runs,) first sample of the run in its shard
    end: np.ndarray  # (runs,) cumulative number of samples
    lane_start: np.ndarray  # (lanes + 1,) where each lane's stretch begins in the line of samples


class Order:
    """Maps positions to samples. `shard_sizes[d][k]` is the number of samples in shard k of data set d.

    `weights[d]` scales how many samples of data set d a sweep holds; 1 for all is plain concatenation.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        num_lanes: int,
        seed: int,
        shuffle_block: int,
    ) -> None:
        self.shard_sizes = [np.asarray(sizes, dtype=np.int64) for sizes in shard_sizes]
        self.num_samples = [int(sizes.sum()) for sizes in self.shard_sizes]
        self.weights = list(weights)
        self.num_lanes = num_lanes
        self.seed = seed
        self.shuffle_block = shuffle_block
        # Methods are cached per instance: a loader asks for the same sweep and blocks again and again.
        self.sweep = lru_cache(maxsize=2)(self._plan_sweep)
        self.block_permutation = lru_cache(maxsize=4 * num_lanes)(self._permute_block)

    def __reduce__(self) -> tuple:
        arguments = (self.shard_sizes, self.weights, self.num_lanes, self.seed, self.shuffle_block)
        return _rebuild, arguments

    def sweep_start(self, sweep: int) -> int:
        """Position at which sweep number `sweep` begins."""
        return sum(self._samples_before(dataset, sweep) for dataset in range(len(self.weights)))

    def locate(self, position: int) -> Location:
        """The sample at `position` >= 0."""
        number = self._sweep_of(position)
        sweep = self.sweep(number)
        lane = position % self.num_lanes
        start, stop = sweep.lane_start[lane : lane + 2]
        index = position // self.num_lanes - _steps_before(sweep.start, lane, self.num_lanes)
        block, offset = divmod(index, self.shuffle_block)
        block_size = min(self.shuffle_block, int(stop - start) - block * self.shuffle_block)
        permutation = self.block_permutation(number, lane, block, block_size)
        sample = int(start) + block * self.shuffle_block + int(permutation[offset])
        run = int(np.searchsorted(sweep.end, sample, side="right"))
        before = int(sweep.end[run - 1]) if run else 0
        return Location(int(sweep.dataset[run]), int(sweep.shard[run]), int(sweep.first[run]) + sample - before)

    def _samples_before(self, dataset: int, sweep: int) -> int:
        return round(sweep * self.weights[dataset] * self.num_samples[dataset])

    def _sweep_of(self, position: int) -> int:
        mean = sum(w * n for w, n in zip(self.weights, self.num_samples, strict=True))
        # Below the sweep by up to the rounding of each data set's share.
        sweep = max(int((position - len(self.weights)) / mean), 0)
        while self.sweep_start(sweep + 1) <= position:
            sweep += 1
        return sweep

    def _plan_sweep(self, number: int) -> Sweep:
        bounds = [
            (self._samples_before(dataset, number), self._samples_before(dataset, number + 1))
            for dataset in range(len(self.weights))
        ]
        runs = np.concatenate([self._runs(dataset, *bound) for dataset, bound in enumerate(bounds)])
        runs = runs[np.random.default_rng([self.seed, 0, number]).permutation(len(runs))]
        start, stop = self.sweep_start(number), self.sweep_start(number + 1)
        lanes = np.arange(self.num_lanes)
        lane_sizes = _steps_before(stop, lanes, self.num_lanes) - _steps_before(start, lanes, self.num_lanes)
        return Sweep(
            start=start,
            dataset=runs[:, 0],
            shard=runs[:, 1],
            first=runs[:, 2],
            end=np.cumsum(runs[:, 3]),
            lane_start=np.concatenate([[0], np.cumsum(lane_sizes)]),
        )

    def _runs(self, dataset: int, begin: int, end: int) -> np.ndarray:
        """Samples `begin` to `end` of the endless repetition of one data set, each pass with its own order of shards.

        Returns (runs, 4): data set, shard, first sample, number of samples.
        """
        sizes, size = self.shard_sizes[dataset], self.num_samples[dataset]
        parts = [np.empty((0, 4), dtype=np.int64)]
        for repetition in range(begin // size, -(-end // size)):
            shards = np.random.default_rng([self.seed, 1, dataset, repetition]).permutation(len(sizes))
            stop = np.cumsum(sizes[shards]) + repetition * size
            start = stop - sizes[shards]
            first = np.maximum(begin - start, 0)
            count = np.minimum(stop, end) - start - first
            part = np.stack([np.full_like(shards, dataset), shards, first, count], axis=1)
            parts.append(part[count > 0])
        return np.concatenate(parts)

    def _permute_block(self, sweep: int, lane: int, block: int, size: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 2, sweep, lane, block]).permutation(size).astype(np.int32)


class BalancedOrder:
    """Every batch holds the same number of samples of each data set, whatever their sizes.

    Slot s of a batch is of data set s mod D, so that every rank with a multiple of D slots has as many of each. Each
    data set keeps an `Order` of its own and starts anew when it is through.
    """

    def __init__(self, shard_sizes: Sequence[Sequence[int]], *, num_lanes: int, seed: int, shuffle_block: int) -> None:
        self.num_lanes = num_lanes
        self.shuffle_block = shuffle_block
        num_datasets = len(shard_sizes)
        if num_lanes % num_datasets:
            raise ValueError(f"a batch of {num_lanes} images cannot hold as many of each of {num_datasets} data sets")
        seeds = np.random.SeedSequence(seed).generate_state(num_datasets).tolist()
        self.orders = [
            Order([sizes], [1.0], num_lanes=num_lanes // num_datasets, seed=own_seed, shuffle_block=shuffle_block)
            for sizes, own_seed in zip(shard_sizes, seeds, strict=True)
        ]

    def locate(self, position: int) -> Location:
        """The sample at `position` >= 0."""
        own_position, dataset = divmod(position, len(self.orders))
        return self.orders[dataset].locate(own_position)._replace(dataset=dataset)


def _steps_before(position, lane, num_lanes: int):  # type: ignore[no-untyped-def]
    """How many positions below `position` belong to `lane` (an int or an array of lanes)."""
    return position // num_lanes + (position % num_lanes > lane)


def _rebuild(
    shard_sizes: Sequence[Sequence[int]], weights: Sequence[float], num_lanes: int, seed: int, shuffle_block: int
) -> Order:
    return Order(shard_sizes, weights, num_lanes=num_lanes, seed=seed, shuffle_block=shuffle_block)


def rank_slots(batch_size: int, rank: int, world_size: int) -> range:
    """The slots of a batch, and so the lanes, that `rank` reads: a contiguous range, the same number on every rank."""
    if batch_size % world_size:
        raise ValueError(f"a batch of {batch_size} images cannot be split evenly over {world_size} ranks")
    per_rank = batch_size // world_size
    return range(rank * per_rank, (rank + 1) * per_rank)
