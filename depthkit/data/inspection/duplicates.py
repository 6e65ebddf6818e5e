"""Pictures that are the same, or nearly, within and across data sets: perceptual hashes and the search among them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, count, pairwise
from typing import NamedTuple

import cv2
import numpy as np

BITS = 64
MAX_DISTANCE = 6
"""Of the 64 bits, how many may differ. Measured on 331 real images: copies at half and quarter size, squashed to a
square, or as JPEG of quality 75 and 30 are at most 6 away (99 % within 4); of 51 415 pairs of different sources and
photographs, three were closer than 12: one real duplicate (0), and two moments of one drive (6)."""

MIN_CONTRAST = 2.0  # grey levels; a flatter picture has no structure to hash
EVALUATION_SPLITS = ("val", "test")
THUMBNAIL_SIDE, KEPT_SIDE = 32, 8
BUCKET = 8  # hashes that may share a sorting key by chance
NOT_FOUND = np.iinfo(np.int64).max
ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


def perceptual_hash(image: np.ndarray) -> int | None:
    """64 bits of an RGB image (H, W, 3): which of the lowest 8 x 8 frequencies of its 32 x 32 grey thumbnail are above
    their median (pHash). None for a picture without contrast."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    thumbnail = cv2.resize(grey, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if thumbnail.std() < MIN_CONTRAST:
        return None
    frequencies = cv2.dct(thumbnail)[:KEPT_SIDE, :KEPT_SIDE].ravel()
    bits = frequencies > np.median(frequencies[1:])
    bits[0] = False  # the mean brightness
    return int.from_bytes(np.packbits(bits).tobytes())


def hamming(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Number of different bits of uint64 arrays (n,)."""
    return ONES[(first ^ second).view(np.uint8).reshape(-1, BITS // 8)].sum(axis=1, dtype=np.int64)


def near_pairs(
    hashes: np.ndarray, max_distance: int = MAX_DISTANCE
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of places (n,), (n,) with their distances (n,) <= `max_distance` in an array of different hashes.

    Exact: of `max_distance + k` bands of bits, k agree in any such pair. So the hashes are sorted by each choice of k
    bands and compared within runs of equal keys; a larger k, for more hashes, makes more sorts and shorter runs. A pair
    may come several times.
    """
    agreeing = next(k for k in count(1) if len(hashes) <= BUCKET * 2 ** (BITS * k / (max_distance + k)))
    edges = np.linspace(0, BITS, max_distance + agreeing + 1).astype(int)
    bands = [sum(1 << bit for bit in range(low, high)) for low, high in pairwise(edges.tolist())]
    for chosen in combinations(bands, agreeing):
        keys = hashes & np.uint64(sum(chosen))
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.arange(len(hashes))
        for shift in count(1):
            starts = starts[starts < len(hashes) - shift]
            starts = starts[keys[starts] == keys[starts + shift]]
            if not starts.size:
                break
            left, right = order[starts], order[starts + shift]
            distance = hamming(hashes[left], hashes[right])
            near = distance <= max_distance
            yield left[near], right[near], distance[near]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The hashed images of one data set: `hashes` (n,) uint64 and `places` (n, 2), shard and sample of each."""

    split: str = ""
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))

    @property
    def is_evaluation(self) -> bool:
        return self.split.startswith(EVALUATION_SPLITS)


class Match(NamedTuple):
    """Two images as (number of the data set, number among its pictures), and the distance of their hashes."""

    first: tuple[int, int]
    second: tuple[int, int]
    distance: int


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """`leaks`: for every evaluation image that training holds, the nearest training image (first) and itself.
    `repeats[n]`: for every image of data set n that has a double on its own side of the split, that double (first)."""

    leaks: list[Match]
    repeats: list[list[Match]]


def find_duplicates(sets: Sequence[Pictures]) -> Duplicates:
    """Compare all pictures with each other. Memory is a few numbers per picture, time far below quadratic."""
    owner = np.repeat(np.arange(len(sets)), [len(s.hashes) for s in sets])
    number = np.concatenate([np.arange(len(s.hashes)) for s in sets] or [np.empty(0, int)])
    hashes = np.concatenate([s.hashes for s in sets] or [np.empty(0, np.uint64)]).astype(np.uint64)
    unique, which = np.unique(hashes, return_inverse=True)
    is_evaluation = np.array([s.is_evaluation for s in sets], bool)[owner] if len(sets) else np.empty(0, bool)
    sides = [_Side(np.flatnonzero(is_evaluation == side), which, len(unique)) for side in (False, True)]
    nearest = {pair: np.full(len(unique), NOT_FOUND) for pair in ((0, 0), (1, 1), (1, 0))}
    for left, right, distance in near_pairs(unique):
        for ours, theirs in ((left, right), (right, left)):
            for (side, other), best in nearest.items():
                both = sides[side].has[ours] & sides[other].has[theirs]
                np.minimum.at(best, ours[both], distance[both] * len(unique) + theirs[both])
    everywhere = np.arange(len(unique))
    for (side, other), best in nearest.items():
        exact = sides[side].has & sides[other].has if side != other else sides[side].first != sides[side].last
        best[exact] = everywhere[exact]

    def matches(side: int, other: int) -> Iterator[Match]:
        best = nearest[side, other]
        for image in sides[side].images[best[which[sides[side].images]] != NOT_FOUND]:
            distance, place = divmod(int(best[which[image]]), len(unique))
            double = sides[other].first[place]
            double = sides[other].last[place] if double == image else double
            yield Match((int(owner[double]), int(number[double])), (int(owner[image]), int(number[image])), distance)

    repeats: list[list[Match]] = [[] for _ in sets]
    for match in (*matches(0, 0), *matches(1, 1)):
        repeats[match.second[0]].append(match)
    return Duplicates(leaks=list(matches(1, 0)), repeats=repeats)


class _Side:
    """The `images` of training or of evaluation; for every hash whether one has it, and the first and last that do."""

    def __init__(self, images: np.ndarray, which: np.ndarray, num_hashes: int) -> None:
        self.images = images
        self.first = np.full(num_hashes, -1)
        self.last = np.full(num_hashes, -1)
        self.last[which[images]] = images
        self.first[which[images[::-1]]] = images[::-1]
        self.has = self.last >= 0
