"""Middlebury stereo 2014: calibrated pairs with disparity to a fraction of a pixel."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.pairs import Pair

MILLIMETRES = 1000.0


def find_2014(root: Path) -> dict[str, Iterator[Pair]]:
    """The left image of every scene with ground truth: `disp0.pfm`, or `disp0GT.pfm` in the benchmark's archives."""
    if not any(root.glob("*/calib.txt")):
        required(root / "Motorcycle-perfect" / "calib.txt", "of the scene's archive")
    return {
        "test": pairs_by_pattern(root, "*/im0.png", _label, facts_of=_facts, keep=lambda image: _label(image).is_file())
    }


def _label(image: Path) -> Path:
    original = image.with_name("disp0.pfm")
    return original if original.is_file() else image.with_name("disp0GT.pfm")


def _facts(image: Path) -> dict[str, Any]:
    """`cam0=[fx 0 cx; 0 fy cy; 0 0 1]` and `doffs` in pixels, `baseline` in millimetres."""
    text = required(image.with_name("calib.txt"), "of the scene's archive").read_text()
    values = dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))
    if not {"cam0", "doffs", "baseline"} <= values.keys():
        raise ValueError(f"{image.with_name('calib.txt')}: no cam0, doffs and baseline; found {', '.join(values)}")
    fx, _, cx, _, fy, cy, *_ = map(float, re.findall(r"[-+.\deE]+", values["cam0"]))
    return {
        "intrinsics_px": [fx, fy, cx, cy],
        "baseline_m": float(values["baseline"]) / MILLIMETRES,
        "doffs_px": float(values["doffs"]),
    }
