"""Images per second of scoring: alignment and all metrics of depth maps at KITTI's 375 x 1242 pixels, beside a loop in
NumPy over the same definitions.

    python scripts/benchmark_evaluate.py

The loop is written as evaluation scripts are: float64, one image after the other, the valid pixels cut out once, each
metric from its formula. Both score the same images in alternation, which lie in memory, and must find the same numbers.
depthkit scores them on one thread, where time is the CPU time of the process, so that other work on the machine counts
little; and then in as many threads as there are cores, as `depthkit evaluate` does, where both sides are timed by the
clock. Before that it scores many more images while the process's memory is watched.
"""

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from depthkit.evaluation.protocols import score
from depthkit.evaluation.settings import METRIC_NAMES, STANDARD_METRICS, Alignment, ProtocolConfig
from depthkit.inference.depth_files import ahead
from depthkit.metrics_edges import EDGE_RADIUS_PX, EDGE_RATIO
from depthkit.metrics_pairs import NUM_ORDINAL_PAIRS, ORDINAL_RATIO

CAP_M = 80.0
SIZE = (375, 1242)
RATIOS = np.linspace(1.05, 1.25, 10)
KITTI_SHARE = 0.18
DENSE_SHARE = 0.95


class Scene(NamedTuple):
    """Predicted disparity, true depth in metres and where it is known, (H, W) each."""

    prediction: np.ndarray
    depth: np.ndarray
    valid_mask: np.ndarray


