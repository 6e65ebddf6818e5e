"""What this machine's GPU does with the training step, the labelling step and the loader: one table, under 8 minutes.

    python scripts/gpu_check.py                       # prints the table
    python scripts/gpu_check.py --out gpu.md          # and writes it, after every row, with hardware, date and commit
    python scripts/gpu_check.py --device cpu --tiny   # the same code on small numbers, in seconds

The step is the student's own, forward, backward and optimizer, on random images of 518 x 518 in bf16; batches grow
until the memory is full. MFU is against the fastest product of two large matrices that was measured here, not the data
sheet. A row that cannot be measured says why, and the next one follows.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from torch import nn

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig
from depthkit.data.label_images import ImageGroup, LabelBatch
from depthkit.data.windows import IMAGENET_MEAN, IMAGENET_STD
from depthkit.ensembling import Views
from depthkit.files import atomic_write
from depthkit.flops import forward_flops
from depthkit.models import build_model
from depthkit.optim import build_optimizer, parameter_groups
from depthkit.planning.memory import autocast
from depthkit.planning.step import bare_module, frozen_encoder, random_batch, smallest_batch
from depthkit.reporting import batch_flops
from depthkit.stages.pseudo_label import PseudoLabelModule

HEAD = "| what | images | ms | images/s | MFU | peak GiB | remark |\n| --- | --- | --- | --- | --- | --- | --- |"
TAPS = {"vits": "[8,9,10,11]", "vitb": "[8,9,10,11]", "vitl": "[20,21,22,23]"}
LABEL_SIZE = (518, 686)
COMPILE_SECONDS = 100.0
"""What is left of the time for a compiled row to be begun."""


class Timing(NamedTuple):
    seconds: float  # of one step, the median
    peak_gib: float | None


@dataclass
class Table:
    """Rows of markdown: printed, and written to `out`, as they are made."""

    title: str
    out: Path | None
    rows: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print(f"{self.title}\n\n{HEAD}", flush=True)

    def add(self, what: str, *cells: str, remark: str = "") -> None:
        row = " | ".join([what, *(cells or [""] * 5), remark])
        self.rows.append(f"| {row} |")
        print(self.rows[-1], flush=True)
        if self.out is not None:
            with atomic_write(self.out) as file:
                file.write("\n".join([self.title, "", HEAD, *self.rows, ""]).encode())


@dataclass
class Bench:
    device: torch.device
    tiny: bool
    deadline: float
    table: Table
    ceiling: float | None = None  # FLOP/s
    rates: dict[str, float] = field(default_factory=dict)  # best images/s of the training step by model

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def attempt(self, what: str, measure: Callable[[], None]) -> bool:
        """Whether `measure` came to its end; if not, a row says why."""
        if self.left() < 0:
            self.table.add(what, remark="not measured: the time is up")
            return False
        try:
            measure()
            return True
        except Exception as error:
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else describe(error)
            self.table.add(what, remark=f"not measured: {reason}")
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return False

    def time(self, step: Callable[[], Any], *, warm_up: int = 2, steps: int = 5) -> Timing:
        """The median of `steps` calls, after `warm_up` others; the device is waited for after each."""
        is_gpu = self.device.type == "cuda"
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(warm_up + steps):
            start = time.perf_counter()
            step()
            if is_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else None
        return Timing(statistics.median(seconds[warm_up:]), peak)

    def add(self, what: str, images: int, timing: Timing, flops: float, remark: str = "") -> None:
        rate = images / timing.seconds
        mfu = "" if self.ceiling is None else f"{rate * flops / self.ceiling:.1%}"
        peak = "" if timing.peak_gib is None else f"{timing.peak_gib:.1f}"
        self.table.add(what, str(images), f"{1000 * timing.seconds:.1f}", f"{rate:.1f}", mfu, peak, remark=remark)


def describe(error: Exception) -> str:
    """An error in one line of a table."""
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"[:160].replace("|", "/")


# --- what is measured ------------------------------------------------------------------------------------------------


def matrix_product(bench: Bench) -> None:
    """The ceiling: the best of some sizes of bf16 matrices."""
    for side in (128, 256) if bench.tiny else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        timing = bench.time(lambda a=a, b=b: a @ b, warm_up=3, steps=20)
        bench.ceiling = max(bench.ceiling or 0.0, 2 * side**3 / timing.seconds)
    remark = f"{(bench.ceiling or 0.0) / 1e12:.3g} TFLOP/s in bf16, the 100 % of MFU"
    bench.table.add("matrix product", remark=remark)


def student_config(bench: Bench, model: str) -> TrainConfig:
    settings = ["experiment=tiny_student"] if bench.tiny else ["experiment=da_v1_student", f"model={model}"]
    if not bench.tiny:
        settings.append(f"model.tap_layers={TAPS[model]}")
    config: TrainConfig = to_config(hydra.compose("train", [*settings, "trainer.precision=bf16-mixed"]))
    return config


def flops_per_image(config: TrainConfig, module: torch.nn.Module) -> float:
    return batch_flops(config, module) / sum(config.data.images_per_step().values())


def sweep(bench: Bench, model: str) -> None:
    """The training step with growing batches, until one does not fit or is no faster."""
    best = 0
    for factor in (1, 2) if bench.tiny else (2, 4, 8, 16, 32, 64):
        if not bench.attempt(f"train {model}", lambda factor=factor: train_row(bench, model, factor)):
            break
        if bench.rates[model] < 1.02 * best:
            break
        best = bench.rates[model]


def train_row(bench: Bench, model: str, factor: int, *, compiled: bool = False) -> None:
    config = student_config(bench, model)
    images = {name: factor * count for name, count in smallest_batch(config).items()}
    module = bare_module(config).to(bench.device)
    frozen_encoder(module).to(bench.device)
    optimizer = build_optimizer(parameter_groups(module.model, module.model.encoder, config.optim), config.optim)
    batch = random_batch(config, images, bench.device)
    flops = flops_per_image(config, module)
    if compiled:
        torch.compiler.reset()
        module.model.compile(backend="eager" if bench.tiny else "inductor")

    def step() -> None:
        with autocast("bf16-mixed", bench.device.type):
            loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    start = time.perf_counter()
    timing = bench.time(step)
    count = sum(images.values())
    remark = f"{time.perf_counter() - start - 7 * timing.seconds:.0f} s to compile" if compiled else ""
    name = f"train {model} compiled" if compiled else f"train {model}"
    bench.add(name, count, timing, flops, remark)
    bench.rates[model] = max(bench.rates.get(model, 0.0), count / timing.seconds)


def label_row(bench: Bench, model: str, count: int) -> None:
    """The labelling stage's own step: normalise, predict, bring to the host."""
    config = student_config(bench, model)
    size = (64, 80) if bench.tiny else LABEL_SIZE
    teacher = build_model(config.model).to(bench.device)
    module = PseudoLabelModule(teacher, mean=IMAGENET_MEAN, std=IMAGENET_STD, views=Views(False, (1.0,)))
    module = module.to(bench.device)
    images = torch.randint(256, (count, 3, *size), dtype=torch.uint8, device=bench.device)
    batch = LabelBatch(0, ImageGroup(list(range(count)), images, None))

    @torch.inference_mode()
    def step() -> None:
        with autocast("bf16-mixed", bench.device.type):
            module.predict_step(batch, 0).watch.wait()

    bench.add(f"label {model}, {size[0]} x {size[1]}", count, bench.time(step), forward_flops(config.model, size))


