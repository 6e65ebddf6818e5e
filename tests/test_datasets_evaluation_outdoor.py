"""Evaluation sets with lasers, rendered and outdoor scenes: miniatures go through `depthkit pack` and come back."""

import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from miniatures import SIZE, pack_dataset, rejected, write, write_image

from depthkit.data.datasets import read_dataset

HEIGHT, WIDTH = SIZE
DATE, DRIVE = "2011_09_26", "2011_09_26_drive_0002_sync"


def npy(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def text_of(array: np.ndarray) -> str:
    return " ".join(f"{number:e}" for number in np.ravel(array))


# --- KITTI -----------------------------------------------------------------------------------------------------------

LASER_AXES = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
"""Camera x, y, z of laser forward, left, up."""
OFFSET = np.array([0.05, -0.08, -0.27])
PROJECTION = np.array([[20.0, 0, 16, 1.2], [0, 21, 12, -0.1], [0, 0, 1, 0.003]])


def kitti(root: Path) -> np.ndarray:
    """Three frames, the last without improved ground truth; the (N, 3) points of the first sweep."""
    rng = np.random.default_rng(0)
    lines = []
    for frame, folder in ((69, "train"), (54, "val"), (7, None)):
        image = f"{DATE}/{DRIVE}/image_02/data/{frame:010d}.png"
        truth = f"{DRIVE}/proj_depth/groundtruth/image_02/{frame:010d}.png"
        write_image(root / image, frame)
        if folder:
            stored = np.where(rng.random(SIZE) < 0.8, 0, rng.integers(500, 20000, SIZE)).astype(np.uint16)
            write(root / "data_depth_annotated" / folder / truth, stored)
        points = np.column_stack([rng.uniform(-5, 40, 900), rng.uniform(-20, 20, 900), rng.uniform(-9, 9, 900)])
        sweep = np.column_stack([points, rng.random(900)]).astype("<f4")
        write(root / f"{DATE}/{DRIVE}/velodyne_points/data/{frame:010d}.bin", sweep.tobytes())
        lines.append(f"{image} {truth if folder else 'None'} 721.5377\n")
    write(root / "kitti_eigen_test_files_with_gt.txt", "".join(lines))
    camera = {"S_rect_02": [WIDTH, HEIGHT], "R_rect_00": np.eye(3), "P_rect_02": PROJECTION}
    calibration = "calib_time: 09-Jan-2012 13:57:47\n" + "".join(f"{k}: {text_of(v)}\n" for k, v in camera.items())
    write(root / DATE / "calib_cam_to_cam.txt", calibration)
    write(root / DATE / "calib_velo_to_cam.txt", f"R: {text_of(LASER_AXES)}\nT: {text_of(OFFSET)}\n")
    return np.fromfile(root / f"{DATE}/{DRIVE}/velodyne_points/data/{69:010d}.bin", "<f4").reshape(-1, 4)[:, :3]


def test_kitti_652_improved_ground_truth_of_both_folders(tmp_path: Path) -> None:
    kitti(tmp_path / "root")
    packed = pack_dataset("kitti_eigen652", tmp_path / "root", tmp_path / "out")["kitti_eigen652"]
    names = {frame: f"{DATE}/{DRIVE}/image_02/data/{frame:010d}.png" for frame in (69, 54)}
    assert packed.samples.keys() == set(names.values())
    for frame, folder in ((69, "train"), (54, "val")):
        label = (
            tmp_path / f"root/data_depth_annotated/{folder}/{DRIVE}/proj_depth/groundtruth/image_02/{frame:010d}.png"
        )
        stored = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(packed.target(names[frame]), np.where(stored > 0, stored / 256, np.nan), rtol=1e-6)
    facts = packed.facts(names[69])
    assert facts["intrinsics_px"] == [20, 21, 16, 12]
    assert (facts["sequence"], facts["frame"]) == (DRIVE, 69)


def test_kitti_697_sweeps_are_projected_as_the_published_evaluation_does(tmp_path: Path) -> None:
    points = kitti(tmp_path / "root")
    packed = pack_dataset("kitti_eigen697", tmp_path / "root", tmp_path / "out")["kitti_eigen697"]
    assert len(packed.samples) == 3
    expected = np.full(SIZE, np.inf)
    for forward, left, up in points.astype(float):
        if forward < 0:
            continue
        u, v, w = PROJECTION @ [-left + OFFSET[0], -up + OFFSET[1], forward + OFFSET[2], 1.0]
        row, col = round(v / w) - 1, round(u / w) - 1
        if w > 0 and 0 <= row < HEIGHT and 0 <= col < WIDTH:
            expected[row, col] = min(expected[row, col], forward)
    target = packed.target(f"{DATE}/{DRIVE}/image_02/data/{69:010d}.png")
    assert 100 < np.isfinite(expected).sum() < HEIGHT * WIDTH
    np.testing.assert_allclose(target, np.where(np.isfinite(expected), expected, np.nan), rtol=1e-6)


def test_kitti_official_list_has_697_frames_652_with_ground_truth(samples_dir: Path, tmp_path: Path) -> None:
    official = samples_dir / "splits/kitti_eigen_test_files_with_gt.txt"
    write(tmp_path / official.name, official.read_bytes())
    (tmp_path / "data_depth_annotated").mkdir()
    for date in ("09_26", "09_28", "09_29", "09_30", "10_03"):
        write(tmp_path / f"2011_{date}/calib_cam_to_cam.txt", f"P_rect_02: {text_of(PROJECTION)}\n")
    for name, count in (("kitti_eigen652", 652), ("kitti_eigen697", 697)):
        (pairs,) = read_dataset(name, tmp_path)
        assert len({pair.key for pair in pairs.pairs}) == pairs.expected == count


def test_kitti_real_sweep_falls_where_its_derived_map_has_points(samples_dir: Path, tmp_path: Path) -> None:
    """The map was made from the same sweep with z of the camera and pixels that are not shifted by one."""
    from depthkit.data.codecs import read_npz
    from depthkit.data.datasets.kitti import project_sweep, read_calibration

    sample = samples_dir / "labeled/kitti_object_lidar"
    given = read_calibration(sample / "calib/000000.txt")
    motion = given["Tr_velo_to_cam"].reshape(3, 4)
    derived = cv2.imread(str(sample / "depth_from_lidar/000000.png"), cv2.IMREAD_UNCHANGED) / 256
    camera = {"S_rect_02": derived.shape[::-1], "R_rect_00": given["R0_rect"], "P_rect_02": given["P2"]}
    write(tmp_path / "calib_cam_to_cam.txt", "".join(f"{name}: {text_of(value)}\n" for name, value in camera.items()))
    write(tmp_path / "calib_velo_to_cam.txt", f"R: {text_of(motion[:, :3])}\nT: {text_of(motion[:, 3])}\n")
    depth = read_npz(project_sweep(sample / "velodyne/000000.bin", tmp_path))
    around = cv2.dilate((derived > 0).astype(np.uint8), np.ones((5, 5))) > 0
    assert around[depth > 0].mean() > 0.99
    assert abs((depth > 0).sum() / (derived > 0).sum() - 1) < 0.02
    both = (np.roll(depth, (1, 1), (0, 1)) > 0) & (derived > 0)
    shift = np.roll(depth, (1, 1), (0, 1))[both] - derived[both]
    assert np.median(shift) == pytest.approx(0.33, abs=0.05)  # the laser stands behind the camera


def test_kitti_2015_disparity_becomes_metres(tmp_path: Path) -> None:
    training = tmp_path / "root/training"
    stored = np.random.default_rng(0).integers(256 * 5, 256 * 90, SIZE).astype(np.uint16)
    stored[:9] = 0
    write_image(training / "image_2/000007_10.png")
    write_image(training / "image_2/000007_11.png")
    write(training / "disp_occ_0/000007_10.png", stored)
    left, right = PROJECTION.copy(), PROJECTION.copy()
    left[0, 3], right[0, 3] = 0.9, -9.9
    calibration = f"calib_time: today\nP_rect_02: {text_of(left)}\nP_rect_03: {text_of(right)}\n"
    write(training / "calib_cam_to_cam/000007.txt", calibration)
    packed = pack_dataset("kitti2015", tmp_path / "root", tmp_path / "out")["kitti2015"]
    assert packed.samples.keys() == {"training/image_2/000007_10.png"}
    expected = np.where(stored > 0, 20 * 0.54 / np.where(stored > 0, stored / 256, 1), np.nan)
    np.testing.assert_allclose(packed.target("training/image_2/000007_10.png"), expected, rtol=1e-5)


# --- ETH3D, Sintel, DIODE --------------------------------------------------------------------------------------------


def test_eth3d_raw_floats_of_the_size_of_the_photograph(tmp_path: Path) -> None:
    root = tmp_path / "root"
    depth = np.random.default_rng(0).uniform(1, 60, SIZE).astype("<f4")
    depth[depth > 50] = np.inf
    for name, numbers in (("DSC_0001", depth), ("DSC_0002", depth[:-1])):
        write_image(root / f"office/images/dslr_images/{name}.JPG")
        write(root / f"office/ground_truth_depth/dslr_images/{name}.JPG", numbers.tobytes())
    write_image(root / "office/images/dslr_images/DSC_0003.JPG")
    calibration = root / "office/dslr_calibration_jpg"
    write(calibration / "cameras.txt", "# cameras\n4 THIN_PRISM_FISHEYE 32 24 30.5 30.6 16.5 12.5 0 0 0 0 0 0 0 0\n")
    images = (
        "# images\n9 1 0 0 0 0 0 0 4 dslr_images/DSC_0001.JPG\n1 2 3\n7 1 0 0 0 0 0 0 4 dslr_images/DSC_0002.JPG\n\n"
    )
    write(calibration / "images.txt", images)
    packed = pack_dataset("eth3d", root, tmp_path / "out", exit_code=1)["eth3d"]
    source_id = "office/images/dslr_images/DSC_0001.JPG"
    assert packed.samples.keys() == {source_id}
    np.testing.assert_array_equal(packed.target(source_id), np.where(np.isinf(depth), np.nan, depth))
    facts = packed.facts(source_id)
    assert facts["intrinsics_px"] == [30.5, 30.6, 16.5, 12.5]
    assert (facts["camera"], facts["sequence"]) == ("thin_prism_fisheye", "office")
    (row,) = rejected(tmp_path / "out", "eth3d")
    assert "736 numbers for an image of 32x24" in row["reason"]


def sintel(root: Path) -> np.ndarray:
    depth = np.random.default_rng(0).uniform(1, 60, SIZE).astype("<f4")
    scene = "training/{}/alley_1/frame_0003.{}"
    for seed, rendering in enumerate(("clean", "final")):
        write_image(root / scene.format(rendering, "png"), seed)
    write(root / scene.format("depth", "dpt"), b"PIEH" + struct.pack("<ii", WIDTH, HEIGHT) + depth.tobytes())
    camera = np.array([[30.0, 0, 16], [0, 31, 12], [0, 0, 1]])
    motion = np.array([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]])  # camera from world
    write(root / scene.format("camdata_left", "cam"), b"PIEH" + camera.tobytes() + motion.tobytes())
    return depth


