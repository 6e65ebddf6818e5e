"""Stage 2: a teacher labels clean unlabeled images. One image shard gives one label shard with the same keys."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from depthkit.data.label_images import ImageGroup, LabelBatch
from depthkit.data.labeling import LabelShards
from depthkit.data.uncertainty import Quality
from depthkit.data.windows import normalize
from depthkit.ensembling import Views, combine, predict_views
from depthkit.models import DepthModel

MAX_BATCHES_BEHIND = 4
"""Predicted batches that wait for the writers before the forward pass waits for them: bounds the memory."""


class Stopwatch:
    """Times what `device` does, without making a GPU and its program wait for each other."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.Event("cuda", enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._start = self._end = 0.0
        if self._events:
            self._events[0].record()
        else:
            self._start = time.perf_counter()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        else:
            self._end = time.perf_counter()

    def wait(self) -> float:
        """Seconds from start to stop, once the device has got there."""
        if not self._events:
            return self._end - self._start
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000


class Labels(NamedTuple):
    """Disparity (n, H, W) float32 in the memory of the host, whole once `watch.wait()` returns.

    `uncertainty` (n, H, W) and `disagreement` (n,) are those of the ensemble, None for a single view.
    """

    values: Tensor
    watch: Stopwatch
    uncertainty: Tensor | None = None
    disagreement: Tensor | None = None


class PseudoLabelModule(L.LightningModule):
    """Predicts disparity for batches of images, the mean over `views`. Sky, where it is known, is 0.

    `find_sky` gives sky masks (B, H, W) of images (B, 3, H, W) uint8, for images that came without one.
    """

    def __init__(
        self,
        model: DepthModel,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        views: Views,
        find_sky: Callable[[Tensor], Tensor] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.mean = mean
        self.std = std
        self.views = views
        self.find_sky = find_sky
        if compile:
            self.model.compile(dynamic=True)

    def predict_step(self, batch: LabelBatch, batch_idx: int) -> Labels:
        watch = Stopwatch(self.device)
        images, sky = batch.group.images, batch.group.sky
        if sky is None and self.find_sky is not None:
            sky = self.find_sky(images)
        values, quality = self._predict(normalize(images, self.mean, self.std), sky)
        on_host = [_to_host(each) for each in (values, *quality)]
        watch.stop()
        return Labels(on_host[0], watch, *on_host[1:])

    def _predict(self, images: Tensor, sky: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Values of normalised images and, for several views, their uncertainty and disagreement."""
        found = predict_views(lambda seen: self.model(seen).values, images, self.views, self.model.encoder.multiple)
        if len(found) > 1:
            values, *quality = combine(found, torch.ones_like(found[0], dtype=torch.bool) if sky is None else ~sky)
            return values, tuple(quality)
        return found[0] if sky is None else found[0].masked_fill(sky, 0.0), ()

    def transfer_batch_to_device(self, batch: LabelBatch, device: torch.device, dataloader_idx: int) -> LabelBatch:
        indices, images, sky = batch.group
        moved = (None if each is None else _to_device(each, device) for each in (images, sky))
        return batch._replace(group=ImageGroup(indices, *moved))  # type: ignore[arg-type]


def _to_host(tensor: Tensor) -> Tensor:
    on_host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return on_host.copy_(tensor, non_blocking=True)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class WriteLabels(BasePredictionWriter):
    """Encodes and writes labels in threads while the next batches are predicted.

    `num_images` and `forward_seconds` count what was predicted and how long the device took for it.
    """

    def __init__(self, shards: LabelShards, *, num_threads: int) -> None:
        super().__init__(write_interval="batch")
        self.shards = shards
        self.num_images = 0
        self.forward_seconds = 0.0
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="labels")
        self._behind: deque[tuple[Stopwatch, list[Future]]] = deque()

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Labels,
        batch_indices: object,
        batch: LabelBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        indices = batch.group.indices
        futures = [self._pool.submit(self._write, prediction, batch.shard, *place) for place in enumerate(indices)]
        self._behind.append((prediction.watch, futures))
        self.num_images += len(indices)
        if len(self._behind) > MAX_BATCHES_BEHIND:
            self._finish_oldest()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        while self._behind:
            self._finish_oldest()

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _write(self, labels: Labels, shard: int, row: int, index: int) -> None:
        labels.watch.wait()
        if labels.uncertainty is None or labels.disagreement is None:
            self.shards.write(shard, index, labels.values[row].numpy())
            return
        quality = Quality(labels.uncertainty[row].numpy(), float(labels.disagreement[row]))
        self.shards.write(shard, index, labels.values[row].numpy(), quality)

    def _finish_oldest(self) -> None:
        watch, futures = self._behind.popleft()
        for future in futures:
            future.result()
        self.forward_seconds += watch.wait()
