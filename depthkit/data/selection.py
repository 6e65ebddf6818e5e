"""Which samples of a data set are kept: a JSON file, bound to its images and labels by their digests."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from depthkit.config import ConfigError
from depthkit.data.manifest import Manifest
from depthkit.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Samples that were chosen by the scores of their labels.

    `images_digest` and `labels_digest` are those of the two manifests, `rule` says in words how it was chosen, and
    `samples` maps the path of a label shard to the indices that are kept, ascending; other shards are left out.
    """

    images_digest: str
    labels_digest: str
    rule: str
    samples: dict[str, list[int]]


def save_selection(selection: Selection, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write((json.dumps(asdict(selection), separators=(",", ":")) + "\n").encode())


def load_selection(path: Path, images: Manifest, labels: Manifest | None) -> Selection:
    """The selection in a file, which must be of these images and, unless None, of these labels; ConfigError if not."""
    if not path.is_file():
        raise ConfigError(f"selection={path}: no such file; `depthkit select` writes it")
    try:
        selection = Selection(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"selection={path}: not a selection, {error}") from error
    made_for = [("images", selection.images_digest, images)]
    made_for += [("labels", selection.labels_digest, labels)] if labels is not None else []
    for kind, digest, manifest in made_for:
        if digest != manifest.digest():
            raise ConfigError(
                f"selection={path} was made for {kind} with digest {digest[:12]}, but those of {manifest.name!r} have "
                f"{manifest.digest()[:12]}: run `depthkit select` on their labels, or name the right ones"
            )
    if not any(selection.samples.values()):
        raise ConfigError(f"selection={path} keeps no sample")
    return selection


def kept_samples(selection: Selection, label_shard: str, num_samples: int) -> np.ndarray:
    """Indices (n,) of the samples of a shard that are kept, ascending; ConfigError when they cannot be its own."""
    kept = np.array(selection.samples.get(label_shard, []))
    if kept.size:
        is_ascending = kept.ndim == 1 and kept.dtype.kind == "i" and bool((np.diff(kept) > 0).all())
        if not is_ascending or kept[0] < 0 or kept[-1] >= num_samples:
            raise ConfigError(f"selection of {label_shard}: not ascending indices from 0 to below {num_samples}")
    return kept
