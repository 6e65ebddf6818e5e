"""What many layouts share: images found by a pattern, each with a label whose path follows from that of the image."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

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
