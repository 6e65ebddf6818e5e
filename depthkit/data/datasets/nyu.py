"""NYU Depth v2: the labeled frames, one MATLAB file (HDF5) with 1449 images and two depths for each, and the frames of
the raw videos that the field trains on, synchronised and registered by the authors of BTS.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from depthkit.data.datasets.layouts import required
from depthkit.data.pairs import Pair, safe
from depthkit.data.sources import Source, file, h5_array, optional, png, read_h5

FRAMES, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
TRAIN_LIST = "nyudepthv2_train_files_with_gt.txt"
INTRINSICS = [518.85790117450188, 519.46961112127485, 325.58244941119034, 253.73616633400465]
"""fx, fy, cx, cy of the colour camera, `camera_params.m` of the toolbox. Depth is registered to it."""


def _find(root: Path, depths: str) -> dict[str, Iterator[Pair]]:
    """The 654 test frames. In the file rows and columns are exchanged, as MATLAB writes them; numbers begin at 1."""
    frames = required(root / FRAMES, "from the data set's page, under 'Labeled dataset'")
    splits = required(root / SPLITS, "from the data set's page, under 'train/test split'")
    numbers = optional("scipy.io").loadmat(splits)["testNdxs"].ravel().tolist()
    return {
        "test": (
            Pair(
                key=f"{number:04d}",
                image=Source(frames, ".png", read_image, (number - 1,)),
                label=Source(frames, ".npz", h5_array, (depths, number - 1, True)),
                facts={"source_id": f"{FRAMES}/{number}", "intrinsics_px": INTRINSICS},
            )
            for number in numbers
        )
    }


find_raw = partial(_find, depths="rawDepths")
find_filled = partial(_find, depths="depths")


def find_train(root: Path) -> dict[str, Iterator[Pair]]:
    """The frames of the list, each line `/SCENE/rgb_NNNNN.jpg /SCENE/sync_depth_NNNNN.png FOCAL`."""
    cure = f"it ships with github.com/isl-org/ZoeDepth as train_test_inputs/{TRAIN_LIST}"
    return {"train": _training_frames(root, required(root / TRAIN_LIST, cure))}


def _training_frames(root: Path, names: Path) -> Iterator[Pair]:
    for number, line in enumerate(names.read_text().splitlines(), start=1):
        columns = [column.lstrip("/") for column in line.split()]
        scene, _, name = columns[0].partition("/") if len(columns) == 3 else ("", "", "")
        frame = Path(name).stem.removeprefix("rgb_")
        if not frame.isdecimal():
            raise ValueError(f"{names}: line {number}: {line!r} is not '/SCENE/rgb_NNNNN.jpg LABEL FOCAL'")
        yield Pair(
            key=safe(f"{scene}_{frame}"),
            image=file(root / columns[0]),
            label=file(root / columns[1]),
            facts={"source_id": columns[0], "intrinsics_px": INTRINSICS, "sequence": scene, "frame": int(frame)},
        )


def read_image(path: Path, index: int) -> bytes:
    """Stored as (3, W, H)."""
    return png(read_h5(path, "images", index).transpose(2, 1, 0))
