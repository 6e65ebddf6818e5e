"""Evaluation sets indoors: miniatures of what their authors ship go through `depthkit pack` and come back in metres."""

import json
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
import scipy.io
from miniatures import SIZE, pack_dataset, rejected, write, write_image

from depthkit.data.datasets import read_dataset
from depthkit.data.facts import load_facts

HEIGHT, WIDTH = SIZE

NAMES = [
    "nyuv2_raw",
    "nyuv2_filled",
    "kitti_eigen652",
    "kitti_eigen697",
    "kitti2015",
    "eth3d",
    "sintel_clean",
    "sintel_final",
    "diode_indoor",
    "diode_outdoor",
    "ddad",
    "scannet",
    "scannet_val800",
    "sun_rgbd",
    "ibims1",
    "tum_rgbd",
    "seven_scenes",
    "middlebury2014",
    "da2k",
]


def millimetres(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    depth = np.random.default_rng(seed).integers(400, 9000, size).astype(np.uint16)
    depth[:2] = 0
    return depth


def metres(stored: np.ndarray, scale: float = 1000.0) -> np.ndarray:
    return np.where(stored > 0, stored / scale, np.nan)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_holds_nothing_of_the_set_is_explained(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing; .{10,}") as error:
        read_dataset(name, tmp_path)
    missing = Path(str(error.value).partition(": missing")[0]).relative_to(tmp_path)
    assert missing.parts[-1] in load_facts(name).layout or "SCENE" in load_facts(name).layout


# --- NYU Depth v2 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nyu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """Five frames, of which the second and the fifth are for the test; arrays (N, ..., H, W) as a person sees them."""
    root, rng = tmp_path_factory.mktemp("nyu"), np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (5, 3, HEIGHT, WIDTH), np.uint8),
        "depths": rng.uniform(1, 9, (5, HEIGHT, WIDTH)).astype(np.float32),
    }
    arrays["rawDepths"] = np.where(rng.random((5, HEIGHT, WIDTH)) < 0.2, 0, arrays["depths"])
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as content:
        for name, array in arrays.items():
            content[name] = array.swapaxes(-1, -2)
    ndxs = {"trainNdxs": np.uint16([[1], [3], [4]]), "testNdxs": np.uint16([[2], [5]])}
    scipy.io.savemat(root / "splits.mat", ndxs)
    return root, arrays


@pytest.mark.parametrize(("name", "field"), [("nyuv2_raw", "rawDepths"), ("nyuv2_filled", "depths")])
def test_nyu_frames_come_out_of_the_matlab_file(name: str, field: str, nyu, tmp_path: Path) -> None:
    root, arrays = nyu
    packed = pack_dataset(name, root, tmp_path)[name]
    assert packed.manifest.split == "test"
    assert packed.samples.keys() == {"nyu_depth_v2_labeled.mat/2", "nyu_depth_v2_labeled.mat/5"}
    for number in (2, 5):
        source_id = f"nyu_depth_v2_labeled.mat/{number}"
        np.testing.assert_array_equal(packed.image(source_id), arrays["images"][number - 1].transpose(1, 2, 0))
        depth = arrays[field][number - 1]
        np.testing.assert_array_equal(packed.target(source_id), np.where(depth > 0, depth, np.nan))
    assert packed.facts("nyu_depth_v2_labeled.mat/5")["intrinsics_px"][0] == pytest.approx(518.858, abs=1e-3)


def test_nyu_official_split_has_654_test_frames(samples_dir: Path, nyu, tmp_path: Path) -> None:
    write(tmp_path / "splits.mat", (samples_dir / "splits/nyuv2_splits.mat").read_bytes())
    (tmp_path / "nyu_depth_v2_labeled.mat").symlink_to(nyu[0] / "nyu_depth_v2_labeled.mat")
    (pairs,) = read_dataset("nyuv2_raw", tmp_path)
    keys = [pair.key for pair in pairs.pairs]
    assert len(keys) == pairs.expected == 654
    assert keys[:3] == ["0001", "0002", "0009"]


# --- ScanNet, 7-Scenes, TUM: sequences -------------------------------------------------------------------------------


def scannet(root: Path) -> Path:
    """Two scenes, colour slightly wider than depth as in the original (1296x968 and 640x480)."""
    for seed, scene in enumerate(("scene0707_00", "scene0011_00")):
        write_image(root / scene / "color" / "20.jpg", seed, (968, 1296))
        write(root / scene / "depth" / "20.png", millimetres(seed, (480, 640)))
        write(root / scene / "intrinsic/intrinsic_color.txt", "1296 0 648 0\n0 968 484 0\n0 0 1 0\n0 0 0 1\n")
    write(root / "scannetv2_test.txt", "scene0707_00\nscene0708_00\n")
    write(root / "scannet_val_sampled_list_800_1.txt", "scene0011_00/color/20.jpg scene0011_00/depth/20.png\n")
    return root


