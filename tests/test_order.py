"""The order of samples: once per sweep, a pure function of the position, local to a rank."""

import pickle
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from depthkit.data.order import BalancedOrder, Location, Order, rank_slots


def make_order(
    shard_sizes: Sequence[Sequence[int]],
    weights: Sequence[float] | None = None,
    *,
    lanes: int = 4,
    seed: int = 0,
    block: int = 8,
) -> Order:
    return Order(shard_sizes, weights or [1.0] * len(shard_sizes), num_lanes=lanes, seed=seed, shuffle_block=block)


def read_sweep(order: Order, sweep: int) -> list[Location]:
    return [order.locate(position) for position in range(order.sweep_start(sweep), order.sweep_start(sweep + 1))]


def every_sample(shard_sizes: Sequence[Sequence[int]]) -> Counter[Location]:
    return Counter(
        Location(dataset, shard, sample)
        for dataset, sizes in enumerate(shard_sizes)
        for shard, size in enumerate(sizes)
        for sample in range(size)
    )


@pytest.mark.parametrize("seed", range(40))
def test_a_sweep_holds_every_sample_exactly_once(seed: int):
    rng = np.random.default_rng(seed)
    shard_sizes = [rng.integers(1, 20, size=rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 4))]
    lanes, block = int(rng.integers(1, 13)), int(rng.integers(1, 30))
    order = make_order(shard_sizes, lanes=lanes, block=block, seed=seed)
    for sweep in range(3):
        assert Counter(read_sweep(order, sweep)) == every_sample(shard_sizes)


def test_weights_set_how_often_a_sweep_holds_a_data_set():
    shard_sizes = [[10, 7], [5, 5, 5], [40]]
    weights = [2.5, 1.0, 0.3]
    order = make_order(shard_sizes, weights, lanes=6, block=5)
    whole = Counter()
    for sweep in range(20):
        counts = Counter(location.dataset for location in read_sweep(order, sweep))
        for dataset, (weight, sizes) in enumerate(zip(weights, shard_sizes, strict=True)):
            assert abs(counts[dataset] - weight * sum(sizes)) <= 1
        whole += counts
    assert whole == {0: 20 * 17 * 2.5, 1: 20 * 15, 2: 20 * 40 * 0.3}


def test_a_weight_repeats_whole_passes_over_the_data_set():
    """Over sweeps that hold a whole number of passes, every sample of a data set comes equally often."""
    shard_sizes = [[3, 8, 5], [10, 10]]
    order = make_order(shard_sizes, [0.75, 1.5], lanes=5, block=4)
    counts = Counter(location for sweep in range(4) for location in read_sweep(order, sweep))
    assert {counts[location] for location in every_sample(shard_sizes) if location.dataset == 0} == {3}
    assert {counts[location] for location in every_sample(shard_sizes) if location.dataset == 1} == {6}


def test_a_position_means_one_sample_whoever_asks_and_when():
    shard_sizes = [[9, 4, 6], [30, 2]]
    arguments = {"lanes": 6, "block": 7, "seed": 3}
    forwards = [make_order(shard_sizes, [1, 0.5], **arguments).locate(position) for position in range(200)]
    order = make_order(shard_sizes, [1, 0.5], **arguments)
    assert [order.locate(position) for position in reversed(range(200))] == forwards[::-1]
    copied = pickle.loads(pickle.dumps(order))
    assert [copied.locate(position) for position in range(200)] == forwards


def test_sweeps_and_seeds_differ():
    shard_sizes = [[16] * 4]
    first, second = read_sweep(make_order(shard_sizes), 0), read_sweep(make_order(shard_sizes), 1)
    other_seed = read_sweep(make_order(shard_sizes, seed=1), 0)
    for other in (second, other_seed):
        same_place = sum(a == b for a, b in zip(first, other, strict=True))
        assert same_place < 12  # 64 samples: about one is expected


def test_samples_of_several_shards_are_mixed_within_a_block():
    """A lane does not read one shard to its end before the next."""
    order = make_order([[16] * 8], lanes=2, block=64)
    lane = [location.shard for location in read_sweep(order, 0)[::2]]
    changes = sum(a != b for a, b in pairwise(lane))
    assert changes > 30  # 3 without mixing


def test_the_data_sets_are_mixed_within_every_lane():
    order = make_order([[8] * 32, [8] * 32], lanes=4, block=32)
    for lane in range(4):
        datasets = [location.dataset for location in read_sweep(order, 0)[lane::4]]
        assert 16 <= sum(datasets) <= 112  # 64 of 128 expected, in shards of 8; 0 or 128 without mixing


