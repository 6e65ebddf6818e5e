"""Labeled training sets: miniatures of what their authors ship go through `depthkit pack` and come back in metres."""

import csv
import io
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from miniatures import SIZE, pack_dataset, rejected, write, write_image

from depthkit.data.datasets import read_dataset
from depthkit.data.datasets.hypersim import scene_intrinsics
from depthkit.data.facts import load_facts

HEIGHT, WIDTH = SIZE


def test_every_named_set_has_facts_and_a_root_that_is_missing_is_explained(tmp_path: Path) -> None:
    for name in NAMES:
        facts = load_facts(name)
        with pytest.raises(FileNotFoundError, match="is expected as") as error:
            read_dataset(name, tmp_path / "none")
        assert facts.layout in str(error.value)


NAMES = ["blendedmvs", "diml", "hrwsi", "hypersim", "irs", "megadepth", "tartanair", "vkitti2"]


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


# --- rendered --------------------------------------------------------------------------------------------------------

RAMP = np.linspace(2, 40, HEIGHT * WIDTH).reshape(SIZE)
"""Metres or whatever a label counts; another value in every pixel."""


def without(values: np.ndarray, *pixels: tuple[int, int]) -> np.ndarray:
    """A copy with NaN at `pixels`: what comes back when they are no measurement."""
    copy = values.astype(np.float64)
    for pixel in pixels:
        copy[pixel] = np.nan
    return copy


def test_vkitti2(tmp_path: Path) -> None:
    centimetres = np.rint(RAMP * 100).astype(np.uint16)
    centimetres[0, :3] = 65535, 65534, 0
    for scene, variant, camera in [("Scene01", "clone", 0), ("Scene02", "fog", 0), ("Scene20", "rain", 1)]:
        frames = tmp_path / "root" / scene / variant / "frames"
        write_image(frames / f"rgb/Camera_{camera}/rgb_00012.jpg")
        write(frames / f"depth/Camera_{camera}/depth_00012.png", centimetres)
    header = "frame cameraID K[0,0] K[1,1] K[0,2] K[1,2]\n"
    cameras = header + "11 0 1 1 1 1\n12 0 725.0087 725.0 620.5 187\n12 1 2 2 2 2\n"
    write(tmp_path / "root/Scene01/clone/intrinsic.txt", cameras)
    packed = pack_dataset("vkitti2", tmp_path / "root", tmp_path / "out")
    assert {name: (p.manifest.split, list(p.samples)) for name, p in packed.items()} == {
        "vkitti2": ("train", ["Scene01/clone/frames/rgb/Camera_0/rgb_00012.jpg"]),
        "vkitti2_val": ("val", ["Scene02/fog/frames/rgb/Camera_0/rgb_00012.jpg"]),
    }
    train, (source_id,) = packed["vkitti2"], packed["vkitti2"].samples
    metres = centimetres / 100
    np.testing.assert_allclose(train.target(source_id), without(metres, (0, 0), (0, 2)), rtol=1e-6)
    disparity = without(1 / np.maximum(metres, 0.01), (0, 2))
    disparity[0, 0] = 0
    np.testing.assert_allclose(train.target(source_id, "disparity"), disparity, rtol=1e-6)
    facts = train.facts(source_id)
    assert facts["intrinsics_px"] == [725.0087, 725.0, 620.5, 187]
    assert (facts["sequence"], facts["frame"]) == ("Scene01/clone", 12)
    assert "intrinsics_px" not in packed["vkitti2_val"].facts("Scene02/fog/frames/rgb/Camera_0/rgb_00012.jpg")


