"""MPI Sintel: frames of an animated film, rendered in two passes, with depth and camera."""

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, npz

TAG = struct.pack("<f", 202021.25)  # the bytes "PIEH", at the head of every binary file of the data set


def _find(root: Path, rendering: str) -> dict[str, Iterator[Pair]]:
    """The 1,064 training frames of 23 scenes; the test frames have no public depth."""
    training = root / "training"
    required(training / rendering, "of MPI-Sintel-complete.zip")
    required(training / "depth", "of MPI-Sintel-depth-training-20150305.zip")

    def label_of(image: Path) -> Source:
        return Source(training / "depth" / image.parent.name / f"{image.stem}.dpt", ".npz", read_dpt)

    pattern = f"training/{rendering}/*/frame_{'[0-9]' * 4}.png"
    return {"test": pairs_by_pattern(root, pattern, label_of, facts_of=partial(_facts, training))}


find_clean = partial(_find, rendering="clean")
find_final = partial(_find, rendering="final")


def read_dpt(path: Path) -> bytes:
    """The tag, width and height as int32, then float32 depth row by row; all low byte first."""
    data = path.read_bytes()
    width, height = struct.unpack("<ii", data[4:12]) if data.startswith(TAG) and len(data) >= 12 else (0, 0)
    if min(width, height) < 1 or len(data) != 12 + 4 * width * height:
        raise SampleError(f"{path}: {len(data)} bytes are not a depth map of Sintel")
    return npz(np.frombuffer(data, "<f4", offset=12).reshape(height, width))


def _facts(training: Path, image: Path) -> dict[str, Any]:
    """A .cam file: the tag, K (3x3) and camera from world (3x4), as float64."""
    facts: dict[str, Any] = {"sequence": image.parent.name, "frame": int(image.stem.removeprefix("frame_"))}
    camera = training / "camdata_left" / image.parent.name / f"{image.stem}.cam"
    if not camera.is_file():
        return facts
    data = camera.read_bytes()
    if not data.startswith(TAG) or len(data) != len(TAG) + 8 * (9 + 12):
        raise ValueError(f"{camera}: {len(data)} bytes are not a camera of Sintel")
    numbers = np.frombuffer(data, "<f8", offset=len(TAG))
    motion = np.vstack([numbers[9:21].reshape(3, 4), [0, 0, 0, 1]])
    return facts | {"intrinsics_px": numbers[[0, 4, 2, 5]].tolist(), "pose": np.linalg.inv(motion).tolist()}