@pytest.mark.parametrize("rendering", ["clean", "final"])
def test_sintel_depth_and_camera(rendering: str, tmp_path: Path) -> None:
    depth = sintel(tmp_path / "root")
    packed = pack_dataset(f"sintel_{rendering}", tmp_path / "root", tmp_path / "out")[f"sintel_{rendering}"]
    source_id = f"training/{rendering}/alley_1/frame_0003.png"
    assert packed.samples.keys() == {source_id}
    np.testing.assert_array_equal(packed.target(source_id), depth)
    facts = packed.facts(source_id)
    assert facts["intrinsics_px"] == [30, 31, 16, 12]
    world_from_camera = [[0, 1, 0, -2], [-1, 0, 0, 1], [0, 0, 1, -3], [0, 0, 0, 1]]
    np.testing.assert_allclose(facts["pose"], world_from_camera, atol=1e-12)
    assert (facts["sequence"], facts["frame"]) == ("alley_1", 3)


def test_sintel_depth_that_was_cut_off_is_rejected(tmp_path: Path) -> None:
    sintel(tmp_path / "root")
    label = tmp_path / "root/training/depth/alley_1/frame_0003.dpt"
    label.write_bytes(label.read_bytes()[:-4])
    assert pack_dataset("sintel_final", tmp_path / "root", tmp_path / "out", exit_code=1) == {}
    assert "are not a depth map of Sintel" in rejected(tmp_path / "out", "sintel_final")[0]["reason"]