def test_tartanair(tmp_path: Path) -> None:
    depth = RAMP.astype(np.float32)
    depth[0, :2] = 10000, 0
    root = tmp_path / "root"
    for place in ("ocean/ocean/Hard/P004", "neighborhood/Easy/P000", "amusement/amusement/Easy/P001"):
        write_image(root / place / "image_left/000123_left.png")
        write_image(root / place / "image_right/000123_right.png")
        (root / place / "depth_left").mkdir()
        np.save(root / place / "depth_left/000123_left_depth.npy", depth)
    train = pack_dataset("tartanair", root, tmp_path / "out")["tartanair"]
    wanted = ["ocean/ocean/Hard/P004", "neighborhood/Easy/P000"]
    assert train.samples.keys() == {f"{place}/image_left/000123_left.png" for place in wanted}
    source_id = f"{wanted[0]}/image_left/000123_left.png"
    np.testing.assert_allclose(train.target(source_id), without(depth, (0, 1)))
    assert train.target(source_id, "disparity")[0, 0] == pytest.approx(1e-4), "the sky is almost 0"
    facts = train.facts(source_id)
    assert facts["intrinsics_px"] == [320, 320, 320, 240]
    assert (facts["sequence"], facts["frame"]) == (wanted[0], 123)


def test_irs(tmp_path: Path) -> None:
    root, disparity = tmp_path / "root", RAMP.astype(np.float32)
    three_channels = np.dstack([disparity] * 3)
    for place, label in {"ArchVizInterior03Data": disparity, "Store/Supermarket_Night": three_channels}.items():
        write_image(root / place / "l_57.png", seed=1)
        write_image(root / place / "r_57.png", seed=2)
        write(root / place / "d_57.exr", label)
        write(root / place / "n_57.exr", three_channels)
    train = pack_dataset("irs", root, tmp_path / "out")["irs"]
    assert train.samples.keys() == {"ArchVizInterior03Data/l_57.png", "Store/Supermarket_Night/l_57.png"}
    for source_id in train.samples:
        np.testing.assert_allclose(train.target(source_id, "disparity"), disparity, rtol=1e-6)
    left = cv2.imread(str(root / "Store/Supermarket_Night/l_57.png"))[..., ::-1]
    np.testing.assert_array_equal(train.image("Store/Supermarket_Night/l_57.png"), left)
    with pytest.raises(ValueError, match="without a unit"):
        train.target(source_id, "depth")


def test_blendedmvs(tmp_path: Path) -> None:
    project = tmp_path / "root/5bfe5ae0fe0ea555e6a969ca"
    depth = RAMP.astype(np.float32)
    depth[3, 4] = 0
    camera = (
        "extrinsic\n"
        + "1 0 0 7 \n" * 4
        + "\nintrinsic\n573.5 0.0 384.25 \n0.0 574.5 288.75 \n0.0 0.0 1.0 \n\n1 2 3 4\n"
    )
    for name, label in {"00000000": depth, "00000012": depth, "00000013": np.zeros(SIZE, np.float32)}.items():
        write_image(project / f"blended_images/{name}.jpg")
        write_image(project / f"blended_images/{name}_masked.jpg")
        write(project / f"rendered_depth_maps/{name}.pfm", label)
    write(project / "cams/00000012_cam.txt", camera)
    write(project / "cams/pair.txt", "1\n")
    train = pack_dataset("blendedmvs", tmp_path / "root", tmp_path / "out", exit_code=1)["blendedmvs"]
    ids = [f"{project.name}/blended_images/{name}.jpg" for name in ("00000000", "00000012", "00000013")]
    assert train.samples.keys() == set(ids[:2])
    (row,) = rejected(tmp_path / "out", "blendedmvs")
    assert row["id"] == ids[2]
    assert "no valid pixel" in row["reason"]
    disparity = without(1 / np.where(depth, depth, 1), (3, 4))
    np.testing.assert_allclose(train.target(ids[0], "disparity"), disparity, rtol=1e-6)
    assert train.facts(ids[1])["intrinsics_px"] == [573.5, 574.5, 384.25, 288.75]
    assert train.facts(ids[1])["sequence"] == project.name


# --- photos ----------------------------------------------------------------------------------------------------------