class StepAsForward(nn.Module):
    """DeepSpeed wants the loss from `forward`."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = self.module.training_step(batch, 0)["loss"]
        return loss


def zero2_row(bench: Bench, model: str, factor: int) -> None:
    """The training step under DeepSpeed with the settings of `trainer=deepspeed_zero2`, on one device."""
    import deepspeed

    from depthkit.runtime.deepspeed_strategy import build_deepspeed

    config = student_config(bench, model)
    images = {name: factor * count for name, count in smallest_batch(config).items()}
    count = sum(images.values())
    accelerator = "gpu" if bench.device.type == "cuda" else "cpu"
    trainer = replace(config.trainer, accelerator=accelerator, strategy="deepspeed", zero_stage=2)
    strategy = build_deepspeed(trainer, images_per_rank=count)
    if accelerator == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", str(29500 + os.getpid() % 2000))
    deepspeed.init_distributed("nccl" if accelerator == "gpu" else "gloo", auto_mpi_discovery=False, verbose=False)
    try:
        module = StepAsForward(bare_module(config).to(bench.device))
        flops = flops_per_image(config, module.module)
        network = module.module.model
        frozen_encoder(module.module).to(bench.device)
        optimizer = build_optimizer(parameter_groups(network, network.encoder, config.optim), config.optim)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=strategy.config)
        batch = random_batch(config, images, bench.device)

        def step() -> None:
            engine.backward(engine(batch))
            engine.step()

        bench.add(f"train {model}, ZeRO 2", count, bench.time(step), flops)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def loader_rows(bench: Bench) -> None:
    """What one core loads, and how many of them each model's step needs."""
    from benchmark_data import make_sources, our_batches, write_files

    height, width = (120, 160) if bench.tiny else (960, 1280)
    num_batches, size = (2, 1) if bench.tiny else (6, 8)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder) / "files", make_sources(size, None), (height, width))
        for stream in ("labeled", "unlabeled"):
            batches: Iterator[Any] = our_batches(Path(folder) / "files", stream, size)
            next(batches)
            start = time.process_time()
            for _ in range(num_batches):
                next(batches)
            seconds[stream] = (time.process_time() - start) / (num_batches * size)
    mean = (seconds["labeled"] + 2 * seconds["unlabeled"]) / 3
    files = f"1 labeled to 2 unlabeled, {height} x {width}"
    bench.table.add("loader, one core", "", "", f"{1 / mean:.1f}", "", "", remark=files)
    devices = torch.cuda.device_count() if bench.device.type == "cuda" else 1
    cores = (os.cpu_count() or 1) / devices
    for model, rate in bench.rates.items():
        verdict = "loader-bound" if rate * mean > cores else "not loader-bound"
        bench.table.add(
            f"loader for {model}", remark=f"{verdict}: needs {rate * mean:.1f} cores of {cores:g} per device"
        )


