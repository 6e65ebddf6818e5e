"""`summary.json` of a run: what it is, how far it came, what it used and what came out."""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from depthkit.evaluation.protocols import protocol_id
from depthkit.evaluation.settings import ProtocolConfig
from depthkit.files import atomic_write
from depthkit.runtime.checkpoint import Checkpoints
from depthkit.runtime.console import WORDS, describe_metrics
from depthkit.runtime.meter import Meter, samples_seen, val_metrics
from depthkit.runtime.throughput import Usage, peak_memory_gib

WRITE_EVERY = 30.0
"""Seconds: how much of the time of a killed run is not in the sums of the run that goes on from it."""


class RunSummary(L.Callback):
    """Keeps `path` up to date while the run goes on, so that it also tells of one that was killed.

    `status` is `running` (also after a kill), `stopped` with the reason, or `finished` when the bundle is there. Hours
    and images are summed over all continuations, lost work included; the first rank writes.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], meter: Meter) -> None:
        self.path = path
        self.facts = dict(facts)
        self.meter = meter
        self._last_write = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.facts["devices"] = describe_devices(trainer)
        self.write(trainer, status="running")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if time.monotonic() - self._last_write >= WRITE_EVERY:
            self.write(trainer, status="running")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:
            self.write(trainer, status="stopped", reason="before the last step, as asked")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.write(trainer, status="stopped", reason=f"{type(exception).__name__}: {exception}".removesuffix(": "))

    def finish(self, trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
        """The bundle is written: keep its metrics, and print the main lines."""
        content = self.write(trainer, status="finished", metrics=dict(metrics))
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.print("\n".join(main_lines(content, self.path)))

    def write(self, trainer: L.Trainer, **facts: Any) -> dict[str, Any]:
        """Write the file; its content."""
        self._last_write = time.monotonic()
        content = {**self.facts, **self.results(trainer), **facts}
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(content, indent=2).encode() + b"\n")
        return content

    def results(self, trainer: L.Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        usage = self.meter.usage_now(trainer.world_size)
        memory = "peak_memory_gib" if device.type == "cuda" else "peak_host_memory_gib"
        return {
            "steps": trainer.global_step,
            "max_steps": trainer.max_steps,
            "samples_seen": samples_seen(trainer),
            "starts": usage.starts,
            "seconds": usage.seconds,
            **usage.hours(device),
            **usage.rates(),
            memory: self.meter.row.get(f"throughput/{memory}", peak_memory_gib(device)),
            "quarantine": count_rejected(self.path.parent / "quarantine"),
            "best_checkpoint": best_checkpoint(trainer),
            "metrics": val_metrics(trainer),
            "usage": asdict(usage),
        }


def finish(trainer: L.Trainer, metrics: Mapping[str, float]) -> None:
    """Tell the callbacks that end with the run, not with the training: the bundle is written."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "finish"):
            callback.finish(trainer, metrics)


def used_before(path: Path) -> Usage:
    """What earlier starts of the run used, from its summary; nothing if there is none."""
    try:
        return Usage(**json.loads(path.read_text())["usage"])
    except FileNotFoundError:
        return Usage()
    except (ValueError, KeyError, TypeError) as error:
        L.pytorch.utilities.rank_zero_warn(f"{path} is not readable ({error}): hours are counted from here on")
        return Usage()


# --- the parts -------------------------------------------------------------------------------------------------------


def best_checkpoint(trainer: L.Trainer) -> dict[str, Any] | None:
    """Path, metric with its protocol, and value of the best checkpoint that a validation metric has chosen so far."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints) and callback.best_model_score is not None:
            protocol = trainer.lightning_module.protocol
            assert isinstance(protocol, ProtocolConfig)
            metric = f"val/{protocol_id(protocol)}/{callback.best_metric}"
            return {"path": callback.best_model_path, "metric": metric, "value": callback.best_model_score}
    return None


def count_rejected(folder: Path) -> dict[str, int]:
    """Broken samples by data set, each once however often a continued run met it again."""
    lines = (json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines())
    samples = {(each["dataset"], each["shard"], each["key"]) for each in lines}
    return dict(Counter(dataset for dataset, _, _ in sorted(samples)))


def describe_devices(trainer: L.Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{trainer.world_size} x {name}"


def main_lines(content: Mapping[str, Any], path: Path) -> list[str]:
    """What a person wants to know when a run has ended."""
    hours = next(f"{content[name]:.3g} {name.replace('_', '-')}" for name in HOURS if name in content)
    rates = [text.format(content[name]) for name, text in WORDS.items() if name in content]
    lines = [f"{content['status']}: {content['steps']} steps, {content['samples_seen']} images, {hours}"]
    lines.append("  " + ", ".join(rates))
    if content["metrics"]:
        lines.append(f"  {describe_metrics(content['metrics'])}")
    if best := content["best_checkpoint"]:
        lines.append(f"  best checkpoint {best['path']}: {best['metric']} {best['value']:.4g}")
    if content["quarantine"]:
        counts = ", ".join(f"{count} of {dataset}" for dataset, count in content["quarantine"].items())
        lines.append(f"  broken samples: {counts}; reasons in {path.parent / 'quarantine'}")
    return [*lines, f"  {path}"]


HOURS = ("gpu_hours", "process_hours")
