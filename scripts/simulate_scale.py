"""What it costs to plan, to resume and to change the world size at the scale of the papers, and proof of the order.

    python scripts/simulate_scale.py --shards 62000 --samples 1000 --ranks 8 64 512

Builds the order of a stream of that size, as each rank does at its start, and prints a Markdown table: seconds and
memory to read the manifest, to plan the first sweep and find the first sample of every lane of a rank, and the same in
the middle of the sweep. Then the proof that every sample is used once in a sweep: by enumeration of every position at
small scale, for several world sizes, and by arithmetic at the large one. Ends with an error where it does not hold.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from depthkit.data.manifest import Manifest, Shard, load_manifest, save_manifest
from depthkit.data.order import Order, rank_slots

Result = TypeVar("Result")
SHUFFLE_BLOCK = 4096  # samples, the default of `data.shuffle_block`
IMAGES_PER_RANK = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=62_000)
    parser.add_argument("--samples", type=int, default=1000, help="per shard")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    arguments = parser.parse_args()
    sizes = manifest_sizes(arguments.shards, arguments.samples)
    print("| ranks | images per step | plan: s | plan: MiB | resume in the middle: s | resume: MiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for num_ranks in arguments.ranks:
        row = plan_and_resume(sizes, num_ranks)
        print("| " + " | ".join(row) + " |", flush=True)
    for num_ranks in (1, 2, 4, 8):
        prove_by_enumeration(num_ranks)
    for num_ranks in arguments.ranks:
        prove_by_arithmetic(sizes, num_ranks)


def manifest_sizes(num_shards: int, num_samples: int) -> list[int]:
    """Samples per shard, from a manifest that is written and read once."""
    shards = tuple(
        Shard(path=f"images-{i:06d}.tar", num_samples=num_samples, num_bytes=10**8, sha256=f"{i:064x}")
        for i in range(num_shards)
    )
    manifest = Manifest(name="images", split="train", target=None, shards=shards, licence="-", source="-")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        save_manifest(manifest, path)
        loaded, seconds, mebibytes = measure(lambda: load_manifest(path))
    total = loaded.num_samples
    print(f"{num_shards:,} shards, {total:,} samples; manifest read in {seconds:.2f} s, {mebibytes:.0f} MiB\n")
    return [shard.num_samples for shard in loaded.shards]


def measure(function: Callable[[], Result]) -> tuple[Result, float, float]:
    """The result, the seconds, and the peak of new memory in MiB (from a second run: tracing slows the first)."""
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, seconds, peak / 2**20


def build_order(sizes: list[int], num_ranks: int) -> Order:
    return Order([sizes], [1.0], num_lanes=num_ranks * IMAGES_PER_RANK, seed=0, shuffle_block=SHUFFLE_BLOCK)


def plan_and_resume(sizes: list[int], num_ranks: int) -> list[str]:
    """What the last of the ranks does at its start, at step 0 and at half of the sweep."""
    lanes = num_ranks * IMAGES_PER_RANK
    slots = rank_slots(lanes, num_ranks - 1, num_ranks)

    def start_at(step: int) -> Callable[[], list[object]]:
        def start() -> list[object]:
            order = build_order(sizes, num_ranks)
            return [order.locate(step * lanes + slot) for slot in slots]

        return start

    cells = [str(num_ranks), str(lanes)]
    for step in (0, sum(sizes) // lanes // 2):
        _, seconds, mebibytes = measure(start_at(step))
        cells += [f"{seconds:.2f}", f"{mebibytes:.0f}"]
    return cells


def prove_by_enumeration(num_ranks: int) -> None:
    """Two sweeps of 37 uneven shards, read by `num_ranks` ranks: every sample twice; the order is that of one rank."""
    sizes = [int(size) for size in np.random.default_rng(0).integers(1, 40, 37)]
    order = Order([sizes], [1.0], num_lanes=8, seed=0, shuffle_block=16)
    seen: dict[tuple[int, int], int] = {}
    positions: set[int] = set()
    for rank in range(num_ranks):
        for slot in rank_slots(8, rank, num_ranks):
            for position in range(slot, 2 * sum(sizes), 8):
                location = order.locate(position)
                seen[location.shard, location.sample] = seen.get((location.shard, location.sample), 0) + 1
                positions.add(position)
    assert positions == set(range(2 * sum(sizes))), "a position was read by no rank"
    assert len(seen) == sum(sizes), "a sample was read by no rank"
    assert set(seen.values()) == {2}, "a sample was read more than once in a sweep"
    print(f"\nenumerated: {num_ranks} ranks read each of {sum(sizes)} samples once in each of two sweeps", end="")


def prove_by_arithmetic(sizes: list[int], num_ranks: int) -> None:
    """The runs of a sweep cover each shard once, the stretches of the lanes the line of samples, the blocks of a lane
    its stretch, and a block's permutation is one: so the map from positions to samples is one to one."""
    order = build_order(sizes, num_ranks)
    sweep = order.sweep(0)
    counts = np.diff(sweep.end, prepend=0)
    assert np.array_equal(np.bincount(sweep.shard, weights=counts, minlength=len(sizes)), sizes)
    assert (sweep.first == 0).all()
    assert len(np.unique(sweep.shard)) == len(sizes)
    assert (sweep.lane_start[0], sweep.lane_start[-1]) == (0, sum(sizes))
    assert (np.diff(sweep.lane_start) >= 0).all()
    lanes = np.linspace(0, order.num_lanes - 1, 5).astype(int)
    for lane in lanes:
        length = int(sweep.lane_start[lane + 1] - sweep.lane_start[lane])
        for block in (0, length // SHUFFLE_BLOCK):
            size = min(SHUFFLE_BLOCK, length - block * SHUFFLE_BLOCK)
            permutation = order.block_permutation(0, int(lane), block, size)
            assert np.array_equal(np.sort(permutation), np.arange(size))
    shards = np.searchsorted(sweep.end, sweep.lane_start, side="right")
    touched = int(np.diff(shards).max() + 1) * IMAGES_PER_RANK
    facts = {"ranks": num_ranks, "samples": sum(sizes), "shards a rank touches in a sweep, at most": touched}
    print(f"\nby arithmetic: {json.dumps(facts)}", end="")


if __name__ == "__main__":
    main()
    print()
