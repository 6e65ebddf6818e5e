"""Hypersim: rendered rooms whose labels are distances along the viewing ray, and whose cameras differ by scene."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.data.datasets.layouts import required
from depthkit.data.pairs import Pair
from depthkit.data.sources import Source, file, h5_array

SPLITS = "metadata_images_split_scene_v1.csv"
CAMERAS = "metadata_camera_parameters.csv"
ORIGIN = {
    SPLITS: "evermotion_dataset/analysis of https://github.com/apple/ml-hypersim",
    CAMERAS: "contrib/mikeroberts3000 of https://github.com/apple/ml-hypersim",
}
BROKEN = {
    ("ai_003_001", "cam_00"),
    ("ai_004_009", "cam_01"),
    *((scene, "*") for scene in ("ai_013_001", "ai_015_006", "ai_038_007", "ai_046_001", "ai_048_004", "ai_053_005")),
}
"""Scene and camera (* = all) of images without light or textures, or without depth; ml-hypersim issue 22."""


def find(root: Path) -> dict[str, list[Pair]]:
    """The official splits by scene, of the scenes that are there; a split none of whose scenes is there is left out."""
    intrinsics = {row["scene_name"]: scene_intrinsics(row) for row in _table(root, CAMERAS)}
    there = {path.name for path in root.glob("ai_*_*")}
    splits: dict[str, list[Pair]] = defaultdict(list, train=[])
    for row in _table(root, SPLITS):
        scene, camera = row["scene_name"], row["camera_name"]
        released = row["included_in_public_release"] == "True"
        if released and scene in there and not BROKEN & {(scene, camera), (scene, "*")}:
            splits[row["split_partition_name"]].append(_pair(root, scene, camera, row["frame_id"], intrinsics[scene]))
    return dict(splits)


def scene_intrinsics(row: dict[str, str]) -> list[float]:
    """[fx, fy, cx, cy] in pixels of the pinhole camera that took the pictures of a scene.

    `M_cam_from_uv` takes (u, v, 1), both from -1 to 1 and v upwards, to the viewing ray. Tilted and shifted lenses make
    it any invertible matrix M, which is a rotation times the inverse of an upper triangular K: a pinhole camera whose
    image plane is that of the picture. As rotations keep lengths, `M.T M = K^-T K^-1` gives K by Cholesky. Its skew is
    left out, which changes the ratio of ray distance to depth by 0.4% in the worst pixel of all scenes.
    """
    width, height = float(row["settings_output_img_width"]), float(row["settings_output_img_height"])
    ray_from_uv = np.array([[float(row[f"M_cam_from_uv_{i}{j}"]) for j in range(3)] for i in range(3)])
    ray_from_px = ray_from_uv @ [[2 / width, 0, -1], [0, -2 / height, 1], [0, 0, 1]]
    camera = np.linalg.inv(np.linalg.cholesky(ray_from_px.T @ ray_from_px).T)
    (fx, _, cx), (_, fy, cy), _ = (camera / camera[2, 2]).tolist()
    return [fx, fy, cx, cy]


def _pair(root: Path, scene: str, camera: str, frame: str, intrinsics: list[float]) -> Pair:
    folder, name = root / scene / "images", f"frame.{int(frame):04d}"
    image = folder / f"scene_{camera}_final_preview" / f"{name}.tonemap.jpg"
    label = folder / f"scene_{camera}_geometry_hdf5" / f"{name}.depth_meters.hdf5"
    facts: dict[str, Any] = {"source_id": image.relative_to(root).as_posix(), "intrinsics_px": intrinsics}
    return Pair(
        key=f"{scene}_{camera}_{int(frame):04d}",
        image=file(image),
        label=Source(label, ".npz", h5_array, ("dataset",)),
        facts=facts | {"sequence": f"{scene}_{camera}", "frame": int(frame)},
    )


def _table(root: Path, name: str) -> list[dict[str, str]]:
    path = required(root / name, f"copy it there from {ORIGIN[name]}")
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
