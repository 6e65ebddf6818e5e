"""Fetching the remote shards of the next steps in the background, while those of the current ones are read."""

import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from queue import PriorityQueue
from typing import Any

from torch.utils.data import Dataset

from depthkit.data.shards import ShardReader
from depthkit.data.streams import Slot, StreamDataset

NUM_THREADS = 2
"""Downloads at a time in one loader process, besides the one that the process itself may wait for."""
AGAIN = 30.0
"""Seconds until a shard is asked for again, should it have been evicted or its download have failed."""


class Prefetcher:
    """Fetches shards into their reader's cache, the one that is needed first first.

    What fails here is no error: whoever needs the shard tries again. Threads start with the first request and do not
    keep the process from ending. Only shards that nobody used since the request are evicted for one that is fetched
    ahead, so a small cache keeps what is being read.
    """

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[int, int, ShardReader, int, float]] = PriorityQueue()
        self._not_before: dict[tuple[int, int], float] = {}
        self._threads: list[threading.Thread] = []

    def __reduce__(self) -> tuple:
        return Prefetcher, ()

    def request(self, reader: ShardReader, shard: int, needed_at: int) -> None:
        """Fetch shard number `shard` of a reader, if it is remote, before those with a larger `needed_at`."""
        key, now = (id(reader), shard), time.monotonic()
        if not reader.is_remote(shard) or now < self._not_before.get(key, 0.0):
            return
        if reader.cache.touch(reader.manifest.shards[shard]):
            self._not_before[key] = now + AGAIN
            return
        self._not_before[key] = math.inf  # until it was tried
        self._queue.put((needed_at, time.monotonic_ns(), reader, shard, time.time()))
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(NUM_THREADS)]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while True:
            _, _, reader, shard, asked = self._queue.get()
            with suppress(Exception):
                url, facts = str(reader.location(shard)), reader.manifest.shards[shard]
                reader.cache.fetch(url, facts, unused_since=asked, wait=False)
            self._not_before[id(reader), shard] = time.monotonic() + AGAIN


class ReadAhead(Dataset[Any]):
    """The samples of a `StreamDataset`; the shards of a lane are fetched one shuffled block before they are read.

    All shards of a batch are asked for before its first sample is read, so a run also starts in parallel.
    """

    def __init__(self, dataset: StreamDataset, *, num_steps: int) -> None:
        self.dataset = dataset
        self.num_steps = num_steps
        self.prefetcher = Prefetcher()

    def __getitems__(self, slots: Sequence[Slot]) -> list[Any]:
        for slot in slots:
            self._request(slot.stream, slot.position)
        for slot in slots:
            order = self.dataset.streams[slot.stream].order
            self._request(slot.stream, slot.position + order.shuffle_block * order.num_lanes)
        return [self.dataset[slot] for slot in slots]

    def _request(self, name: str, position: int) -> None:
        stream = self.dataset.streams[name]
        step = position // stream.images_per_step
        if step >= self.num_steps:
            return
        location = stream.order.locate(position)
        reader = stream.readers[location.dataset]
        for shards in filter(None, (reader.images, reader.labels)):
            self.prefetcher.request(shards, location.shard, step)
