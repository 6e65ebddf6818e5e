"""SUN RGB-D: one folder a frame, of four kinds of sensor; the test frames stand in a MATLAB file of its toolbox."""

from collections.abc import Iterator
from pathlib import Path

from depthkit.data.datasets.layouts import read_numbers, required
from depthkit.data.pairs import Pair, safe_key
from depthkit.data.sources import file, optional

SPLIT = Path("SUNRGBDtoolbox", "traintestSUNRGBD", "allsplit.mat")
PREFIX = "/n/fs/sun3d/data/"  # where the data lay when its authors wrote the list


def find(root: Path) -> dict[str, Iterator[Pair]]:
    """The 5,050 test frames with refined depth (depth_bfx)."""
    required(root / "SUNRGBD", "of SUNRGBD.zip, with its folders kv1, kv2, realsense and xtion")
    split = required(root / SPLIT, "of SUNRGBDtoolbox.zip")
    paths = optional("scipy.io").loadmat(split, squeeze_me=True)["alltest"].tolist()
    return {"test": (_pair(root, path.removeprefix(PREFIX).strip("/")) for path in paths)}


def _pair(root: Path, frame: str) -> Pair:
    folder = root / frame
    return Pair(
        key=safe_key(frame.removeprefix("SUNRGBD/")),
        image=file(_only(folder / "image", ".jpg")),
        label=file(_only(folder / "depth_bfx", ".png")),
        facts={"source_id": frame, **_intrinsics(folder / "intrinsics.txt")},
    )


def _only(folder: Path, suffix: str) -> Path:
    """The file of a folder that holds one; a path that does not exist where it holds none."""
    return min(folder.glob(f"[!.]*{suffix}"), default=folder / f"missing{suffix}")


def _intrinsics(path: Path) -> dict[str, list[float]]:
    """From a 3x3 matrix of nine numbers, on one line or on three."""
    if not path.is_file():
        return {}
    return {"intrinsics_px": read_numbers(path, (9,))[[0, 4, 2, 5]].tolist()}