def test_other_sweeps_take_other_shards_of_a_data_set_with_a_small_weight():
    order = make_order([[4] * 16], [0.25])
    shards = [frozenset(location.shard for location in read_sweep(order, sweep)) for sweep in (0, 4, 8)]
    assert len(set(shards)) == 3


@pytest.mark.parametrize("rank", range(8))
def test_a_rank_touches_only_the_shards_of_its_own_lanes(rank: int):
    order = make_order([[16] * 64], lanes=8, block=32)
    (lane,) = rank_slots(8, rank, 8)
    shards = {order.locate(position).shard for position in range(lane, order.sweep_start(1), 8)}
    assert len(shards) == 8


@pytest.mark.parametrize("block", [8, 32])
def test_a_block_bounds_the_shards_that_are_open_at_a_time(block: int):
    order = make_order([[8] * 64], lanes=2, block=block)
    lane = [location.shard for location in read_sweep(order, 0)[::2]]
    for start in range(0, len(lane), block):
        assert len(set(lane[start : start + block])) == block / 8


def test_memory_grows_with_the_shards_alone():
    """62 million samples in 62,000 shards: a plan holds one entry for each shard."""
    order = make_order([[1000] * 62_000], lanes=512, block=4096)
    location = order.locate(61_999_999)
    assert location.shard < 62_000
    sweep = order.sweep(0)
    largest = max(array.size for array in vars(sweep).values() if isinstance(array, np.ndarray))
    assert largest == 62_000
    assert len(pickle.dumps(order)) < 1_000_000


def test_far_positions_are_found_directly():
    order = make_order([[5, 3]], lanes=2)
    far = order.sweep_start(10**6)
    assert far == 8 * 10**6
    assert Counter(read_sweep(order, 10**6)) == every_sample([[5, 3]])


def test_data_sets_with_less_than_a_sample_in_a_sweep_come_in_their_turn():
    shard_sizes = [[1]] * 9
    order = make_order(shard_sizes, [0.06] * 9, lanes=3)
    counts = Counter(order.locate(position) for position in range(order.sweep_start(50)))
    assert counts == dict.fromkeys(every_sample(shard_sizes), 3)


def test_slots_of_all_ranks_are_the_batch_in_order():
    for world_size in (1, 2, 3, 6):
        slots = [slot for rank in range(world_size) for slot in rank_slots(6, rank, world_size)]
        assert slots == list(range(6))
    with pytest.raises(ValueError, match=r"6 images .* 4 ranks"):
        rank_slots(6, 0, 4)


# Balanced batches


def make_balanced(shard_sizes: Sequence[Sequence[int]], *, lanes: int = 6, seed: int = 0) -> BalancedOrder:
    return BalancedOrder(shard_sizes, num_lanes=lanes, seed=seed, shuffle_block=8)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_balanced_batch_holds_as_many_of_each_data_set_on_every_rank(num_ranks: int):
    order = make_balanced([[40, 7], [5], [3, 3]], lanes=12)
    for step in range(30):
        for rank in range(num_ranks):
            slots = rank_slots(12, rank, num_ranks)
            counts = Counter(order.locate(12 * step + slot).dataset for slot in slots)
            assert counts == dict.fromkeys(range(3), 4 // num_ranks)


def test_each_balanced_data_set_comes_once_in_each_of_its_own_sweeps():
    shard_sizes = [[20, 7], [5], [3, 4]]
    order = make_balanced(shard_sizes)
    read = [order.locate(position) for position in range(6 * 100)]
    for dataset, sizes in enumerate(shard_sizes):
        own = [location for location in read if location.dataset == dataset]
        for start in range(0, len(own) - sum(sizes) + 1, sum(sizes)):
            sweep = own[start : start + sum(sizes)]
            assert Counter(sweep) == Counter(
                Location(dataset, shard, sample) for shard, size in enumerate(sizes) for sample in range(size)
            )


def test_a_balanced_position_is_a_pure_function_of_the_seed():
    shard_sizes = [[20, 7], [20, 7]]
    order = make_balanced(shard_sizes, lanes=4)
    forwards = [order.locate(position) for position in range(100)]
    copied = pickle.loads(pickle.dumps(order))
    assert [copied.locate(position) for position in reversed(range(100))] == forwards[::-1]
    other = make_balanced(shard_sizes, lanes=4, seed=1)
    assert [other.locate(position) for position in range(100)] != forwards
    # Data sets of the same sizes do not walk in step.
    assert [(a.shard, a.sample) for a in forwards[::2]] != [(b.shard, b.sample) for b in forwards[1::2]]


def test_a_batch_that_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="batch of 5 images cannot hold as many of each of 2"):
        make_balanced([[3], [3]], lanes=5)
