"""Image sets without depth, from folders, tars, zips, LMDB and videos: one stream of pairs each, never a list.

Their authors' file names are the keys where no two images share one. Images of other splits than the training set are
left out by the names of their folders and archives.
"""

from collections.abc import Callable, Iterator
from itertools import groupby, islice
from pathlib import Path, PurePosixPath

from depthkit.data.datasets import Splits
from depthkit.data.pairs import Pair, PairStream, safe_key
from depthkit.data.sources import (
    Source,
    images_below,
    lmdb_values,
    num_video_frames,
    read_video_frame,
    refuse,
    suffix_of,
)

OTHER_SPLITS = {"val", "valid", "validation", "test", "index"}
BDD_FRAME_STEP = 10
VIDEO_SUFFIXES = {".mov", ".mp4"}

Images = Iterator[tuple[str, Source]]


def find_images(root: Path) -> Splits:
    """Every image of `root/train`, or of `root`; its file name is the key."""
    return _stream(lambda: _training_images(root), key=lambda name: PurePosixPath(name).stem)


def find_places365(root: Path) -> Splits:
    """`data_large` where it is there, `data_256` otherwise; the key is the category and the number."""
    has_large = any("large" in path.name for path in root.iterdir())

    def key(name: str) -> str:
        parts = PurePosixPath(name).with_suffix("").parts
        starts = [i + 1 for i, part in enumerate(parts[:-1]) if part.startswith(("data_", "train"))]
        return "-".join(parts[max(starts, default=0) :])

    return _stream(lambda: _training_images(root, lambda name: has_large and "256" in name), key)


def find_lsun(root: Path) -> Splits:
    """Every LMDB below `root` but those of other splits; the key is the category and the key in the LMDB."""
    return _stream(lambda: _lmdb_images(root), key=lambda name: PurePosixPath(name).with_suffix("").as_posix())


def find_bdd100k(root: Path) -> Splits:
    """One frame in ten of every video; the key is the video and the frame."""
    return _stream(lambda: _video_frames(root), key=lambda name: PurePosixPath(name).with_suffix("").as_posix())


def _stream(images: Callable[[], Images], key: Callable[[str], str]) -> Splits:
    def find() -> Iterator[Pair]:
        for name, source in images():
            yield Pair(key=safe_key(key(name)), image=source, facts={"source_id": name})

    return {"train": PairStream(find)}


def _training_images(root: Path, skip: Callable[[str], bool] = lambda name: False) -> Images:
    folder = root / "train"
    return images_below(folder if folder.is_dir() else root, lambda name: _is_other_split(name) or skip(name))


def _is_other_split(name: str) -> bool:
    return name.split("_")[0] in OTHER_SPLITS


def _lmdb_images(root: Path) -> Images:
    """Values of all LMDBs, and images exported from them."""
    for data in sorted(root.rglob("data.mdb")):
        category = data.parent.name.removesuffix("_lmdb")
        if not category.endswith(("_val", "_test")) and category != "test":
            suffix = next((suffix_of(source.read()) for _, source in lmdb_values(data.parent, "")), "")
            yield from ((f"{category}/{key}{suffix}", source) for key, source in lmdb_values(data.parent, suffix))
    yield from images_below(root, lambda name: _is_other_split(name) or name.endswith(("_val", "_test")))


def _video_frames(root: Path) -> Images:
    """One frame in ten of the videos below `root/videos/train`, or of the folders of frames below `root/frames`."""
    videos = root / "videos" / "train"
    if not videos.is_dir() and not (root / "frames").is_dir():
        raise FileNotFoundError(
            f"{videos}: no such folder, nor {root / 'frames'}; the recipe takes one frame in ten of the 70,000 "
            "training videos (bdd100k_videos_train_*.zip), not the 100,000 images; unpack the videos, or write all "
            "frames of each to frames/VIDEO/NUMBER.jpg"
        )
    frames = images_below(root / "frames") if (root / "frames").is_dir() else iter(())
    for _, of_video in groupby(frames, key=lambda frame: PurePosixPath(frame[0]).parent):
        yield from islice(of_video, 0, None, BDD_FRAME_STEP)
    for path in sorted(videos.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            num_frames = num_video_frames(path)
            if num_frames == 0:
                yield f"{path.stem}/0.jpg", Source(path, ".jpg", refuse, ("no frame can be read; fetch it again",))
            for index in range(0, num_frames, BDD_FRAME_STEP):
                yield f"{path.stem}/{index}.jpg", Source(path, ".jpg", read_video_frame, (index,))
