"""What there is to pack: pairs of an image and its label, with the facts about them, and the names they get."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from depthkit.data.manifest import TargetSpec
from depthkit.data.sources import IMAGE_SUFFIXES, Source

__all__ = ["IMAGE_SUFFIXES", "MAX_KEY_LENGTH", "Pair", "PairSet", "PairStream", "safe", "safe_key", "safe_keys"]

MAX_KEY_LENGTH = 60  # a tar header has room for 100 bytes, extension included


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One image with its label and its sky mask (8-bit grey PNG of the label's size, above 0 = sky), where it has them.

    `label_size` is (height, width), `facts` are those of the sample's JSON member.
    """

    key: str
    image: Source
    label: Source | None = None
    sky: Source | None = None
    pose: Path | None = None
    label_size: tuple[int, int] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairStream:
    """Pairs in a fixed order that `find` gives one by one, each time anew: tens of millions are never held at once."""

    find: Callable[[], Iterator[Pair]]

    def __iter__(self) -> Iterator[Pair]:
        return self.find()


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The pairs of one data set, sorted by key where they are a tuple; `split` is None where the command line says it.

    `expected` is how many pairs a stream should have, if that is known: no more than a help to estimate the time left.
    The texts are those of `data_manifests`, or come from a `SOURCE.md` beside the images, if any.
    """

    name: str
    target: TargetSpec | None
    pairs: tuple[Pair, ...] | PairStream
    licence: str
    source: str
    description: str
    citation: str = ""
    split: str | None = None
    expected: int | None = None


def safe(name: str) -> str:
    """A name for files: everything but letters, digits, `_` and `-` becomes `_`."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)


def safe_key(name: str) -> str:
    """The key of a readable name: safe, and the end of it where it is too long."""
    return safe(name)[-MAX_KEY_LENGTH:]


def safe_keys(names: dict[str, str]) -> dict[str, str]:
    """Keys for ids, from their readable names. Names that become the same key get a hash of their id appended."""
    keys = {id_: safe_key(name) for id_, name in names.items()}
    counts = Counter(keys.values())
    return {
        id_: key if counts[key] == 1 else f"{key}_{hashlib.sha256(id_.encode()).hexdigest()[:8]}"
        for id_, key in keys.items()
    }
