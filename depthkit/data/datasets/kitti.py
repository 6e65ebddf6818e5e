"""KITTI: the Eigen frames with improved ground truth or with one laser sweep, and the stereo pairs of 2015.

Calibration files hold a line `NAME: NUMBERS` for each matrix. Camera 2 is the left colour camera.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.data.datasets.layouts import pairs_by_pattern, required
from depthkit.data.datasets.lidar import nearest_points
from depthkit.data.pairs import Pair, safe
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, file, npz

EIGEN_TEST, EIGEN_TRAIN = "kitti_eigen_test_files_with_gt.txt", "kitti_eigen_train_files_with_gt.txt"


def find_eigen_train(root: Path) -> dict[str, Iterator[Pair]]:
    """Those frames of Eigen's training drives that have improved ground truth (BTS, AdaBins, ZoeDepth)."""
    return {"train": _with_ground_truth(root, EIGEN_TRAIN)}


def find_eigen652(root: Path) -> dict[str, Iterator[Pair]]:
    """Those of the 697 frames that have improved ground truth, whose drives lie in train/ and val/."""
    return {"test": _with_ground_truth(root, EIGEN_TEST)}


def find_eigen697(root: Path) -> dict[str, Iterator[Pair]]:
    """All 697 frames with their laser sweep."""
    return {"test": (_pair(root, image, _sweep(root / image)) for image, _ in _eigen(root, EIGEN_TEST))}


def find_2015(root: Path) -> dict[str, Iterator[Pair]]:
    """The 200 training pairs, whose disparity covers occluded pixels too (disp_occ_0)."""
    training = root / "training"
    required(training / "disp_occ_0", "of data_scene_flow.zip")
    required(training / "calib_cam_to_cam", "of data_scene_flow_calib.zip")

    def facts_of(image: Path) -> dict[str, Any]:
        calibration = read_calibration(training / "calib_cam_to_cam" / f"{image.stem.partition('_')[0]}.txt")
        left, right = calibration["P_rect_02"], calibration["P_rect_03"]
        return {"intrinsics_px": projection_intrinsics(left), "baseline_m": (left[3] - right[3]) / left[0]}

    labels = training / "disp_occ_0"
    return {
        "test": pairs_by_pattern(
            root, f"training/image_2/{'[0-9]' * 6}_10.png", lambda p: labels / p.name, facts_of=facts_of
        )
    }


def project_sweep(path: Path, dates: Path) -> bytes:
    """A sweep as the field's evaluation code projects it, as .npz of (H, W) float32 metres.

    `path` holds float32 x (forward), y, z, reflectance for each point, `dates` is the folder with the calibration.
    Points behind the laser are left out, pixel = round(projection) - 1 as in KITTI's MATLAB code, the nearest wins.
    The value is x of the laser, not z of the camera, as in `generate_depth_map(..., vel_depth=True)` of monodepth2.
    """
    numbers = np.fromfile(path, np.float32)
    if numbers.size % 4:
        raise SampleError(f"{path}: {numbers.size} numbers are not a list of x, y, z, reflectance")
    points = numbers.reshape(-1, 4)[:, :3].astype(np.float64)
    projection, size = _projection(dates)
    projected = projection @ np.vstack([points.T, np.ones(len(points))])
    in_front = projected[2] > 0
    u, v, w = projected[:, in_front]
    rows, cols = np.rint(v / w).astype(np.int64) - 1, np.rint(u / w).astype(np.int64) - 1
    return npz(nearest_points(rows, cols, points[in_front, 0], size))


@lru_cache(maxsize=8)
def _projection(dates: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """(3, 4) from homogeneous laser points to homogeneous pixels of camera 2, and the (height, width) of its images."""
    camera = read_calibration(dates / "calib_cam_to_cam.txt")
    laser = read_calibration(dates / "calib_velo_to_cam.txt")
    motion, rectification = np.eye(4), np.eye(4)
    motion[:3] = np.column_stack([laser["R"].reshape(3, 3), laser["T"]])
    rectification[:3, :3] = camera["R_rect_00"].reshape(3, 3)
    width, height = camera["S_rect_02"].astype(int).tolist()
    return camera["P_rect_02"].reshape(3, 4) @ rectification @ motion, (height, width)


@lru_cache(maxsize=256)
def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """The lines of a calibration file that hold numbers; FileNotFoundError says what it belongs to."""
    lines = (line.partition(":") for line in required(path, "a calibration file of KITTI").read_text().splitlines())
    values = {}
    for name, _, text in lines:
        try:
            values[name] = np.array(text.split(), float)
        except ValueError:
            continue  # the date of the calibration
    return values


def _with_ground_truth(root: Path, name: str) -> Iterator[Pair]:
    return (_pair(root, image, file(_ground_truth(root, label))) for image, label in _eigen(root, name) if label)


def _eigen(root: Path, name: str) -> Iterator[tuple[str, str | None]]:
    """Image and improved ground truth of each line of a list, the latter None for a frame without."""
    cure = f"it ships with github.com/LiheYoung/Depth-Anything as metric_depth/train_test_inputs/{name}"
    for number, line in enumerate(required(root / name, cure).read_text().splitlines(), start=1):
        columns = line.split()
        if len(columns) != 3 or len(Path(columns[0]).parts) != 5:
            raise ValueError(f"{root / name}: line {number}: {line!r} is not 'IMAGE LABEL FOCAL'; {cure}")
        yield columns[0], None if columns[1] == "None" else columns[1]


def _ground_truth(root: Path, label: str) -> Path:
    folder = required(root / "data_depth_annotated", "of data_depth_annotated.zip, with its folders train/ and val/")
    train, val = folder / "train" / label, folder / "val" / label
    return train if train.is_file() else val


def _sweep(image: Path) -> Source:
    drive = image.parents[2]
    points = drive / "velodyne_points" / "data" / f"{image.stem}.bin"
    return Source(points, ".npz", project_sweep, (drive.parent,))


def _pair(root: Path, image: str, label: Source) -> Pair:
    """The key leaves out what all frames share: DATE/DATE_drive_0002_sync/image_02/data/0000000069.png."""
    date, drive, _, _, name = Path(image).parts
    calibration = read_calibration(root / date / "calib_cam_to_cam.txt")
    facts = {"source_id": image, "intrinsics_px": projection_intrinsics(calibration["P_rect_02"]), "sequence": drive}
    return Pair(
        key=safe(f"{drive}_{Path(name).stem}"),
        image=file(root / image),
        label=label,
        facts=facts | {"frame": int(Path(name).stem)},
    )


def projection_intrinsics(projection: np.ndarray) -> list[float]:
    """[fx, fy, cx, cy] of a (3, 4) projection matrix given as 12 numbers."""
    return projection[[0, 5, 2, 6]].tolist()