@pytest.mark.parametrize(("name", "folder"), [("diode_indoor", "indoors"), ("diode_outdoor", "outdoor")])
def test_diode_mask_decides_what_was_measured(name: str, folder: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    depth, mask = rng.uniform(0.5, 90, (*SIZE, 1)).astype(np.float32), (rng.random(SIZE) < 0.7).astype(np.float64)
    for kind in ("indoors", "outdoor"):
        stem = tmp_path / "root/val" / kind / f"scene_00019/scan_00183/00019_00183_{kind}_000_010"
        write_image(stem.with_suffix(".png"))
        npy(stem.with_name(f"{stem.name}_depth.npy"), depth)
        npy(stem.with_name(f"{stem.name}_depth_mask.npy"), mask)
    packed = pack_dataset(name, tmp_path / "root", tmp_path / "out")[name]
    source_id = f"val/{folder}/scene_00019/scan_00183/00019_00183_{folder}_000_010.png"
    assert packed.samples.keys() == {source_id}
    np.testing.assert_array_equal(packed.target(source_id), np.where(mask == 1, depth[..., 0], np.nan))
    assert packed.facts(source_id)["intrinsics_px"] == [886.81, 927.06, 512, 384]


# --- DDAD ------------------------------------------------------------------------------------------------------------


def datum(key: str, name: str, kind: str, **fields: object) -> dict[str, object]:
    return {"key": key, "id": {"name": name}, "datum": {kind: fields}}


def ddad(root: Path) -> np.ndarray:
    """One training and one validation scene; points (N, 3) of the laser, which looks along x as the vehicle does."""
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(-30, 60, 900), rng.uniform(-20, 20, 900), rng.uniform(-8, 12, 900)])
    scene = root / "000150"
    write_image(scene / "rgb/CAMERA_01/15.png")
    (scene / "point_cloud/LIDAR").mkdir(parents=True)
    np.savez(scene / "point_cloud/LIDAR/16.npz", data=np.column_stack([points, rng.random(900)]))
    # The camera stands 1.5 m above the laser and has moved 0.2 m; its axes are right, down, forward.
    camera_pose = {
        "translation": {"x": 10.2, "y": 0.0, "z": 1.5},
        "rotation": {"qw": 0.5, "qx": -0.5, "qy": 0.5, "qz": -0.5},
    }
    laser_pose = {"translation": {"x": 10.0}, "rotation": {"qw": 1.0}}
    data = [
        datum("l", "LIDAR", "point_cloud", filename="point_cloud/LIDAR/16.npz", pose=laser_pose),
        datum("c", "CAMERA_01", "image", filename="rgb/CAMERA_01/15.png", height=HEIGHT, width=WIDTH, pose=camera_pose),
        datum("b", "CAMERA_05", "image", filename="rgb/CAMERA_05/15.png", height=9, width=9, pose=camera_pose),
    ]
    samples = [{"datum_keys": ["l", "b", "c"], "calibration_key": "k"}]
    write(scene / "scene_1.json", json.dumps({"data": data, "samples": samples}))
    intrinsics = [{"fx": 0.0}, {"fx": 20.0, "fy": 21.0, "cx": 16.0, "cy": 12.0}]
    write(scene / "calibration/k.json", json.dumps({"names": ["LIDAR", "CAMERA_01"], "intrinsics": intrinsics}))
    splits = {"0": {"filenames": ["000000/scene_0.json"]}, "1": {"filenames": ["000150/scene_1.json"]}}
    write(root / "ddad.json", json.dumps({"scene_splits": splits}))
    return points


