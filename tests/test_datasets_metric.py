"""The training frames of NYU and KITTI for depth in metres: miniatures go through `depthkit pack` and come back."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from miniatures import SIZE, pack_dataset, rejected, write, write_image
from test_datasets_evaluation_outdoor import DATE, DRIVE, kitti

from depthkit.data.datasets import read_dataset
from depthkit.data.facts import load_facts

NYU_LIST, KITTI_LIST = "nyudepthv2_train_files_with_gt.txt", "kitti_eigen_train_files_with_gt.txt"


def nyu(root: Path) -> dict[str, np.ndarray]:
    rng, labels = np.random.default_rng(0), {}
    lines = []
    for scene, number in (("kitchen_0028b", 45), ("kitchen_0028b", 9), ("living_room_0019", 111)):
        image, label = f"{scene}/rgb_{number:05d}.jpg", f"{scene}/sync_depth_{number:05d}.png"
        write_image(root / image, number)
        labels[image] = np.where(rng.random(SIZE) < 0.2, 0, rng.integers(700, 9999, SIZE)).astype(np.uint16)
        write(root / label, labels[image])
        lines.append(f"/{image} /{label} 518.8579\n")
    write(root / NYU_LIST, "".join(lines))
    return labels


def test_nyu_training_frames(tmp_path: Path) -> None:
    labels = nyu(tmp_path / "root")
    packed = pack_dataset("nyuv2_train", tmp_path / "root", tmp_path / "out")["nyuv2_train"]
    assert packed.samples.keys() == labels.keys()
    for name, stored in labels.items():
        np.testing.assert_allclose(packed.target(name), np.where(stored > 0, stored / 1000, np.nan), rtol=1e-6)
    facts = packed.facts("kitchen_0028b/rgb_00045.jpg")
    assert (facts["sequence"], facts["frame"]) == ("kitchen_0028b", 45)
    assert facts["intrinsics_px"][0] == pytest.approx(518.8579, abs=1e-4)


def test_nyu_frame_that_is_not_there_is_listed(tmp_path: Path) -> None:
    nyu(tmp_path / "root")
    (tmp_path / "root/kitchen_0028b/sync_depth_00009.png").unlink()
    packed = pack_dataset("nyuv2_train", tmp_path / "root", tmp_path / "out", exit_code=1)["nyuv2_train"]
    assert len(packed.samples) == 2
    assert "sync_depth_00009.png" in str(rejected(tmp_path / "out", "nyuv2_train"))


def test_nyu_list_of_another_form_is_named(tmp_path: Path) -> None:
    write(tmp_path / NYU_LIST, "/kitchen_0028b/rgb_00045.jpg 518.8579\n")
    with pytest.raises(ValueError, match=r"line 1: .* is not '/SCENE/rgb_NNNNN.jpg LABEL FOCAL'"):
        read_dataset("nyuv2_train", tmp_path)


def test_kitti_training_frames_are_those_of_their_own_list(tmp_path: Path) -> None:
    kitti(tmp_path / "root")
    image = f"{DATE}/{DRIVE}/image_02/data/{69:010d}.png"
    label = f"{DRIVE}/proj_depth/groundtruth/image_02/{69:010d}.png"
    write(tmp_path / "root" / KITTI_LIST, f"{image} {label} 721.5377\n")
    packed = pack_dataset("kitti_eigen_train", tmp_path / "root", tmp_path / "out")["kitti_eigen_train"]
    assert packed.samples.keys() == {image}
    stored = cv2.imread(str(tmp_path / "root/data_depth_annotated/train" / label), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(packed.target(image), np.where(stored > 0, stored / 256, np.nan), rtol=1e-6)
    assert packed.facts(image)["intrinsics_px"] == [20, 21, 16, 12]


@pytest.mark.parametrize(("name", "images"), [("kitti_eigen_train", 23158), ("nyuv2_train", 24231)])
def test_the_number_of_frames_is_the_published_one(name: str, images: int) -> None:
    assert load_facts(name).splits["train"].images == images
