"""7-Scenes: sequences of a Kinect with a pose for each frame; every scene ships its own lists of sequences."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair

DIGITS = "[0-9]" * 6
DEPTH_CAMERA, COLOUR_CAMERA = [585.0, 585.0, 320.0, 240.0], [525.0, 525.0, 320.0, 240.0]
"""fx, fy, cx, cy. Nobody calibrated the colour camera; 525 px is what users take (vislearn/dsacstar)."""


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """All frames of the test sequences of every scene below `root`, with their depth."""
    return {"test": _scenes(root, "TestSplit.txt", lambda image: _beside(image, ".depth.png"), DEPTH_CAMERA)}


def find_train(root: Path) -> dict[str, Iterator[Pair]]:
    """All images of the training sequences, as videos."""
    return {"train": _scenes(root, "TrainSplit.txt", lambda image: None, COLOUR_CAMERA)}


def _scenes(root: Path, split: str, label_of: Callable[[Path], Path | None], intrinsics: list[float]) -> Iterator[Pair]:
    scenes = sorted(path.parent for path in root.glob(f"*/{split}"))
    if not scenes:
        required(root / "chess" / split, "each scene's archive holds one, beside its folders seq-XX")
    return (pair for scene in scenes for pair in _sequences(root, scene / split, label_of, intrinsics))


def _sequences(
    root: Path, split: Path, label_of: Callable[[Path], Path | None], intrinsics: list[float]
) -> Iterator[Pair]:
    """The lists say `sequence3` for the folder `seq-03`."""
    numbers = re.findall(r"sequence(\d+)", split.read_text())
    patterns = [f"{split.parent.name}/seq-{int(number):02d}/frame-{DIGITS}.color.png" for number in numbers]
    for pair in pairs_by_pattern(root, patterns, label_of, facts_of=_facts):
        pose = _beside(pair.image.path, ".pose.txt")
        facts = pair.facts | {"intrinsics_px": intrinsics}
        yield replace(pair, pose=pose if pose.is_file() else None, facts=facts)


def _facts(image: Path) -> dict[str, Any]:
    return {
        "sequence": f"{image.parts[-3]}/{image.parts[-2]}",
        "frame": int(image.name[6:12]),
    }


def _beside(image: Path, ending: str) -> Path:
    return image.with_name(image.name.removesuffix(".color.png") + ending)