def test_ddad_laser_seen_by_the_front_camera(tmp_path: Path) -> None:
    points = ddad(tmp_path / "root")
    packed = pack_dataset("ddad", tmp_path / "root", tmp_path / "out")["ddad"]
    assert packed.samples.keys() == {"000150/rgb/CAMERA_01/15.png"}
    expected = np.full(SIZE, np.inf)
    for forward, left, up in points:
        x, y, z = -left, 1.5 - up, forward - 0.2
        if z <= 0:
            continue
        row, col = int(np.floor(21 * y / z + 12)), int(np.floor(20 * x / z + 16))
        if 0 <= row < HEIGHT and 0 <= col < WIDTH:
            expected[row, col] = min(expected[row, col], z)
    assert 100 < np.isfinite(expected).sum() < HEIGHT * WIDTH
    target = packed.target("000150/rgb/CAMERA_01/15.png")
    np.testing.assert_allclose(target, np.where(np.isfinite(expected), expected, np.nan), rtol=1e-5)
    facts = packed.facts("000150/rgb/CAMERA_01/15.png")
    assert facts["intrinsics_px"] == [20, 21, 16, 12]
    np.testing.assert_allclose(
        facts["pose"], [[0, 0, 1, 10.2], [-1, 0, 0, 0], [0, -1, 0, 1.5], [0, 0, 0, 1]], atol=1e-9
    )


