"""NYU Depth v2, the labeled frames: one MATLAB file (HDF5) with 1449 images and two depths for each."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from depthkit.data.datasets.layouts import required
from depthkit.data.pairs import Pair
from depthkit.data.sources import Source, h5_array, optional, png, read_h5

FRAMES, SPLITS = "nyu_depth_v2_labeled.mat", "splits.mat"
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


def read_image(path: Path, index: int) -> bytes:
    """Stored as (3, W, H)."""
    return png(read_h5(path, "images", index).transpose(2, 1, 0))
