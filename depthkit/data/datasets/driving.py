"""Videos from cars, images alone: KITTI raw and Cityscapes as SfMLearner and vid2depth learn from them, and KITTI's
odometry benchmark with its poses."""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from depthkit.data.datasets.kitti import projection_intrinsics, read_calibration
from depthkit.data.datasets.layouts import read_numbers, required
from depthkit.data.decode import decode_image
from depthkit.data.pairs import Pair, PairStream, safe
from depthkit.data.quarantine import SampleError
from depthkit.data.sources import Source, file, png

DIGITS = "[0-9]"
EIGEN_SCENES, STATIC_FRAMES = "test_scenes_eigen.txt", "static_frames.txt"
SHIPPED = "it ships with github.com/tinghuiz/SfMLearner as data/kitti"
ODOMETRY = {"test": ("09", "10"), "train": ("00", "01", "02", "03", "04", "05", "06", "07", "08")}
KEPT_ROWS = 0.75
"""Of a Cityscapes image, from the top: below stands the car itself (SfMLearner cityscapes_loader.py)."""


# --- KITTI raw -------------------------------------------------------------------------------------------------------


def find_kitti_raw(root: Path) -> dict[str, PairStream]:
    """Both colour cameras of every drive outside Eigen's 28 test scenes, without the frames of a standing car."""
    scenes = set(_lines(root / EIGEN_SCENES, f"{SHIPPED}/{EIGEN_SCENES}"))
    static = set()
    for line in _lines(root / STATIC_FRAMES, f"{SHIPPED}/{STATIC_FRAMES}"):
        columns = line.split()
        if len(columns) != 3 or not columns[2].isdecimal():
            raise ValueError(f"{root / STATIC_FRAMES}: {line!r} is not 'DATE DRIVE FRAME'; {SHIPPED}/{STATIC_FRAMES}")
        static.add((columns[1], int(columns[2])))

    def find() -> Iterator[Pair]:
        for folder in sorted(root.glob(f"{DIGITS * 4}_*/*_drive_{DIGITS * 4}_sync/image_0[23]/data")):
            drive, camera = folder.parts[-3], folder.parts[-2]
            if drive.removesuffix("_sync") not in scenes:
                for image in sorted(folder.glob(f"{DIGITS * 10}.png")):
                    if (drive, int(image.stem)) not in static:
                        yield _kitti_frame(root, image, drive, camera)

    return {"train": PairStream(find)}


def _lines(path: Path, cure: str) -> list[str]:
    return [line.strip() for line in required(path, cure).read_text().splitlines() if line.strip()]


def _kitti_frame(root: Path, image: Path, drive: str, camera: str) -> Pair:
    calibration = read_calibration(image.parents[3] / "calib_cam_to_cam.txt")
    facts = {
        "source_id": image.relative_to(root).as_posix(),
        "intrinsics_px": projection_intrinsics(calibration[f"P_rect_{camera[-2:]}"]),
        "sequence": f"{drive}/{camera}",
        "frame": int(image.stem),
    }
    return Pair(key=safe(f"{drive}_{camera[-2:]}_{image.stem}"), image=file(image), facts=facts)


# --- KITTI odometry --------------------------------------------------------------------------------------------------


def find_kitti_odometry(root: Path) -> dict[str, Iterator[Pair]]:
    """Left colour camera of sequences 09 and 10 to test and 00 to 08 to train, with their poses."""
    required(root / "poses", "of data_odometry_poses.zip")
    return {
        split: (pair for number in numbers if (root / "sequences" / number).is_dir() for pair in _drive(root, number))
        for split, numbers in ODOMETRY.items()
    }


def _drive(root: Path, number: str) -> Iterator[Pair]:
    folder = root / "sequences" / number
    calibration = read_calibration(required(folder / "calib.txt", "of data_odometry_calib.zip"))
    images = sorted((folder / "image_2").glob(f"{DIGITS * 6}.png"))
    path = required(root / "poses" / f"{number}.txt", "of data_odometry_poses.zip")
    poses = read_numbers(path, range(0, 12 * 100_000, 12)).reshape(-1, 3, 4)
    if len(poses) < len(images):
        raise ValueError(f"{path}: {len(poses)} poses for the {len(images)} images of {folder / 'image_2'}")
    for image in images:
        frame = int(image.stem)
        facts = {
            "source_id": image.relative_to(root).as_posix(),
            "intrinsics_px": projection_intrinsics(calibration["P2"]),
            "pose": (np.vstack([poses[frame], [0, 0, 0, 1]]) @ _beside_grey(calibration["P2"])).tolist(),
            "sequence": number,
            "frame": frame,
        }
        yield Pair(key=f"{number}_{image.stem}", image=file(image), facts=facts)


def _beside_grey(projection: np.ndarray) -> np.ndarray:
    """Left grey camera, whose poses are known, from the colour camera of a projection matrix `K [I | t]`."""
    matrix, motion = projection.reshape(3, 4), np.eye(4)
    motion[:3, 3] = -np.linalg.solve(matrix[:, :3], matrix[:, 3])
    return motion


# --- Cityscapes ------------------------------------------------------------------------------------------------------


def find_cityscapes(root: Path) -> dict[str, PairStream]:
    """All frames of the training snippets, without the rows that show the car."""
    images = required(root / "leftImg8bit_sequence" / "train", "of leftImg8bit_sequence_trainvaltest.zip")
    required(root / "camera" / "train", "of camera_trainvaltest.zip")

    def find() -> Iterator[Pair]:
        for image in sorted(images.glob(f"*/*_{DIGITS * 6}_{DIGITS * 6}_leftImg8bit.png")):
            city, sequence, frame, _ = image.stem.rsplit("_", 3)
            cameras = _cameras(root / "camera" / "train" / city, f"{city}_{sequence}")
            nearest = min(cameras, key=lambda number: abs(number - int(frame)))
            facts = {
                "source_id": image.relative_to(root).as_posix(),
                "intrinsics_px": list(cameras[nearest]),
                "sequence": f"{city}_{sequence}",
                "frame": int(frame),
            }
            top = Source(image, ".png", upper_rows, (KEPT_ROWS,))
            yield Pair(key=safe(f"{city}_{sequence}_{frame}"), image=top, facts=facts)

    return {"train": PairStream(find)}


def upper_rows(path: Path, share: float) -> bytes:
    """The upper `share` of the rows of an image, as PNG."""
    image = decode_image(path.read_bytes())
    return png(image[: int(share * len(image))])


@lru_cache(maxsize=64)
def _cameras(folder: Path, sequence: str) -> dict[int, tuple[float, ...]]:
    """fx, fy, cx, cy of the frames of a sequence that have a camera file, by number; annotated frames alone have."""
    cameras = {}
    for path in sorted(folder.glob(f"{sequence}_{DIGITS * 6}_camera.json")):
        try:
            known = json.loads(path.read_text())["intrinsic"]
            cameras[int(path.stem.split("_")[-2])] = tuple(float(known[name]) for name in ("fx", "fy", "u0", "v0"))
        except (ValueError, KeyError, TypeError) as error:
            raise SampleError(f"{path}: no camera of Cityscapes: {error!r}") from error
    if not cameras:
        required(folder / f"{sequence}_*_camera.json", "of camera_trainvaltest.zip")
    return cameras
