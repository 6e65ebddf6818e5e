"""ScanNet: frames that the official SensReader extracted from the .sens files."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from depthkit.data.datasets.layouts import read_numbers, required
from depthkit.data.pairs import Pair, safe_key
from depthkit.data.sources import file

DEPTH_SIZE = (480, 640)
"""Colour is 968 x 1296: not quite the same aspect ratio, so the size of the label is stated."""


def find_test(root: Path) -> dict[str, Iterator[Pair]]:
    """Every extracted frame of the 100 test scenes."""
    cure = "the test scenes: github.com/ScanNet/ScanNet, Tasks/Benchmark/scannetv2_test.txt"
    scenes = required(root / "scannetv2_test.txt", cure).read_text().split()
    images = (image for scene in scenes for image in (root / scene / "color").glob("*.jpg") if image.stem.isdigit())
    return {"test": (_pair(root, image) for image in images)}


def find_val800(root: Path) -> dict[str, Iterator[Pair]]:
    """The 800 frames of the validation scenes that Marigold's evaluation drew."""
    name = "scannet_val_sampled_list_800_1.txt"
    cure = f"it ships with github.com/prs-eth/Marigold as data_split/scannet_depth/{name}"
    lines = required(root / name, cure).read_text().splitlines()
    return {"val": (_pair(root, root / line.split()[0]) for line in lines if line.strip())}


def _pair(root: Path, image: Path) -> Pair:
    scene, number = image.parent.parent, image.stem
    return Pair(
        key=safe_key(f"{scene.name}_{number}"),
        image=file(image),
        label=file(scene / "depth" / f"{number}.png"),
        label_size=DEPTH_SIZE,
        facts={
            "source_id": image.relative_to(root).as_posix(),
            "sequence": scene.name,
            "frame": int(number),
            **_intrinsics(scene / "intrinsic" / "intrinsic_color.txt"),
        },
    )


@lru_cache(maxsize=8)
def _intrinsics(path: Path) -> dict[str, list[float]]:
    """Of the colour camera, from a 4x4 matrix; nothing where it was not extracted."""
    return {"intrinsics_px": read_numbers(path, (16,))[[0, 5, 2, 6]].tolist()} if path.is_file() else {}
