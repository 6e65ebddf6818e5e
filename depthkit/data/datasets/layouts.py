"""What many layouts share: images found by a pattern, each with a label whose path follows from that of the image."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthkit.data.pairs import Pair, safe_keys
from depthkit.data.sources import Source, file


def required(path: Path, cure: str) -> Path:
    """`path`, which must be there; FileNotFoundError names it and says where it comes from."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; {cure}")
    return path


def pairs_by_pattern(
    root: Path,
    patterns: str | Iterable[str],
    label_of: Callable[[Path], Path | Source | None],
    *,
    facts_of: Callable[[Path], dict[str, Any]] = lambda image: {},
    sky_of: Callable[[Path], Source | None] = lambda image: None,
    keep: Callable[[Path], bool] = lambda image: True,
) -> Iterator[Pair]:
    """A pair for every image below `root` that a pattern matches and `keep` takes; its id is its path from `root`."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    images = [image for pattern in patterns for image in root.glob(pattern) if keep(image)]
    ids = {image: image.relative_to(root).as_posix() for image in images}
    keys = safe_keys({id_: id_.rpartition(".")[0] for id_ in ids.values()})
    for image, id_ in ids.items():
        label = label_of(image)
        yield Pair(
            key=keys[id_],
            image=file(image),
            label=file(label) if isinstance(label, Path) else label,
            sky=sky_of(image),
            facts={"source_id": id_} | facts_of(image),
        )


def read_numbers(path: Path, counts: Container[int]) -> np.ndarray:
    """The numbers of a text file, divided by blanks or commas; ValueError unless their count is one of `counts`."""
    try:
        numbers = np.array(path.read_text().replace(",", " ").split(), float)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if numbers.size not in counts:
        raise ValueError(f"{path}: {numbers.size} numbers, expected one of {counts}")
    return numbers


def pose_matrix(translation: Sequence[float], quaternion: Sequence[float]) -> np.ndarray:
    """4x4 rigid motion from a translation and a unit quaternion (x, y, z, w)."""
    x, y, z, w = np.asarray(quaternion, float) / np.linalg.norm(quaternion)
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = translation
    return pose
