"""What there is to pack: pairs of an image and its label, with the facts about them, and the names they get."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from depthkit.data.manifest import TargetSpec
from depthkit.data.sources import IMAGE_SUFFIXES, Source

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_KEY_LENGTH",
    "Pair",
    "PairSet",
    "PairStream",
    "in_order",
    "run_lengths",
    "safe",
    "safe_key",
    "safe_keys",
]

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
    """The pairs of one data set, `in_order` where they are a tuple; `split` is None where the command line says it.

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


def in_order(pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """Sorted by key, but the frames of a sequence together, where its first key stands, and by their number."""
    by_key = sorted(pairs, key=lambda pair: pair.key)
    first: dict[str, str] = {}
    for pair in by_key:
        first.setdefault(_sequence(pair), pair.key)
    return tuple(sorted(by_key, key=lambda pair: (first[_sequence(pair)], pair.facts.get("frame", 0))))


def _sequence(pair: Pair) -> str:
    """What a pair stays together with: `/` is in no key."""
    return f"/{pair.facts['sequence']}" if {"sequence", "frame"} <= pair.facts.keys() else pair.key


def run_lengths(facts: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """How long the runs of consecutive frames are, given the facts of samples in order; () where none follows another.

    Consecutive are two samples of one `sequence` whose numbers `frame` differ by what is usual in it: a recording may
    have been thinned out.
    """

    def distance(fact: Mapping[str, Any], later: Mapping[str, Any]) -> int:
        both = fact.keys() & later.keys()
        is_same = {"sequence", "frame"} <= both and fact["sequence"] == later["sequence"]
        return later["frame"] - fact["frame"] if is_same else 0

    steps = [(fact.get("sequence"), distance(fact, later)) for fact, later in pairwise(facts)]
    counts = Counter(step for step in steps if step[1] > 0)
    usual = {sequence: step for (sequence, step), _ in sorted(counts.items(), key=lambda item: (item[1], -item[0][1]))}
    runs = [1]
    for sequence, step in steps:
        if step > 0 and step == usual[sequence]:
            runs[-1] += 1
        else:
            runs.append(1)
    return tuple(runs) if max(runs) > 1 else ()