def test_bad_files_cost_their_own_sample_alone(tmp_path: Path) -> None:
    ddad(tmp_path / "ddad")
    (tmp_path / "ddad/000150/point_cloud/LIDAR/16.npz").write_bytes(b"PK\x03\x04 cut off")
    assert pack_dataset("ddad", tmp_path / "ddad", tmp_path / "out", exit_code=1) == {}
    assert "not a point cloud" in rejected(tmp_path / "out", "ddad")[0]["reason"]
    kitti(tmp_path / "kitti")
    (tmp_path / f"kitti/{DATE}/{DRIVE}/velodyne_points/data/{69:010d}.bin").write_bytes(bytes(4 * 7))
    packed = pack_dataset("kitti_eigen697", tmp_path / "kitti", tmp_path / "out", exit_code=1)["kitti_eigen697"]
    assert len(packed.samples) == 2
    sintel(tmp_path / "sintel")
    write_image(tmp_path / "sintel/training/final/alley_1/frame_0003_copy.png")
    assert len(pack_dataset("sintel_final", tmp_path / "sintel", tmp_path / "out")["sintel_final"].samples) == 1


def test_kitti_list_of_another_form_is_named(tmp_path: Path) -> None:
    kitti(tmp_path)
    write(tmp_path / "kitti_eigen_test_files_with_gt.txt", f"{DATE}/{DRIVE} 69 l\n")
    with pytest.raises(ValueError, match=r"kitti_eigen_test_files_with_gt.txt: line 1: .* is not 'IMAGE LABEL FOCAL'"):
        read_dataset("kitti_eigen652", tmp_path)
