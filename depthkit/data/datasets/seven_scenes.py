"""7-Scenes: sequences of a Kinect with a pose for each frame; every scene ships its own list of test sequences."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair

DIGITS = "[0-9]" * 6
INTRINSICS = [585.0, 585.0, 320.0, 240.0]


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """All frames of the test sequences of every scene below `root`."""
    scenes = sorted(path.parent for path in root.glob("*/TestSplit.txt"))
    if not scenes:
        required(root / "chess" / "TestSplit.txt", "each scene's archive holds one, beside its folders seq-XX")
    return {"test": (pair for scene in scenes for pair in _sequences(root, scene))}


def _sequences(root: Path, scene: Path) -> Iterator[Pair]:
    """`TestSplit.txt` says `sequence3` for the folder `seq-03`."""
    numbers = re.findall(r"sequence(\d+)", (scene / "TestSplit.txt").read_text())
    patterns = [f"{scene.name}/seq-{int(number):02d}/frame-{DIGITS}.color.png" for number in numbers]
    for pair in pairs_by_pattern(root, patterns, lambda p: _beside(p, ".depth.png"), facts_of=_facts):
        pose = _beside(pair.image.path, ".pose.txt")
        yield replace(pair, pose=pose if pose.is_file() else None)


def _facts(image: Path) -> dict[str, Any]:
    return {
        "intrinsics_px": INTRINSICS,
        "sequence": f"{image.parts[-3]}/{image.parts[-2]}",
        "frame": int(image.name[6:12]),
    }


def _beside(image: Path, ending: str) -> Path:
    return image.with_name(image.name.removesuffix(".color.png") + ending)
