"""ETH3D high-resolution multi-view: photographs (distorted, as taken) with laser depth rendered into them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, npz

IMAGES = "images/dslr_images"
LABELS = "ground_truth_depth/dslr_images"


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """Every training image of the 13 scenes that has a depth map."""
    scenes = sorted(path.parents[1] for path in root.glob(f"*/{LABELS}"))
    if not scenes:
        required(root / "courtyard" / LABELS, "of courtyard_dslr_depth.7z; images are in courtyard_dslr_jpg.7z")
    cameras = {scene: _cameras(scene / "dslr_calibration_jpg") for scene in scenes}

    def facts_of(image: Path) -> dict[str, Any]:
        return {"sequence": image.parents[2].name, **cameras[image.parents[2]].get(image.name, {})}

    def label_of(image: Path) -> Source:
        return Source(_label(image), ".npz", read_depth, (image,))

    patterns = [f"{scene.name}/{IMAGES}/*.JPG" for scene in scenes]
    return {
        "test": pairs_by_pattern(
            root, patterns, label_of, facts_of=facts_of, keep=lambda image: _label(image).is_file()
        )
    }


def read_depth(path: Path, image: Path) -> bytes:
    """float32 without a header, row by row, of the size of the image as it is stored; infinite = no depth."""
    with Image.open(image) as photograph:
        width, height = photograph.size
    numbers = np.fromfile(path, "<f4")
    if numbers.size != height * width:
        raise SampleError(f"{path}: {numbers.size} numbers for an image of {width}x{height}")
    return npz(numbers.reshape(height, width))


def _label(image: Path) -> Path:
    return image.parents[2] / LABELS / image.name


def _cameras(folder: Path) -> dict[str, dict[str, Any]]:
    """Camera facts by name of the image, from COLMAP's text files; nothing where the calibration is not there.

    cameras.txt: CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy and distortion. images.txt: two lines an image, the first
    ends in CAMERA_ID NAME.
    """
    if not (folder / "images.txt").is_file():
        return {}
    models, images = ([row.split() for row in _rows(folder / name)] for name in ("cameras.txt", "images.txt"))
    cameras = {
        row[0]: {"camera": row[1].lower(), "intrinsics_px": [float(number) for number in row[4:8]]} for row in models
    }
    return {Path(row[9]).name: cameras[row[8]] for row in images[::2]}


def _rows(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("#")]
