"""DDAD in the layout of TRI's Dataset Governance Policy (DGP): JSON that names images, point clouds, poses, cameras."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from depthkit.data.datasets.layouts import pose_matrix, required
from depthkit.data.datasets.lidar import nearest_points
from depthkit.data.pairs import Pair, safe_key
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, file, npz

CAMERA, LASER = "CAMERA_01", "LIDAR"
VALIDATION = "1"  # number of the split in `scene_splits`


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """The front camera of the 50 validation scenes."""
    index = json.loads(required(root / "ddad.json", "of DDAD.tar, folder ddad_train_val").read_text())
    scenes = index["scene_splits"][VALIDATION]["filenames"]
    return {"val": (pair for scene in scenes for pair in _pairs(root, root / scene))}


def project(
    path: Path, camera_from_laser: tuple[float, ...], intrinsics: tuple[float, ...], height: int, width: int
) -> bytes:
    """Planar depth (H, W) float32 of a point cloud as .npz; the pixel of a point is the one it falls into.

    `path` is a .npz whose array `data` begins with x, y, z; `camera_from_laser` are 16 numbers, row by row.
    """
    try:
        points = np.load(path)["data"]
    except (ValueError, LookupError, BadZipFile, EOFError) as error:
        raise SampleError(f"{path}: not a point cloud of DGP: {error}") from error
    if points.dtype.fields:
        points = np.stack([points[axis] for axis in "XYZ"], 1)
    motion = np.reshape(camera_from_laser, (4, 4))
    x, y, z = motion[:3, :3] @ points[:, :3].T.astype(np.float64) + motion[:3, 3:]
    fx, fy, cx, cy = intrinsics
    in_front = z > 0
    x, y, z = x[in_front], y[in_front], z[in_front]
    rows, cols = np.floor(fy * y / z + cy).astype(np.int64), np.floor(fx * x / z + cx).astype(np.int64)
    return npz(nearest_points(rows, cols, z, (height, width)))


def _pairs(root: Path, path: Path) -> Iterator[Pair]:
    scene = json.loads(required(path, "ddad.json lists it").read_text())
    data = {datum["key"]: datum for datum in scene["data"]}
    for frame, sample in enumerate(scene["samples"]):
        found = {data[key]["id"]["name"].upper(): data[key]["datum"] for key in sample["datum_keys"]}
        if not {CAMERA, LASER} <= found.keys():
            continue
        image, cloud = found[CAMERA]["image"], found[LASER]["point_cloud"]
        world_from_camera, world_from_laser = _pose(image["pose"]), _pose(cloud["pose"])
        intrinsics = _intrinsics(path.parent / "calibration" / f"{sample['calibration_key']}.json")
        place = (
            tuple((np.linalg.inv(world_from_camera) @ world_from_laser).ravel().tolist()),
            intrinsics,
            image["height"],
            image["width"],
        )
        source_id = (path.parent / image["filename"]).relative_to(root).as_posix()
        yield Pair(
            key=safe_key(source_id.rpartition(".")[0]),
            image=file(path.parent / image["filename"]),
            label=Source(path.parent / cloud["filename"], ".npz", project, place),
            facts={
                "source_id": source_id,
                "intrinsics_px": list(intrinsics),
                "pose": world_from_camera.tolist(),
                "sequence": path.parent.name,
                "frame": frame,
            },
        )


def _pose(pose: dict[str, Any]) -> np.ndarray:
    """World from sensor; DGP leaves out numbers that are 0."""
    translation, rotation = pose.get("translation", {}), pose.get("rotation", {})
    return pose_matrix(
        [translation.get(axis, 0.0) for axis in ("x", "y", "z")],
        [rotation.get(axis, 0.0) for axis in ("qx", "qy", "qz", "qw")],
    )


@lru_cache(maxsize=64)
def _intrinsics(path: Path) -> tuple[float, ...]:
    calibration = json.loads(required(path, "every scene has one").read_text())
    camera = calibration["intrinsics"][[name.upper() for name in calibration["names"]].index(CAMERA)]
    return tuple(float(camera[name]) for name in ("fx", "fy", "cx", "cy"))