def test_diml(tmp_path: Path) -> None:
    millimetres = np.rint(RAMP * 1000).astype(np.uint16)
    millimetres[0, 0] = 0
    for split in ("train", "test"):
        for quality in ("LR", "HR"):
            scene = tmp_path / f"root/indoor/{split}/{quality}/cafe"
            write_image(scene / "color/in_00_c.png")
            write(scene / "depth_filled/in_00_depth_filled.png", millimetres)
            outdoor = tmp_path / f"root/outdoor/{split}/{quality}"
            write_image(outdoor / "outleft/street_1.png")
            write_image(outdoor / "outright/street_1.png")
            write(outdoor / "depthmap/street_1.png", millimetres)
    packed = pack_dataset("diml", tmp_path / "root", tmp_path / "out")
    assert packed.keys() == {"diml", "diml_test"}
    assert packed["diml_test"].manifest.split == "test"
    indoor, outdoor = "indoor/train/LR/cafe/color/in_00_c.png", "outdoor/train/LR/outleft/street_1.png"
    assert packed["diml"].samples.keys() == {indoor, outdoor}
    for source_id in (indoor, outdoor):
        np.testing.assert_allclose(packed["diml"].target(source_id), without(millimetres / 1000, (0, 0)), rtol=1e-6)


def test_hrwsi_takes_zero_for_far_where_the_mask_says_that_it_was_measured(tmp_path: Path) -> None:
    disparity = np.rint(np.linspace(1, 255, HEIGHT * WIDTH)).reshape(SIZE).astype(np.uint8)
    valid = np.full(SIZE, 255, np.uint8)
    disparity[0, :4] = 0, 0, 77, 78
    valid[0, :4] = 255, 0, 0, 255
    for split, name in [("train", "a"), ("train", "b"), ("val", "c")]:
        write_image(tmp_path / f"root/{split}/imgs/{name}.jpg")
        write(tmp_path / f"root/{split}/gts/{name}.png", disparity)
        write(tmp_path / f"root/{split}/valid_masks/{name}.png", valid if name != "b" else valid[:, :-1])
    packed = pack_dataset("hrwsi", tmp_path / "root", tmp_path / "out", exit_code=1)
    assert packed["hrwsi"].samples.keys() == {"train/imgs/a.jpg"}
    assert packed["hrwsi_val"].samples.keys() == {"val/imgs/c.jpg"}
    np.testing.assert_array_equal(
        packed["hrwsi"].target("train/imgs/a.jpg", "disparity"), without(disparity, (0, 1), (0, 2))
    )
    (row,) = rejected(tmp_path / "out", "hrwsi")
    assert "valid_masks/b.png: not a readable mask of 32x24" in row["reason"]


def test_megadepth_packs_depth_and_rejects_ordinal_labels(tmp_path: Path) -> None:
    dense = tmp_path / "root/phoenix/S6/zl548/MegaDepth_v1/0015/dense0"
    depth = RAMP.astype(np.float32)
    depth[2, 2] = 0
    ordinal = np.zeros(SIZE, np.float32)
    ordinal[4:9] = 1
    signed = np.where(ordinal, depth, -1).astype(np.float32)
    for name, label in {"depth": depth, "ordinal": ordinal, "signed": signed}.items():
        write_image(dense / f"imgs/{name}_o.jpg")
        write_h5(dense / f"depths/{name}_o.h5", depth=label)
    write_image(dense / "imgs/no_label.jpg")
    write(dense / "imgs/.DS_Store", "stray")
    train = pack_dataset("megadepth", tmp_path / "root", tmp_path / "out", exit_code=1)["megadepth"]
    (source_id,) = train.samples
    assert source_id.endswith("0015/dense0/imgs/depth_o.jpg")
    disparity = without(1 / np.where(depth, depth, 1), (2, 2))
    np.testing.assert_allclose(train.target(source_id, "disparity"), disparity, rtol=1e-6)
    reasons = {Path(row["id"]).stem: row["reason"] for row in rejected(tmp_path / "out", "megadepth")}
    assert reasons.keys() == {"ordinal_o", "signed_o", "no_label"}
    assert "ordinal labels" in reasons["ordinal_o"]
    assert "ordinal labels" in reasons["signed_o"]
    assert "no_label.h5" in reasons["no_label"]
