"""Time of ICP with the two searches for neighbours: KD-trees, which the CPU uses, and all distances, which GPUs use.

    python scripts/benchmark_icp.py

Two pairs of clouds, each the points of an image of a bumpy wall with an edge; the two searches take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from depthkit.icp import MAX_ITERATIONS, nearest, search_trees


def wall(height: int, width: int, *, shift: float) -> Tensor:
    """Points (2, height * width, 3) in metres."""
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    phase = torch.tensor([0.0, 2.0])[:, None, None]
    depth = 2 + 0.5 * torch.sin(3 * u + phase) * torch.cos(4 * v) + (u > 0.2)
    return torch.stack([u * depth + shift, v * depth, depth], -1).flatten(1, 2)


def trees(points: Tensor, target: Tensor) -> None:
    search = search_trees(target)
    for _ in range(MAX_ITERATIONS + 1):
        search(points)


def all_distances(points: Tensor, target: Tensor) -> None:
    for _ in range(MAX_ITERATIONS + 1):
        nearest(points, target)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest images once: only shows that it runs")
    arguments = parser.parse_args()
    sizes, repeats = ([(8, 26)], 1) if arguments.quick else ([(8, 26), (16, 52), (32, 104)], 5)
    print(f"searches of one ICP ({MAX_ITERATIONS + 1}), {torch.get_num_threads()} thread(s)")
    for height, width in sizes:
        points, target = wall(height, width, shift=0.0), wall(height, width, shift=0.02)
        runs = [
            (seconds(partial(trees, points, target)), seconds(partial(all_distances, points, target)))
            for _ in range(repeats)
        ]
        ours, other = (statistics.median(times) for times in zip(*runs, strict=True))
        ratio = statistics.median(slow / fast for fast, slow in runs)
        print(f"{height * width} points: trees {ours:.4f} s, all distances {other:.4f} s, ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
