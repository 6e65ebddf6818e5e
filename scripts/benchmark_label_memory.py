"""Peak memory of labelling 2, 8 and 32 image shards of one size: it does not grow with their number.

    python scripts/benchmark_label_memory.py

Each run is a process of its own, without loader workers, so that its peak resident memory holds everything. The teacher
is the tiny model with random weights. Linux only.
"""

import argparse
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import hydra

from depthkit.bundle import BundleFacts, save_bundle
from depthkit.compose import register_schemas, to_config
from depthkit.config import CONF_DIR, TrainConfig
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.data.procedural import WorldSpec, write_world
from depthkit.label import label
from depthkit.models import build_model

SIZE = (96, 128)


def compose(*overrides: str) -> TrainConfig:
    register_schemas()
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config: TrainConfig = to_config(hydra.compose("train", list(overrides)))
        return config


def peak_memory(teacher: Path, images: Path, out: Path) -> float:
    """Label `images` and return the peak resident memory of this process in MiB."""
    paths = [f"stage.bundle={teacher}", f"stage.images={images}", f"stage.out={out}"]
    label(compose("stage=pseudo_label", "stage.num_workers=0", "trainer.enable_progress_bar=false", *paths))
    # Not getrusage: its maximum begins with that of the process that started this one.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def make_teacher(folder: Path) -> Path:
    model = compose("data=tiny_teacher").model
    facts = BundleFacts(content="depth_model", model=model, kind="disparity", short_side=SIZE[0])
    return save_bundle(folder, build_model(model), facts)


def make_images(root: Path, counts: list[int], samples_per_shard: int) -> dict[int, Path]:
    """One manifest for each number of shards; all lie in one folder and share their first shards."""
    num_images = max(counts) * samples_per_shard
    world = WorldSpec(
        domain="target",
        split="benchmark",
        num_images=num_images,
        size=SIZE,
        labeled=False,
        samples_per_shard=samples_per_shard,
    )
    manifest = load_manifest(write_world(root, world))
    paths = {count: root / f"{count}_shards.json" for count in counts}
    for count, path in paths.items():
        save_manifest(replace(manifest, shards=manifest.shards[:count]), path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 shards of 4 images: only shows that it runs")
    arguments = parser.parse_args()
    counts, samples_per_shard = ([1, 2], 4) if arguments.quick else ([2, 8, 32], 32)

    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        teacher = make_teacher(root / "teacher")
        manifests = make_images(root / "images", counts, samples_per_shard)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            for count, path in manifests.items():
                peaks[count] = pool.submit(peak_memory, teacher, path, root / f"labels_{count}").result()

    for count, peak in peaks.items():
        print(f"{count:3d} shards of {samples_per_shard} images: peak {peak:.0f} MiB")
    print(f"ratio of {counts[-1]} shards to {counts[0]}: {peaks[counts[-1]] / peaks[counts[0]]:.3f}")


if __name__ == "__main__":
    main()
