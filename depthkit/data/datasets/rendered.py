"""Rendered training sets: BlendedMVS, IRS, TartanAir and Virtual KITTI 2."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from depthkit.data.datasets.layouts import pairs_by_pattern
from depthkit.data.pairs import Pair

INTRINSIC = re.compile(r"intrinsic\s+(\S+)\s+\S+\s+(\S+)\s+\S+\s+(\S+)\s+(\S+)")
"""In a camera file of BlendedMVS: rows `fx 0 cx`, `0 fy cy`, `0 0 1` after the extrinsic matrix."""

VKITTI2_VAL_SCENE = "Scene02"


def find_blendedmvs(root: Path) -> dict[str, Iterator[Pair]]:
    """Every project of BlendedMVS, + and ++ (together BlendedMVG); the images with the background left in."""

    def facts_of(image: Path) -> dict[str, Any]:
        camera = image.parent.parent / "cams" / f"{image.stem}_cam.txt"
        found = INTRINSIC.search(camera.read_text(encoding="utf-8")) if camera.is_file() else None
        intrinsics = {"intrinsics_px": [float(found[i]) for i in (1, 3, 2, 4)]} if found else {}
        return {"sequence": image.parent.parent.name} | intrinsics

    def label_of(image: Path) -> Path:
        return image.parent.parent / "rendered_depth_maps" / f"{image.stem}.pfm"

    pattern = "**/blended_images/" + "[0-9]" * 8 + ".jpg"
    return {"train": pairs_by_pattern(root, pattern, label_of, facts_of=facts_of)}


def find_irs(root: Path) -> dict[str, Iterator[Pair]]:
    """Left images and their disparity, at any depth below `root`: one archive nests deeper than the others."""

    def label_of(image: Path) -> Path:
        return image.with_name(f"d_{image.stem.removeprefix('l_')}.exr")

    return {"train": pairs_by_pattern(root, "**/l_*.png", label_of)}


def find_tartanair(root: Path) -> dict[str, Iterator[Pair]]:
    """Left images of all trajectories; `amusement` is left out, since its sky is at an arbitrary distance."""

    def label_of(image: Path) -> Path:
        return image.parent.parent / "depth_left" / f"{image.stem}_depth.npy"

    def facts_of(image: Path) -> dict[str, Any]:
        trajectory = image.parent.parent.relative_to(root).as_posix()
        return {"intrinsics_px": [320.0, 320.0, 320.0, 240.0], "sequence": trajectory, "frame": int(image.stem[:6])}

    def keep(image: Path) -> bool:
        return "amusement" not in image.relative_to(root).parts

    pattern = "**/P[0-9][0-9][0-9]/image_left/" + "[0-9]" * 6 + "_left.png"
    return {"train": pairs_by_pattern(root, pattern, label_of, facts_of=facts_of, keep=keep)}


def find_vkitti2(root: Path) -> dict[str, Iterator[Pair]]:
    """The left camera in all variants; one world, which has no official split, is held out for validation."""

    def label_of(image: Path) -> Path:
        name = image.name.replace("rgb_", "depth_").replace(".jpg", ".png")
        return image.parents[2] / "depth" / image.parent.name / name

    def facts_of(image: Path) -> dict[str, Any]:
        variant, frame = image.parents[3], int(image.stem[4:])
        intrinsics = _vkitti2_cameras(variant / "intrinsic.txt").get((frame, 0))
        facts = {"sequence": variant.relative_to(root).as_posix(), "frame": frame}
        return facts | ({"intrinsics_px": intrinsics} if intrinsics else {})

    def keep(image: Path) -> bool:
        return image.parents[4].name != VKITTI2_VAL_SCENE

    pattern = "/*/frames/rgb/Camera_0/rgb_" + "[0-9]" * 5 + ".jpg"
    return {
        "train": pairs_by_pattern(root, "Scene[0-9][0-9]" + pattern, label_of, facts_of=facts_of, keep=keep),
        "val": pairs_by_pattern(root, VKITTI2_VAL_SCENE + pattern, label_of, facts_of=facts_of),
    }


@lru_cache(maxsize=64)
def _vkitti2_cameras(path: Path) -> dict[tuple[int, int], list[float]]:
    """[fx, fy, cx, cy] by frame and camera: rows `frame camera K[0,0] K[1,1] K[0,2] K[1,2]` below a header."""
    rows = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    return {(int(frame), int(camera)): [float(v) for v in k] for frame, camera, *k in map(str.split, rows) if k}