def make_scene(seed: int, share: float, size: tuple[int, int]) -> Scene:
    """A ground plane with boxes on it; the prediction has smooth errors and edges that lie a little off."""
    rng = np.random.default_rng(seed)
    height, width = size
    depth = np.minimum(1.6 * height / np.maximum(np.arange(height) - 0.45 * height, 1.0), 78.0)[:, None] * np.ones(
        width
    )
    boxes = zip(rng.integers(0, width, 60), rng.integers(0, height, 60), np.exp(rng.uniform(1, 4, 60)), strict=True)
    for left, bottom, distance in sorted(boxes, key=lambda box: -box[2]):
        side = int(1.5 * height / distance) + 2
        depth[max(0, bottom - side) : bottom, left : left + side] = distance
    smooth = rng.normal(0, 0.06, (height // 25 + 2, width // 25 + 2)).repeat(25, 0).repeat(25, 1)[:height, :width]
    prediction = np.roll(1 / depth, (1, 2), (0, 1)) * (1 + smooth) + 0.002 * rng.standard_normal(size) / depth
    valid_mask = rng.random(size) < share
    return Scene((3 * prediction + 0.1).astype(np.float32), depth.astype(np.float32), valid_mask)


# --- the loop in NumPy ----------------------------------------------------------------------------------------------


def loop(scene: Scene, names: list[str]) -> dict[str, float]:
    """The metrics of one image."""
    mask = scene.valid_mask & (scene.depth > 1e-3) & (scene.depth <= CAP_M)
    target, disparity = scene.depth.astype(np.float64), scene.prediction.astype(np.float64)
    scale, shift = least_squares(disparity[mask], 1 / target[mask])
    prediction = np.clip(1 / np.maximum(scale * disparity + shift, 1 / CAP_M), 1e-3, CAP_M)
    p, t = prediction[mask], target[mask]
    values = {name: NUMPY_METRICS[name](p, t) for name in names if name in NUMPY_METRICS}
    if "boundary_f1" in names:
        values["boundary_f1"], values["boundary_recall"] = boundary(prediction, target, mask)
        near = mask & near_edges(target, mask)
        values["edge_abs_rel"] = np.mean(np.abs(prediction[near] - target[near]) / target[near])
    return values


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Scale and shift by the normal equations."""
    a, b, n = np.sum(x * x), np.sum(x), len(x)
    c, d = np.sum(x * y), np.sum(y)
    determinant = a * n - b * b
    return (n * c - b * d) / determinant, (a * d - b * c) / determinant


def within(p: np.ndarray, t: np.ndarray, limit: float) -> float:
    return np.mean(np.maximum(p / t, t / p) < limit)


def log_variance(p: np.ndarray, t: np.ndarray, share: float = 1.0) -> float:
    e = np.log(p) - np.log(t)
    return np.mean(e**2) - share * np.mean(e) ** 2


def ordinal(p: np.ndarray, t: np.ndarray) -> float:
    step = np.arange(1, NUM_ORDINAL_PAIRS + 1)
    i, j = (step * factor % 2**32 * len(t) >> 32 for factor in (3242174889, 2447445414))
    clear = np.maximum(t[i] / t[j], t[j] / t[i]) >= ORDINAL_RATIO
    return np.mean(((p[i] > p[j]) == (t[i] > t[j]))[clear])


NUMPY_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "abs_rel": lambda p, t: np.mean(np.abs(p - t) / t),
    "sq_rel": lambda p, t: np.mean((p - t) ** 2 / t),
    "rmse": lambda p, t: np.sqrt(np.mean((p - t) ** 2)),
    "rmse_log": lambda p, t: np.sqrt(np.mean((np.log(p) - np.log(t)) ** 2)),
    "log10": lambda p, t: np.mean(np.abs(np.log10(p) - np.log10(t))),
    "silog": lambda p, t: 100 * np.sqrt(log_variance(p, t)),
    "delta1": partial(within, limit=1.25),
    "delta2": partial(within, limit=1.25**2),
    "delta3": partial(within, limit=1.25**3),
    "delta_1_05": partial(within, limit=1.05),
    "delta_1_10": partial(within, limit=1.1),
    "silog_half": lambda p, t: np.sqrt(log_variance(p, t, 0.5)),
    "rmse_log_scale_invariant": lambda p, t: np.sqrt(log_variance(p, t)),
    "scale_invariant_error": log_variance,
    "ordinal_accuracy": ordinal,
}


def occlusions(depth: np.ndarray, mask: np.ndarray, ratio: float) -> list[np.ndarray]:
    """Where a pixel is nearer than its neighbour right, left, below and above by more than the ratio."""
    across, down = mask[:, 1:] & mask[:, :-1], mask[1:] & mask[:-1]
    return [
        (depth[:, 1:] / depth[:, :-1] > ratio) & across,
        (depth[:, :-1] / depth[:, 1:] > ratio) & across,
        (depth[1:] / depth[:-1] > ratio) & down,
        (depth[:-1] / depth[1:] > ratio) & down,
    ]


def boundary(prediction: np.ndarray, target: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Boundary F1 and recall."""
    f1, recalls = [], []
    for ratio in RATIOS:
        pairs = list(zip(occlusions(prediction, mask, ratio), occlusions(target, mask, ratio), strict=True))
        precision = np.mean([np.count_nonzero(p & t) / max(np.count_nonzero(p), 1) for p, t in pairs])
        recall = np.mean([np.count_nonzero(p & t) / max(np.count_nonzero(t), 1) for p, t in pairs])
        f1.append(2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0)
        recalls.append(recall)
    return float(np.average(f1, weights=RATIOS)), float(np.average(recalls, weights=RATIOS))


def near_edges(depth: np.ndarray, mask: np.ndarray) -> np.ndarray:
    right, left, below, above = occlusions(depth, mask, EDGE_RATIO)
    edges = np.zeros_like(mask)
    edges[:, :-1] |= right | left
    edges[:, 1:] |= right | left
    edges[:-1] |= below | above
    edges[1:] |= below | above
    padded = np.pad(edges, EDGE_RADIUS_PX)
    shifts = range(2 * EDGE_RADIUS_PX + 1)
    height, width = mask.shape
    return np.any([padded[i : i + height, j : j + width] for i in shifts for j in shifts], axis=0)


# --- the comparison -------------------------------------------------------------------------------------------------


def ours(scene: Scene, names: list[str]) -> dict[str, float]:
    protocol = ProtocolConfig(
        name="benchmark", max_depth=CAP_M, alignment=Alignment.disparity_least_squares, metrics=names
    )
    maps = (torch.from_numpy(values)[None] for values in scene)
    return {name: value.item() for name, value in score(*maps, protocol).items()}


def check_equal(scene: Scene) -> None:
    found, expected = ours(scene, METRIC_NAMES), loop(scene, METRIC_NAMES)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A share steps by a whole pixel or pair where float32 falls on the other side of a threshold.
        is_share = name.startswith(("delta", "boundary", "ordinal"))
        assert np.isclose(found[name], value, rtol=1e-5, atol=1e-3 * is_share), (name, found[name], value)


class Seconds(NamedTuple):
    cpu: float
    clock: float


def seconds(work: Callable[[], object]) -> Seconds:
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - clock)


def in_threads(pool: ThreadPoolExecutor, scenes: Iterable[Scene], names: list[str]) -> Iterator[dict[str, float]]:
    """At most a few scenes wait or are worked on at a time."""
    return (result.result() for _, result in ahead(pool, partial(ours, names=names), scenes, 4))


def compare(share: float, names: list[str], *, size: tuple[int, int], num_images: int, repeats: int) -> float:
    """Print the medians over rounds in which each side scores the images, and return the ratio on one thread."""
    scenes = [make_scene(seed, share, size) for seed in range(num_images)]
    check_equal(scenes[0])
    torch.set_num_threads(1)
    num_workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        sides: list[Callable[[], object]] = [
            lambda: [loop(scene, names) for scene in scenes],
            lambda: [ours(scene, names) for scene in scenes],
            lambda: list(in_threads(pool, scenes, names)),
        ]
        rounds = [[seconds(side) for side in sides] for _ in range(repeats + 1)][1:]

    def rate(times: Sequence[Seconds], kind: str) -> float:
        return num_images / statistics.median(getattr(each, kind) for each in times)

    numpy_side, one_thread, threads = zip(*rounds, strict=True)
    ratio = statistics.median(a.cpu / b.cpu for a, b in zip(numpy_side, one_thread, strict=True))
    threads_ratio = statistics.median(a.clock / b.clock for a, b in zip(numpy_side, threads, strict=True))
    print(f"{len(names)} metrics, {share:.0%} of the pixels valid, images/s:")
    print(
        f"  of CPU time: NumPy {rate(numpy_side, 'cpu'):.1f}, depthkit {rate(one_thread, 'cpu'):.1f}, ratio {ratio:.2f}"
    )
    clock = f"NumPy {rate(numpy_side, 'clock'):.1f}, depthkit in {num_workers} threads {rate(threads, 'clock'):.1f}"
    print(f"  by the clock: {clock}, ratio {threads_ratio:.2f}")
    return ratio


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def watch_memory(size: tuple[int, int], num_images: int) -> None:
    """Print the peak after a tenth of the images and after all; each is made when it is needed."""
    scenes = (make_scene(seed, KITTI_SHARE, size) for seed in range(num_images))
    early = 0.0
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done, _ in enumerate(in_threads(pool, scenes, METRIC_NAMES), start=1):
            early = peak_mib() if done == max(num_images // 10, 1) else early
    print(f"peak memory after {num_images // 10} images {early:.0f} MiB, after {num_images} {peak_mib():.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="images of each comparison (default 8)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each comparison (default 9)")
    parser.add_argument("--quick", action="store_true", help="two small images: only shows that it runs")
    arguments = parser.parse_args()
    size = (94, 310) if arguments.quick else SIZE
    num_images, repeats = (2, 1) if arguments.quick else (arguments.images, arguments.repeats)
    # The C library keeps freed memory of up to twice the largest block freed so far. Without a block as large as those
    # of a network, both sides would ask the system for their pages anew with every image.
    torch.ones(7 * 2**20)
    watch_memory(size, 20 if arguments.quick else 500)
    print(f"{size[0]} x {size[1]} pixels, alignment included, medians of {repeats} rounds over {num_images} images")
    rounds = partial(compare, size=size, num_images=num_images, repeats=repeats)
    for share in (DENSE_SHARE, KITTI_SHARE):
        rounds(share, STANDARD_METRICS)
    dense, sparse = (rounds(share, METRIC_NAMES) for share in (DENSE_SHARE, KITTI_SHARE))
    print(f"all metrics, one thread, ratio dense {dense:.2f}, sparse {sparse:.2f}")


if __name__ == "__main__":
    main()
