"""Labeled training sets: miniatures of what their authors ship go through `depthkit pack` and come back in metres."""

import csv
import io
from pathlib import Path

import h5py
import numpy as np
import pytest

from depthkit.data.datasets import read_dataset
from depthkit.data.datasets.hypersim import scene_intrinsics
from depthkit.data.facts import load_facts
from tests.miniatures import SIZE, pack_dataset, write, write_image

HEIGHT, WIDTH = SIZE


def test_every_named_set_has_facts_and_a_root_that_is_missing_is_explained(tmp_path: Path) -> None:
    for name in NAMES:
        facts = load_facts(name)
        with pytest.raises(FileNotFoundError, match="is expected as") as error:
            read_dataset(name, tmp_path / "none")
        assert facts.layout in str(error.value)


NAMES = ["hypersim"]


# --- Hypersim --------------------------------------------------------------------------------------------------------

STANDARD = [[np.tan(np.pi / 6), 0, 0], [0, np.tan(np.pi / 6) * HEIGHT / WIDTH, 0], [0, 0, -1]]
"""60 degrees across the width, square pixels, as most of the loaders assume."""

TILTED = [[0.59, 0, 0], [0, 0.433, 0], [0, 0.1, -1.03]]
FRAMES = [
    ("ai_001_001", "cam_00", 0, "True", "train"),
    ("ai_001_001", "cam_00", 7, "True", "train"),
    ("ai_001_001", "cam_00", 8, "False", ""),
    ("ai_004_009", "cam_00", 0, "True", "train"),
    ("ai_004_009", "cam_01", 0, "True", "train"),
    ("ai_038_007", "cam_02", 0, "True", "train"),
    ("ai_099_001", "cam_00", 0, "True", "train"),
    ("ai_003_010", "cam_01", 2, "True", "val"),
    ("ai_099_002", "cam_00", 0, "True", "test"),
]
SCENES = {"ai_001_001": TILTED, "ai_004_009": STANDARD, "ai_038_007": STANDARD, "ai_003_010": STANDARD}


def table(rows: list[dict]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def camera_row(scene: str, ray_from_uv: list[list[float]], size: tuple[int, int] = SIZE) -> dict:
    row = {"scene_name": scene, "settings_output_img_height": float(size[0])}
    row |= {"settings_output_img_width": float(size[1])}
    return row | {f"M_cam_from_uv_{i}{j}": ray_from_uv[i][j] for i in range(3) for j in range(3)}


def viewing_rays(ray_from_uv: list[list[float]]) -> np.ndarray:
    """(H, W, 3), the ray through each pixel centre as the authors' notebook casts it."""
    u = np.linspace(-1 + 1 / WIDTH, 1 - 1 / WIDTH, WIDTH)
    v = np.linspace(-1 + 1 / HEIGHT, 1 - 1 / HEIGHT, HEIGHT)[::-1]
    return np.dstack([*np.meshgrid(u, v), np.ones(SIZE)]) @ np.transpose(ray_from_uv)


def plane_distance(ray_from_uv: list[list[float]], depth: float) -> np.ndarray:
    """Distance along each ray to the plane that lies parallel to the picture at `depth`.

    The picture spans the differences of neighbouring (unnormalised) rays; their cross product is its normal.
    """
    rays = viewing_rays(ray_from_uv)
    normal = np.cross(rays[0, 1] - rays[0, 0], rays[1, 0] - rays[0, 0])
    normal /= np.linalg.norm(normal)
    return depth * np.linalg.norm(rays, axis=-1) / np.abs(rays @ normal)


def write_hypersim(root: Path) -> None:
    names = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
    rows = [dict(zip(names, frame, strict=True)) for frame in FRAMES]
    write(root / "metadata_images_split_scene_v1.csv", table(rows))
    cameras = SCENES | {"ai_099_001": STANDARD, "ai_099_002": STANDARD}
    write(root / "metadata_camera_parameters.csv", table([camera_row(*item) for item in cameras.items()]))
    for scene, camera, frame, _, _ in FRAMES:
        if scene in SCENES:
            images = root / scene / "images"
            write_image(images / f"scene_{camera}_final_preview" / f"frame.{frame:04d}.tonemap.jpg")
            distance = plane_distance(SCENES[scene], 3.0).astype(np.float16)
            distance[5, 6] = np.nan
            write_h5(
                images / f"scene_{camera}_geometry_hdf5" / f"frame.{frame:04d}.depth_meters.hdf5", dataset=distance
            )


def write_h5(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        for name, array in arrays.items():
            content[name] = array


def test_hypersim_distances_to_a_plane_become_its_depth(tmp_path: Path) -> None:
    write_hypersim(tmp_path / "root")
    packed = pack_dataset("hypersim", tmp_path / "root", tmp_path / "out")
    assert packed.keys() == {"hypersim", "hypersim_val"}
    assert (packed["hypersim"].manifest.split, packed["hypersim_val"].manifest.split) == ("train", "val")
    train = {source_id.split("/")[0] for source_id in packed["hypersim"].samples}
    assert train == {"ai_001_001", "ai_004_009"}
    assert len(packed["hypersim"].samples) == 3
    for split, source_id in [
        ("hypersim", "ai_001_001/images/scene_cam_00_final_preview/frame.0007.tonemap.jpg"),
        ("hypersim_val", "ai_003_010/images/scene_cam_01_final_preview/frame.0002.tonemap.jpg"),
    ]:
        depth = packed[split].target(source_id)
        assert np.isnan(depth[5, 6])
        assert np.isnan(depth).sum() == 1
        np.testing.assert_allclose(depth[~np.isnan(depth)], 3.0, rtol=1e-3)
    assert packed["hypersim_val"].facts(source_id)["frame"] == 2


def test_hypersim_cameras() -> None:
    assert scene_intrinsics(camera_row("", STANDARD_1024, (768, 1024))) == pytest.approx(
        [886.81, 886.81, 512, 384], abs=0.01
    )
    row = camera_row("", TILTED)
    fx, fy, cx, cy = scene_intrinsics({name: str(value) for name, value in row.items()})
    assert cx == pytest.approx(WIDTH / 2)
    assert abs(cy - HEIGHT / 2) > 1, "a tilted lens moves the principal point"
    assert fx == pytest.approx(fy, rel=0.05)


STANDARD_1024 = [[0.5773502886169104, 0, 0], [0, 0.4330127164626828, 0], [0, 0, -1]]
"""As in metadata_camera_parameters.csv for ai_001_001."""


def test_hypersim_says_which_list_is_missing_and_where_it_is(tmp_path: Path) -> None:
    write_hypersim(tmp_path)
    for name, place in {
        "metadata_images_split_scene_v1.csv": "evermotion_dataset/analysis",
        "metadata_camera_parameters.csv": "contrib/mikeroberts3000",
    }.items():
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=f"{name}: missing; copy it there from {place}"):
            read_dataset("hypersim", tmp_path)
        (tmp_path / "away").rename(tmp_path / name)
