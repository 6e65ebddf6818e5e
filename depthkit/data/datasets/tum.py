"""TUM RGB-D: sequences whose colour images and depth maps have times of their own, listed in `rgb.txt`, `depth.txt`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from depthkit.data.datasets.layouts import pose_matrix, required
from depthkit.data.pairs import Pair, safe_key
from depthkit.data.sources import file

MAX_DIFFERENCE = 0.02  # seconds; the default of the data set's own `associate.py`
INTRINSICS = {
    "freiburg1": [517.3, 516.5, 318.6, 255.3],
    "freiburg2": [520.9, 521.0, 325.1, 249.7],
    "freiburg3": [535.4, 539.2, 320.1, 247.6],
}
"""fx, fy, cx, cy of the colour cameras, from the data set's page. The depth maps are registered to the images."""


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """Every associated pair of every sequence below `root`."""
    sequences = sorted(path.parent for path in root.glob("*/rgb.txt"))
    if not sequences:
        required(root / "rgbd_dataset_freiburg3_long_office_household" / "rgb.txt", "of the sequence's archive")
    return {"test": (pair for sequence in sequences for pair in _pairs(sequence))}


def _pairs(sequence: Path) -> Iterator[Pair]:
    (image_times, images), (depth_times, depths) = (_read(sequence / name) for name in ("rgb.txt", "depth.txt"))
    pose_times, poses = _read(sequence / "groundtruth.txt") if (sequence / "groundtruth.txt").is_file() else ([], [])
    pose_of = dict(associate(image_times, pose_times))
    camera = next((name for name in INTRINSICS if name in sequence.name), None)
    known = {"sequence": sequence.name} | ({"intrinsics_px": INTRINSICS[camera]} if camera else {})
    for i, j in associate(image_times, depth_times):
        facts = known | {"source_id": f"{sequence.name}/{images[i][0]}", "frame": i}
        if i in pose_of:
            numbers = [float(text) for text in poses[pose_of[i]]]
            facts["pose"] = pose_matrix(numbers[:3], numbers[3:7]).tolist()
        yield Pair(
            key=safe_key(f"{sequence.name}_{Path(images[i][0]).stem}".removeprefix("rgbd_dataset_")),
            image=file(sequence / images[i][0]),
            label=file(sequence / depths[j][0]),
            facts=facts,
        )


def associate(first: list[float], second: list[float], max_difference: float = MAX_DIFFERENCE) -> list[tuple[int, int]]:
    """Pairs (i, j) of times less than `max_difference` apart, closest pairs first, each time used once; sorted by i."""
    order = np.argsort(second)
    times = np.asarray(second)[order]
    low, high = (np.searchsorted(times, np.asarray(first) + shift) for shift in (-max_difference, max_difference))
    near = [(abs(first[i] - times[k]), i, int(order[k])) for i in range(len(first)) for k in range(low[i], high[i])]
    pairs: dict[int, int] = {}
    taken = set()
    for difference, i, j in sorted(near):
        if difference < max_difference and i not in pairs and j not in taken:
            pairs[i] = j
            taken.add(j)
    return sorted(pairs.items())


def _read(path: Path) -> tuple[list[float], list[list[str]]]:
    """Times in seconds, and what stands behind them on each line that is no comment."""
    lines = required(path, "every sequence has one").read_text().splitlines()
    rows = [row for row in map(str.split, lines) if len(row) > 1 and not row[0].startswith("#")]
    return [float(row[0]) for row in rows], [row[1:] for row in rows]