@pytest.mark.parametrize(
    ("name", "seed", "scene"), [("scannet", 0, "scene0707_00"), ("scannet_val800", 1, "scene0011_00")]
)
def test_scannet_takes_listed_frames_and_the_camera_of_the_label(
    name: str, seed: int, scene: str, tmp_path: Path
) -> None:
    packed = pack_dataset(name, scannet(tmp_path / "root"), tmp_path / "out")[name]
    assert packed.samples.keys() == {f"{scene}/color/20.jpg"}
    np.testing.assert_allclose(packed.target(f"{scene}/color/20.jpg"), metres(millimetres(seed, (480, 640))), rtol=1e-6)
    facts = packed.facts(f"{scene}/color/20.jpg")
    assert facts["intrinsics_px"] == pytest.approx([640, 480, 320, 240])
    assert (facts["sequence"], facts["frame"]) == (scene, 20)


def seven_scenes(root: Path, samples: Path) -> np.ndarray:
    """Real frames at their place, one of them in a training sequence; the depth of frame 30."""
    write(root / "redkitchen/TestSplit.txt", "sequence3 \nsequence12\n")
    write(root / "heads/TestSplit.txt", "sequence1\n")
    for sequence, frame in (("seq-03", 30), ("seq-12", 31), ("seq-01", 32)):
        name = f"video/rgbd_7scenes_redkitchen/frame-{frame:06d}"
        stem = root / "redkitchen" / sequence / f"frame-{frame:06d}"
        write(stem.with_suffix(".color.png"), cv2.imread(str(samples / f"{name}.color.jpg")))
        write(stem.with_suffix(".depth.png"), (samples / f"{name}.depth.png").read_bytes())
        write(stem.with_suffix(".pose.txt"), (samples / f"{name}.pose.txt").read_bytes())
    return cv2.imread(str(root / "redkitchen/seq-03/frame-000030.depth.png"), cv2.IMREAD_UNCHANGED)


def test_seven_scenes_takes_test_sequences_with_poses(samples_dir: Path, tmp_path: Path) -> None:
    stored = seven_scenes(tmp_path / "root", samples_dir)
    stored[0, 0], stored[0, 1] = 65535, 1234
    write(tmp_path / "root/redkitchen/seq-03/frame-000030.depth.png", stored)
    packed = pack_dataset("seven_scenes", tmp_path / "root", tmp_path / "out")["seven_scenes"]
    first, second = "redkitchen/seq-03/frame-000030.color.png", "redkitchen/seq-12/frame-000031.color.png"
    assert packed.samples.keys() == {first, second}
    target = packed.target(first)
    np.testing.assert_allclose(target, np.where(stored == 65535, np.nan, metres(stored)), rtol=1e-6)
    assert np.isnan(target[0, 0])
    assert target[0, 1] == pytest.approx(1.234)
    facts = packed.facts(first)
    pose = np.loadtxt(samples_dir / "video/rgbd_7scenes_redkitchen/frame-000030.pose.txt")
    np.testing.assert_array_equal(facts["pose"], pose)
    assert (facts["sequence"], facts["frame"]) == ("redkitchen/seq-03", 30)
    assert facts["intrinsics_px"] == [585, 585, 320, 240]


def tum(root: Path) -> None:
    """Images at 10.00, 10.03, 10.50; depth 4 ms before the first, 11 ms from the second, none near the third."""
    sequence = root / "rgbd_dataset_freiburg2_desk"
    for seed, time in enumerate(("10.000", "10.030", "10.500")):
        write_image(sequence / "rgb" / f"{time}.png", seed)
    for seed, time in enumerate(("9.996", "10.019", "10.525")):
        write(sequence / "depth" / f"{time}.png", millimetres(seed) * 5)
    for name in ("rgb", "depth"):
        times = sorted(path.stem for path in (sequence / name).iterdir())
        lines = "".join(f"{time} {name}/{time}.png\n" for time in sorted(times, key=float))
        write(sequence / f"{name}.txt", f"# timestamp filename\n{lines}")
    half = np.sqrt(0.5)
    poses = f"# timestamp tx ty tz qx qy qz qw\n10.001 1 2 3 0 0 {half} {half}\n10.2 0 0 0 0 0 0 1\n"
    write(sequence / "groundtruth.txt", poses)


