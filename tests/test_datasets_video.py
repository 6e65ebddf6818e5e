"""Data sets of videos: miniatures go through `depthkit pack` and come back as runs of frames with camera and motion."""

import json
from pathlib import Path

import numpy as np
import pytest
from miniatures import SIZE, Packed, pack_dataset, write, write_image

from depthkit.config import DatasetConfig
from depthkit.data.clips import ClipReader
from depthkit.data.datasets import read_dataset
from depthkit.data.facts import load_facts
from depthkit.data.windows import full_window

DATE = "2011_09_26"


def runs(packed: Packed) -> list[tuple[int, ...]]:
    return [shard.runs for shard in packed.manifest.shards]


def first_clip_is_read(folder: Path, num_frames: int = 2) -> None:
    reader = ClipReader(
        "v", DatasetConfig(manifest=str(folder / "manifest.json")), None, num_frames=num_frames, stride=1
    )
    clip = reader.read(0, 0, lambda size: full_window(size, size))
    assert clip.image.shape[0] == num_frames


@pytest.mark.parametrize("name", ["kitti_raw", "kitti_odometry", "cityscapes", "seven_scenes_train"])
def test_a_folder_that_holds_nothing_of_the_set_is_explained(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing; .{10,}") as error:
        read_dataset(name, tmp_path)
    missing = Path(str(error.value).partition(": missing")[0]).relative_to(tmp_path)
    assert missing.parts[-1] in load_facts(name).layout


# --- KITTI raw -------------------------------------------------------------------------------------------------------


def kitti_raw(root: Path) -> Path:
    """Two drives of five frames, one of them a test scene; frame 2 of the other is static."""
    for drive in ("0001", "0002"):
        for camera in ("image_00", "image_02", "image_03"):
            for frame in range(5):
                write_image(root / DATE / f"{DATE}_drive_{drive}_sync/{camera}/data/{frame:010d}.png", frame)
    matrix = "700 0 600 {} 0 710 180 0 0 0 1 0"
    lines = ["calib_time: 09-Jan-2012", f"P_rect_02: {matrix.format(45)}", f"P_rect_03: {matrix.format(-340)}"]
    lines[2] = lines[2].replace("600", "601")
    write(root / DATE / "calib_cam_to_cam.txt", "\n".join(lines))
    write(root / "test_scenes_eigen.txt", f"{DATE}_drive_0002\n{DATE}_drive_0009\n")
    write(root / "static_frames.txt", f"{DATE} {DATE}_drive_0001_sync 0000000002\n\n")
    return root


def test_kitti_raw_leaves_out_test_scenes_and_frames_of_a_standing_car(tmp_path: Path) -> None:
    packed = pack_dataset("kitti_raw", kitti_raw(tmp_path / "root"), tmp_path / "out")["kitti_raw"]
    assert packed.manifest.target is None
    folder = f"{DATE}/{DATE}_drive_0001_sync"
    frames = (0, 1, 3, 4)
    assert list(packed.samples) == [f"{folder}/image_0{c}/data/{n:010d}.png" for c in (2, 3) for n in frames]
    assert runs(packed) == [(2, 2, 2, 2)]
    left, right = (packed.facts(f"{folder}/image_0{c}/data/0000000003.png") for c in (2, 3))
    assert (left["sequence"], left["frame"]) == (f"{DATE}_drive_0001_sync/image_02", 3)
    assert left["intrinsics_px"] == [700, 710, 600, 180]
    assert right["intrinsics_px"] == [700, 710, 601, 180]
    first_clip_is_read(tmp_path / "out" / "kitti_raw")


def test_a_list_of_static_frames_in_another_form_is_refused(tmp_path: Path) -> None:
    root = kitti_raw(tmp_path)
    write(root / "static_frames.txt", "0000000002\n")
    with pytest.raises(ValueError, match=r"static_frames\.txt: '0000000002' is not 'DATE DRIVE FRAME'; it ships with"):
        read_dataset("kitti_raw", root)


# --- KITTI odometry --------------------------------------------------------------------------------------------------


def test_kitti_odometry_has_the_poses_of_the_colour_camera(tmp_path: Path) -> None:
    root, rng = tmp_path / "root", np.random.default_rng(0)
    grey = {}
    for number, count in (("09", 3), ("00", 2)):
        for frame in range(count):
            write_image(root / f"sequences/{number}/image_2/{frame:06d}.png", frame)
        grey[number] = np.tile(np.eye(4), (count, 1, 1))
        for pose in grey[number]:
            pose[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
            pose[:3, 3] = rng.normal(size=3)
        rows = [" ".join(map(repr, pose[:3].ravel().tolist())) for pose in grey[number]]
        write(root / f"poses/{number}.txt", "\n".join(rows))
        write(
            root / f"sequences/{number}/calib.txt",
            "P0: 700 0 600 0 0 700 180 0 0 0 1 0\nP2: 700 0 600 42 0 700 180 7 0 0 1 0.1\n",
        )
    packed = pack_dataset("kitti_odometry", root, tmp_path / "out")
    assert {name: (p.manifest.split, runs(p)) for name, p in packed.items()} == {
        "kitti_odometry": ("test", [(3,)]),
        "kitti_odometry_train": ("train", [(2,)]),
    }
    facts = packed["kitti_odometry"].facts("sequences/09/image_2/000002.png")
    assert facts["intrinsics_px"] == [700, 700, 600, 180]
    # P2 maps points of the grey camera; those of the colour camera are K^-1 P2 away.
    matrix = np.array([[700, 0, 600], [0, 700, 180], [0, 0, 1]])
    colour_from_grey = np.eye(4)
    colour_from_grey[:3, 3] = np.linalg.inv(matrix) @ [42, 7, 0.1]
    np.testing.assert_allclose(facts["pose"], grey["09"][2] @ np.linalg.inv(colour_from_grey), atol=1e-12)
    first_clip_is_read(tmp_path / "out" / "kitti_odometry", 3)

    write(root / "poses/09.txt", " ".join(["1"] * 24))
    with pytest.raises(ValueError, match=r"09\.txt: 2 poses for the 3 images"):
        read_dataset("kitti_odometry", root)


# --- Cityscapes ------------------------------------------------------------------------------------------------------


def cityscapes(root: Path) -> Path:
    """Two snippets of one sequence, each with a camera at its second frame; and one of another city."""
    frames = [("bochum_000000", n) for n in (10, 11, 12, 40, 41)] + [("aachen_000003", n) for n in range(2)]
    for sequence, frame in frames:
        city = sequence.partition("_")[0]
        write_image(root / f"leftImg8bit_sequence/train/{city}/{sequence}_{frame:06d}_leftImg8bit.png", frame)
        if frame in (1, 11, 41):
            camera = {"intrinsic": {"fx": 2262.5 + frame, "fy": 2265.3, "u0": 1096.98, "v0": 513.1}}
            write(root / f"camera/train/{city}/{sequence}_{frame:06d}_camera.json", json.dumps(camera))
    return root


def test_cityscapes_keeps_the_rows_above_the_car_and_the_camera_of_the_snippet(tmp_path: Path) -> None:
    root = cityscapes(tmp_path / "root")
    packed = pack_dataset("cityscapes", root, tmp_path / "out")["cityscapes"]
    assert runs(packed) == [(2, 3, 2)]
    names = {n: f"leftImg8bit_sequence/train/bochum/bochum_000000_{n:06d}_leftImg8bit.png" for n in (10, 40)}
    whole = np.random.default_rng(40).integers(0, 256, (*SIZE, 3), np.uint8)
    np.testing.assert_array_equal(packed.image(names[40]), whole[: SIZE[0] * 3 // 4, :, ::-1])
    assert packed.facts(names[10])["intrinsics_px"] == [2273.5, 2265.3, 1096.98, 513.1]
    assert packed.facts(names[40])["intrinsics_px"][0] == 2303.5
    assert (packed.facts(names[10])["sequence"], packed.facts(names[10])["frame"]) == ("bochum_000000", 10)
    first_clip_is_read(tmp_path / "out" / "cityscapes")


def test_a_snippet_without_a_camera_is_named(tmp_path: Path) -> None:
    root = cityscapes(tmp_path)
    (root / "camera/train/aachen/aachen_000003_000001_camera.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"aachen_000003_\*_camera\.json: missing; of camera_trainvaltest"):
        read_dataset("cityscapes", root)


# --- 7-Scenes, TUM ---------------------------------------------------------------------------------------------------


def test_seven_scenes_train_takes_the_images_of_training_sequences(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root / "chess/TrainSplit.txt", "sequence1\nsequence2\n")
    write(root / "chess/TestSplit.txt", "sequence3\n")
    for sequence in (1, 2, 3):
        for frame in range(3):
            stem = root / f"chess/seq-{sequence:02d}/frame-{frame:06d}"
            write_image(stem.with_suffix(".color.png"), frame)
            write(stem.with_suffix(".pose.txt"), "1 0 0 0.5\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    packed = pack_dataset("seven_scenes_train", root, tmp_path / "out")["seven_scenes_train"]
    assert (packed.manifest.split, packed.manifest.target, runs(packed)) == ("train", None, [(3, 3)])
    facts = packed.facts("chess/seq-02/frame-000001.color.png")
    assert facts["intrinsics_px"] == [525, 525, 320, 240]
    assert facts["pose"][0] == [1, 0, 0, 0.5]
    first_clip_is_read(tmp_path / "out" / "seven_scenes_train", 3)


def test_frames_of_tum_without_a_depth_map_end_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "root/rgbd_dataset_freiburg1_desk"
    times = [1.0, 1.03, 1.06, 1.09, 1.12]
    for time in times:
        write_image(folder / f"rgb/{time:.2f}.png", round(100 * time))
        write(folder / f"depth/{time:.2f}.png", np.full(SIZE, 5000, np.uint16))
    write(folder / "rgb.txt", "".join(f"{time:.2f} rgb/{time:.2f}.png\n" for time in times))
    write(folder / "depth.txt", "".join(f"{time:.2f} depth/{time:.2f}.png\n" for time in times if time != 1.06))
    write(folder / "groundtruth.txt", "".join(f"{time:.2f} {time} 0 0 0 0 0 1\n" for time in times))
    packed = pack_dataset("tum_rgbd", tmp_path / "root", tmp_path / "out")["tum_rgbd"]
    assert runs(packed) == [(2, 2)]
    reader = ClipReader(
        "tum", DatasetConfig(manifest=str(tmp_path / "out/tum_rgbd/manifest.json")), "depth", num_frames=2, stride=1
    )
    clip = reader.read(0, 0, lambda size: full_window(size, size))
    assert clip.valid_mask.all()
    assert (clip.target == 1).all()
    np.testing.assert_allclose(clip.camera_to_world[1, :3, 3], [0.03, 0, 0], atol=1e-6)