# --- the run ---------------------------------------------------------------------------------------------------------


def run(bench: Bench) -> None:
    """Everything, what takes long and may fail last."""
    models = ["tiny"] if bench.tiny else list(TAPS)
    bench.attempt("matrix product", lambda: matrix_product(bench))
    for model in models:
        sweep(bench, model)
    for model in models:
        for count in (2,) if bench.tiny else (8, 32):
            bench.attempt(f"label {model}", lambda model=model, count=count: label_row(bench, model, count))
    bench.attempt("loader", lambda: loader_rows(bench))
    factor = 1 if bench.tiny else 4
    bench.attempt(f"train {models[-1]}, ZeRO 2", lambda: zero2_row(bench, models[-1], factor))
    for model in models:
        if bench.left() < (0 if bench.tiny else COMPILE_SECONDS):
            bench.table.add(f"train {model} compiled", remark="not measured: the time is up")
            continue
        bench.attempt(f"train {model} compiled", lambda model=model: train_row(bench, model, 2 * factor, compiled=True))


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    memory = (
        f", {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB" if device.type == "cuda" else ""
    )
    return f"{name}{memory}, {os.cpu_count()} cores, torch {torch.__version__}"


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small numbers: only shows that it runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="no row is begun after that time (default 7.5)")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny shows that the script runs")
    device = torch.device(arguments.device)
    register_schemas()
    title = f"{hardware(device)}; {date.today()}, commit {commit()}"
    deadline = time.monotonic() + 60 * arguments.minutes
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        run(Bench(device, arguments.tiny, deadline, Table(title, arguments.out)))


if __name__ == "__main__":
    main()
