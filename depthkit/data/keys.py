"""Keys that lie in more than one shard of a data set, found without holding the keys of all shards at once."""

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b

import numpy as np

from depthkit.data.manifest import Shard

NUM_EXAMPLES = 3


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """(n,) uint64. Of 62 million different keys, two share a hash with a probability of 1e-4."""
    return np.frombuffer(b"".join(blake2b(key.encode(), digest_size=8).digest() for key in keys), np.uint64)


def repeated_keys(shards: Sequence[Shard], hashes: Sequence[np.ndarray], key_of: Callable[[int, int], str]) -> str:
    """How many keys lie in several shards, and the first of them; empty for none.

    `hashes` are those of each shard's keys, `key_of(shard, sample)` is asked for those that are named alone.
    """
    every = np.concatenate([np.empty(0, np.uint64), *hashes])
    ordered = np.sort(every)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not repeated.size:
        return ""
    owner = np.repeat(np.arange(len(hashes)), [len(each) for each in hashes])
    places = np.flatnonzero(np.isin(every, repeated))
    _, first = np.unique(every[places], return_index=True)
    named = []
    for place in places[np.sort(first)[:NUM_EXAMPLES]].tolist():
        numbers = owner[places[every[places] == every[place]]].tolist()
        key = key_of(numbers[0], place - int(np.searchsorted(owner, numbers[0])))
        named.append(f"{key!r} in {' and '.join(shards[number].path for number in numbers)}")
    more = f" and {repeated.size - len(named)} more" if repeated.size > len(named) else ""
    return f"keys that lie in more than one shard: {'; '.join(named)}{more}. Does the data set hold images twice?"