def test_tum_associates_by_time(tmp_path: Path) -> None:
    tum(tmp_path / "root")
    packed = pack_dataset("tum_rgbd", tmp_path / "root", tmp_path / "out")["tum_rgbd"]
    names = [f"rgbd_dataset_freiburg2_desk/rgb/{time}.png" for time in ("10.000", "10.030")]
    assert sorted(packed.samples) == names
    for seed, name in enumerate(names):
        np.testing.assert_allclose(packed.target(name), metres(millimetres(seed)), rtol=1e-6)
    quarter_turn_about_z = [[0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(packed.facts(names[0])["pose"], quarter_turn_about_z, atol=1e-9)
    assert "pose" not in packed.facts(names[1])
    assert packed.facts(names[0])["intrinsics_px"] == [520.9, 521.0, 325.1, 249.7]


def test_tum_times_are_used_once_and_the_closest_win() -> None:
    from depthkit.data.datasets.tum import associate

    assert associate([1.00, 1.01], [1.008, 1.025]) == [(1, 0)]  # 1.008 goes to 1.01; 1.025 is too far from 1.00
    assert associate([2.0, 1.0], [1.001, 5.0, 2.019]) == [(0, 2), (1, 0)]  # neither list need be sorted
    assert associate([1.0], []) == []


def test_tum_real_frame(samples_dir: Path, tmp_path: Path) -> None:
    sequence, sample = tmp_path / "root/rgbd_dataset_freiburg3_office", samples_dir / "labeled/tum_open3d"
    write(sequence / "rgb/1.5.png", (sample / "rgb/TUM_color.png").read_bytes())
    label = write(sequence / "depth/1.51.png", (sample / "depth/TUM_depth.png").read_bytes())
    write(sequence / "rgb.txt", "1.5 rgb/1.5.png\n")
    write(sequence / "depth.txt", "1.51 depth/1.51.png\n")
    packed = pack_dataset("tum_rgbd", tmp_path / "root", tmp_path / "out")["tum_rgbd"]
    stored = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
    target = packed.target("rgbd_dataset_freiburg3_office/rgb/1.5.png")
    np.testing.assert_allclose(target, metres(stored, 5000), rtol=1e-6)
    assert 0.5 < np.nanmedian(target) < 5


# --- SUN RGB-D -------------------------------------------------------------------------------------------------------


def sun_rgbd(root: Path, samples: Path) -> None:
    real, sample = root / "SUNRGBD/kv2/kinect2data/000144_frame-resize", samples / "labeled/sunrgbd_kinect2"
    write(real / "image/0000144.jpg", (sample / "rgb/0000144.jpg").read_bytes())
    write(real / "depth_bfx/0000144.png", (sample / "depth_bfx/0000144.png").read_bytes())
    write(real / "intrinsics.txt", (sample / "intrinsics.txt").read_bytes())
    made, stored = root / "SUNRGBD/kv1/NYUdata/NYU0001", millimetres(1)
    write_image(made / "image/NYU0001.jpg")
    write(made / "depth_bfx/NYU0001.png", (stored << 3) | (stored >> 13))
    write(made / "intrinsics.txt", "518.8 0 320 0 519.4 240 0 0 1")
    write_image(root / "SUNRGBD/kv1/NYUdata/NYU0002/image/NYU0002.jpg")
    (root / "SUNRGBDtoolbox/traintestSUNRGBD").mkdir(parents=True)
    frames = ["kv2/kinect2data/000144_frame-resize", "kv1/NYUdata/NYU0001/", "xtion/not_unpacked"]
    cells = np.array([f"/n/fs/sun3d/data/SUNRGBD/{frame}" for frame in frames], dtype=object)
    splits = {"alltest": cells[None], "alltrain": np.array([["/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0002"]], object)}
    scipy.io.savemat(root / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", splits)


def test_sun_rgbd_takes_the_test_frames_of_the_toolbox(samples_dir: Path, tmp_path: Path) -> None:
    sun_rgbd(tmp_path / "root", samples_dir)
    packed = pack_dataset("sun_rgbd", tmp_path / "root", tmp_path / "out", exit_code=1)["sun_rgbd"]
    real, made = "SUNRGBD/kv2/kinect2data/000144_frame-resize", "SUNRGBD/kv1/NYUdata/NYU0001"
    assert packed.samples.keys() == {real, made}
    assert [row["id"] for row in rejected(tmp_path / "out", "sun_rgbd")] == ["SUNRGBD/xtion/not_unpacked"]
    np.testing.assert_allclose(packed.target(made), metres(millimetres(1)), rtol=1e-6)
    assert packed.facts(made)["intrinsics_px"] == [518.8, 519.4, 320, 240]
    assert packed.facts(real)["intrinsics_px"] == [529.5, 529.5, 365, 265]
    assert 0.5 < np.nanmin(packed.target(real)) < np.nanmax(packed.target(real)) < 12


# --- iBims-1, Middlebury ---------------------------------------------------------------------------------------------


def test_ibims_masks_become_holes(tmp_path: Path) -> None:
    root, stored = tmp_path / "root/ibims1_core_raw", millimetres(3)
    masks = {"mask_invalid": np.full(SIZE, 255, np.uint8), "mask_transp": np.ones(SIZE, np.uint8)}
    masks["mask_invalid"][5], masks["mask_transp"][:, 7] = 0, 0
    write_image(root / "rgb/corridor_01.png")
    write(root / "depth/corridor_01.png", stored)
    for name, mask in masks.items():
        write(root / name / "corridor_01.png", mask)
    write(root / "calib/corridor_01.txt", "550.4,0,320\n0,551.2,240\n0,0,1\n")
    packed = pack_dataset("ibims1", tmp_path / "root", tmp_path / "out")["ibims1"]
    expected = metres(stored, 65535 / 50)
    expected[5], expected[:, 7] = np.nan, np.nan
    source_id = "ibims1_core_raw/rgb/corridor_01.png"
    np.testing.assert_allclose(packed.target(source_id), expected, rtol=1e-6)
    assert packed.facts(source_id)["intrinsics_px"] == [550.4, 551.2, 320, 240]


def test_middlebury_real_scene_in_metres(samples_dir: Path, tmp_path: Path) -> None:
    scene, sample = tmp_path / "root/Motorcycle", samples_dir / "labeled/middlebury_motorcycle"
    for name, original in {"im0.png": "left.png", "disp0GT.pfm": "disp0GT.pfm", "calib.txt": "calib.txt"}.items():
        write(scene / name, (sample / original).read_bytes())
    write_image(tmp_path / "root/Test_without_truth/im0.png")
    packed = pack_dataset("middlebury2014", tmp_path / "root", tmp_path / "out")["middlebury2014"]
    assert packed.samples.keys() == {"Motorcycle/im0.png"}
    disparity = np.frombuffer((sample / "disp0GT.pfm").read_bytes()[-4 * 741 * 497 :], "<f4").reshape(497, 741)[::-1]
    expected = np.where(np.isfinite(disparity), 0.193001 * 999.421 / (disparity + 32.778), np.nan)
    np.testing.assert_allclose(packed.target("Motorcycle/im0.png"), expected, rtol=1e-5)
    assert packed.facts("Motorcycle/im0.png")["intrinsics_px"] == [999.421, 999.421, 294.182, 252.932]


def test_middlebury_original_archives_name_the_disparity_disp0(tmp_path: Path) -> None:
    scene = tmp_path / "root/Piano-perfect"
    write_image(scene / "im0.png")
    disparity = np.random.default_rng(0).uniform(20, 60, SIZE).astype("<f4")
    write(scene / "disp0.pfm", b"Pf\n%d %d\n-0.0039\n" % (WIDTH, HEIGHT) + disparity[::-1].tobytes())
    write(scene / "calib.txt", "cam0=[30.5 0 16; 0 30.5 12; 0 0 1]\ndoffs=1.5\nbaseline=200\nwidth=32\nheight=24\n")
    packed = pack_dataset("middlebury2014", tmp_path / "root", tmp_path / "out")["middlebury2014"]
    np.testing.assert_allclose(packed.target("Piano-perfect/im0.png"), 0.2 * 30.5 / (disparity + 1.5), rtol=1e-5)


# --- DA-2K -----------------------------------------------------------------------------------------------------------


def test_da2k_pairs_travel_as_facts(tmp_path: Path) -> None:
    root = tmp_path / "root"
    annotations = {
        "images/indoor/a.jpg": [{"point1": [3, 5], "point2": [20, 30], "closer_point": "point1"}],
        "images/aerial/a.jpg": [
            {"point1": [1, 2], "point2": [3, 4], "closer_point": "point2"},
            {"point1": [5, 6], "point2": [7, 8], "closer_point": "point1"},
        ],
    }
    for seed, path in enumerate(annotations):
        write_image(root / path, seed)
    write(root / "annotations.json", json.dumps(annotations))
    packed = pack_dataset("da2k", root, tmp_path / "out")["da2k"]
    assert packed.manifest.target is None
    assert packed.samples.keys() == annotations.keys()
    assert packed.facts("images/aerial/a.jpg")["pairs"] == [[1, 2, 3, 4, 2], [5, 6, 7, 8, 1]]
    assert packed.facts("images/indoor/a.jpg")["pairs"] == [[3, 5, 20, 30, 1]]
    assert packed.facts("images/indoor/a.jpg")["scene_type"] == "indoor"
