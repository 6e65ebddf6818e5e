"""Watching training steps without waiting for the device, and writing down the samples of those that went wrong."""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from depthkit.files import atomic_write
from depthkit.runtime.loss_means import STREAMS
from depthkit.types import Batch


@dataclass
class Step:
    """What one optimizer step read and gave on this rank, over all the batches that it accumulates."""

    number: int  # optimizer steps done before it
    names: list[dict[str, str]] = field(default_factory=list)  # of every sample: stream, data set, shard, key
    image_losses: list[tuple[int, str, Tensor]] = field(default_factory=list)  # first sample, part, (images,)

    def add(self, batch: Mapping[str, Batch], image_losses: Mapping[str, Tensor]) -> None:
        first = {}
        for stream, part in batch.items():
            first[stream] = len(self.names)
            shards = part.get("shard", [""] * len(part["key"]))
            self.names += [
                {"stream": stream, "dataset": dataset, "shard": shard, "key": key}
                for dataset, shard, key in zip(part["dataset"], shards, part["key"], strict=True)
            ]
        self.image_losses += [(first[STREAMS[name]], name, values) for name, values in image_losses.items()]

    def samples(self) -> list[dict[str, Any]]:
        """The samples with each part of their losses; one that is not finite as text: JSON has no such number."""
        samples: list[dict[str, Any]] = [{**names, "losses": {}} for names in self.names]
        for first, part, values in self.image_losses:
            for sample, value in zip(samples[first:], values.tolist(), strict=False):
                sample["losses"][part] = value if math.isfinite(value) else str(value)
        return samples


class StepWatcher(L.Callback):
    """Base of the callbacks that judge every step by some numbers on the device, `measure`.

    The numbers are read all at once, every `trainer.log_every_n_steps` steps, before a checkpoint is written and at
    the end, so that no step waits for the device.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = Path(run_dir)
        self._trainer: L.Trainer | None = None
        self._step: Step | None = None
        self._losses: list[Tensor] = []
        self._waiting: list[tuple[Step, Tensor]] = []

    def measure(self, trainer: L.Trainer, losses: Tensor) -> Tensor:
        """Numbers (n,) on the device about the step just done; `losses` are its batches' shares of its loss."""
        raise NotImplementedError

    def judge(self, trainer: L.Trainer, step: Step, numbers: list[float]) -> None:
        raise NotImplementedError

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: dict[str, Batch], batch_idx: int
    ) -> None:
        number, batch_of_step = divmod(batch_idx, trainer.accumulate_grad_batches)
        if self._step is None or batch_of_step == 0:
            self._step, self._losses = Step(number), []
        self._step.add(batch, outputs.get("image_losses", {}))
        self._losses.append(outputs["loss"])
        if batch_of_step == trainer.accumulate_grad_batches - 1:
            self._waiting.append((self._step, self.measure(trainer, torch.stack(self._losses))))
            if (number + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
                self.look(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look(trainer)

    def state_dict(self) -> dict[str, Any]:
        assert self._trainer is not None
        self.look(self._trainer)
        return {}

    def look(self, trainer: L.Trainer) -> None:
        """Judge the steps that wait for it."""
        if self._waiting:
            rows = torch.stack([numbers for _, numbers in self._waiting]).tolist()
            steps = [step for step, _ in self._waiting]
            self._waiting.clear()
            for step, row in zip(steps, rows, strict=True):
                self.judge(trainer, step, row)

    def report(self, trainer: L.Trainer, step: Step, problem: str, **facts: Any) -> Path:
        """Write the step's samples on this rank to `run_dir/bad_steps/step-STEP-RANK.json`."""
        folder = self.run_dir / "bad_steps"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step.number:08d}-rank-{trainer.global_rank:05d}.json"
        content = {
            "step": step.number,
            "problem": problem,
            **facts,
            "rank": trainer.global_rank,
            "world_size": trainer.world_size,
            "reproduce": reproduce(self.run_dir, step.number),
            "samples": step.samples(),
        }
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, allow_nan=False).encode())
        return path


def reproduce(run_dir: Path, step: int) -> str:
    """The command that computes the step's losses again."""
    return f"depthkit replay {shlex.quote(str(run_dir))} --step {step}"
