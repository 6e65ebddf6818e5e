"""Share of the time that training waits for data: tiny teacher and student with one loader worker.

    python scripts/benchmark_step.py

The run is the ordinary one, with the settings of experiment=tiny_teacher and experiment=tiny_student on fewer images;
the share is what it logs as `throughput/data_wait`, the median over its logging intervals without the first.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

import hydra
import torch

from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig
from depthkit.data.datamodule import render_missing
from depthkit.label import label
from depthkit.train import fit


def compose(root: Path, experiment: str, *overrides: str) -> TrainConfig:
    """The settings of an experiment whose data and runs lie under `root`."""
    places = [f"paths.data={root}/data", f"paths.runs={root}/runs"]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        settings = [f"experiment={experiment}", *places, "trainer.enable_progress_bar=false", *overrides]
        config: TrainConfig = to_config(hydra.compose("train", settings))
        return config


def train(config: TrainConfig, *, steps: int, interval: int) -> tuple[float, float]:
    """Train; the medians of images/s and of the share of time waiting for data."""
    config.trainer.max_steps = steps
    config.trainer.log_every_n_steps = interval
    config.optim.warmup_steps = 0
    config.data.num_workers = 1
    config.data.val = {}
    fit(config)
    with (Path(config.run_dir) / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["throughput/data_wait"]][1:]
    columns = ("throughput/images_per_second", "throughput/data_wait")
    rate, wait = (statistics.median(float(row[column]) for row in rows) for column in columns)
    return rate, wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each stage (default 100)")
    parser.add_argument("--quick", action="store_true", help="a few steps on a few images: only shows that it runs")
    arguments = parser.parse_args()
    num_images, steps, interval = (48, 4, 2) if arguments.quick else (512, arguments.steps, 10)
    register_schemas()

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = f"data.labeled.source.world.num_images={num_images}"
        target = f"data.unlabeled.target.world.num_images={num_images}"
        student = compose(root, "tiny_student", source, target, "stage.encoder_weights=null")
        render_missing(student.data.unlabeled)
        results = {"teacher": train(compose(root, "tiny_teacher", source), steps=steps, interval=interval)}
        label(compose(root, "tiny_label"))
        results["student"] = train(student, steps=steps, interval=interval)

    print(f"one loader worker, {torch.get_num_threads()} thread(s) of the main process")
    for stage, (rate, wait) in results.items():
        print(f"{stage}: {rate:.1f} images/s, ratio of time waiting for data {wait:.3f}")


if __name__ == "__main__":
    main()
