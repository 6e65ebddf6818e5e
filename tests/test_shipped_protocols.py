"""Every protocol of `conf/protocol` gives the number that its steps give by hand.

A case is an image whose ground truth is measured in 24 pixels of the protocol's box, its corners among them, where
`truths` and `predictions` alternate. Everything that the protocol must leave out is measured too and predicted
absurdly: all pixels just outside the box, one in it beyond the cap, one at the lower bound.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from shipped import SHIPPED, shipped

from depthkit.data.facts import known_datasets
from depthkit.evaluation.ground_truth import Case, check_enough_pixels, cut, score_case
from depthkit.evaluation.protocols import aggregate, protocol_id, rank_correlation, score
from depthkit.evaluation.settings import Aggregation, ProtocolConfig
from depthkit.metrics_pairs import pair_accuracy, whdr
from depthkit.types import Kind, Prediction

NUM_PIXELS = 24
Box = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last."""


class Scene(NamedTuple):
    """What alternates over the measured pixels; `predictions` are of `kind`."""

    kind: Kind
    truths: list[float]
    predictions: list[float]


# The true disparities .1, .1, .1, .9 have mean .3; least squares over -1, 0, 0, 1 gives scale .4 and shift .3, so the
# aligned disparities are -.1, .3, .3, .7. The first is raised to the floor, 1 / F: depths F, 10/3, 10/3, 10/7, and
# AbsRel is (|F - 10| / 10 + 2/3 + 2/3 + 2/7) / 4.
DISPARITY = Scene("disparity", [10, 10, 10, 10 / 9], [-1, 0, 0, 1])
# The true depths 1, 1, 1, 9 have mean 3; scale 4, shift 3: aligned -1, 3, 3, 7. The first is clipped to the lower
# bound.
DEPTH = Scene("depth", [1, 1, 1, 9], [-1, 0, 0, 1])
# As they are: errors 1, 0, 1/4, and 19 for the last, or what its clipping to the cap leaves.
METRIC = Scene("depth", [1, 2, 4, 5], [2, 2, 5, 100])
# Medians 3 and 1.5: predictions 2, 2, 4 and 400, clipped to 80: errors 1, 0, 0, 15.
SCALE = Scene("depth", [1, 2, 4, 5], [1, 1, 2, 200])

NYU, KITTI, ANY, LARGE = (480, 640), (375, 1242), (40, 60), (768, 1024)
NYU_BOX: Box = (45, 471, 41, 601)
GARG: Box = (153, 371, 44, 1197)  # int(.408108 * 375) = int(153.04), int(371.96), int(44.65), int(1197.35)
EIGEN: Box = (124, 342, 44, 1197)  # int(.3324324 * 375) = int(124.66), int(342.57)
# Of the 352 x 1216 pixels from row 375 - 352 = 23, column (1242 - 1216) / 2 = 13 on:
GARG_IN_WINDOW: Box = (23 + 143, 23 + 349, 13 + 43, 13 + 1172)
EIGEN_IN_WINDOW: Box = (23 + 117, 23 + 321, 13 + 43, 13 + 1172)
GARG_768: Box = (313, 761, 36, 987)  # of 768 x 1024


def floored(floor: float) -> float:
    return (abs(floor - 10) / 10 + 2 / 3 + 2 / 3 + 2 / 7) / 4


def clipped(lowest: float) -> float:
    return (1 - lowest + 2 + 2 + 2 / 9) / 4


def capped(cap: float) -> float:
    return (1 + 0 + 1 / 4 + (cap - 5) / 5) / 4


CASES: dict[str, tuple[Scene, tuple[int, int], Box | None, float]] = {
    "affine_disparity": (DISPARITY, ANY, None, floored(80)),  # 7 + 4/3 + 2/7, over 4: 2.1548
    "affine_disparity_indoor": (DISPARITY, ANY, None, floored(10)),
    "affine_disparity_relative": (DISPARITY, ANY, None, floored(10)),  # the largest depth is 10
    "kitti_garg": (DISPARITY, KITTI, GARG, floored(80)),
    "nyu_eigen": (DISPARITY, NYU, NYU_BOX, floored(10)),
    "midas_kitti": (DISPARITY, KITTI, None, floored(80)),
    "midas_nyu": (DISPARITY, NYU, None, floored(10)),
    "midas_tum": (DISPARITY, NYU, None, floored(10)),
    "midas_eth3d": (DISPARITY, ANY, None, floored(72)),
    "midas_sintel": (DISPARITY, ANY, None, floored(72)),
    "moge_affine_disparity": (DISPARITY, ANY, None, floored(10)),
    "affine_depth": (DEPTH, ANY, None, clipped(1e-3)),
    "marigold_nyu": (DEPTH, NYU, NYU_BOX, clipped(1e-3)),
    "marigold_kitti": (DEPTH, KITTI, EIGEN_IN_WINDOW, clipped(1e-5)),
    "marigold_eth3d": (DEPTH, ANY, None, clipped(1e-5)),
    "marigold_scannet": (DEPTH, NYU, None, clipped(1e-3)),
    "marigold_diode": (DEPTH, LARGE, None, clipped(0.6)),
    "metric": (METRIC, ANY, None, capped(80)),
    "zoedepth_nyu": (METRIC, NYU, NYU_BOX, capped(10)),
    "zoedepth_ibims": (METRIC, NYU, NYU_BOX, capped(10)),
    "zoedepth_sunrgbd": (METRIC, (530, 730), NYU_BOX, capped(8)),
    "zoedepth_diode_indoor": (METRIC, LARGE, NYU_BOX, capped(10)),
    "zoedepth_diode_outdoor": (METRIC, LARGE, GARG_768, capped(80)),
    "zoedepth_hypersim": (METRIC, LARGE, NYU_BOX, capped(80)),
    "zoedepth_kitti": (METRIC, KITTI, GARG_IN_WINDOW, capped(80)),
    "zoedepth_vkitti2": (METRIC, KITTI, GARG_IN_WINDOW, capped(80)),
    "zoedepth_ddad": (METRIC, LARGE, GARG_768, capped(80)),
    "da_v2_metric_kitti": (METRIC, KITTI, None, capped(100)),  # not clipped
    "da_v2_metric_hypersim": (METRIC, ANY, None, capped(100)),
    "eigen2014_nyu": (METRIC, NYU, NYU_BOX, capped(100)),
    "eigen2014_kitti": (METRIC, KITTI, EIGEN, capped(100)),
    "sfmlearner": (SCALE, KITTI, GARG, (1 + 0 + 0 + 15) / 4),
}
"""Protocol -> scene, size of the image, evaluated box (None: all of it), AbsRel."""


def paint(scene: Scene, size: tuple[int, int], box: Box | None, protocol: ProtocolConfig) -> tuple[Case, np.ndarray]:
    """The case and the prediction that the docstring of this file describes."""
    top, bottom, left, right = box or (0, size[0], 0, size[1])
    depth, valid_mask = np.full(size, 5.0, np.float32), np.zeros(size, bool)
    prediction = np.full(size, -1e4, np.float32)
    if box is not None:
        valid_mask[top - 1 : bottom + 1, left - 1 : right + 1] = True
        valid_mask[top:bottom, left:right] = False
    half = NUM_PIXELS // 2
    first, last = (top, slice(left, left + half)), (bottom - 1, slice(right - half, right))
    for place in (first, last):
        depth[place], prediction[place] = (np.resize(x, half) for x in (scene.truths, scene.predictions))
        valid_mask[place] = True
    is_relative = protocol.unit.value == "image_maximum"
    bounds = [] if is_relative else [protocol.min_depth]
    bounds += [] if is_relative or protocol.max_depth is None else [np.nextafter(np.float32(protocol.max_depth), 1e9)]
    for column, bound in enumerate(bounds, start=left + 1):
        depth[top + 1, column], valid_mask[top + 1, column] = bound, True
    return Case(np.zeros((*size, 3), np.uint8), depth, valid_mask), prediction


@pytest.mark.parametrize("name", CASES)
def test_the_number_by_hand(name: str):
    scene, size, box, expected = CASES[name]
    protocol = shipped(name)
    case, prediction = paint(scene, size, box, protocol)
    windowed, predicted = cut(case, protocol), cut(case._replace(depth=prediction), protocol).depth
    assert check_enough_pixels(windowed, protocol) == NUM_PIXELS
    values = score_case(windowed, Prediction(values=predicted, kind=scene.kind, unit=""), protocol)
    assert list(values) == protocol.metrics
    assert values["abs_rel"] == pytest.approx(expected, rel=1e-5)
    both = aggregate(protocol, "abs_rel", [values["abs_rel"], 0.0], [NUM_PIXELS, 3 * NUM_PIXELS])
    share = 1 / 4 if protocol.aggregation is Aggregation.pixels else 1 / 2
    assert both == pytest.approx(expected * share, rel=1e-5)


@pytest.mark.parametrize(("name", "metric", "expected"), [("da2k", pair_accuracy, 2 / 4), ("whdr", whdr, 2 / 4)])
def test_pairs_by_hand(name: str, metric, expected: float):
    """One image with one pair, ordered rightly, and one with three, of which one is: over the pairs of both, 2 of 4."""
    nearness = torch.tensor([[3.0, 2.0, 2.0]])
    pairs = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 2], [0, 1, 0, 2]])
    closer = torch.tensor([0, 1, 0])  # right, wrong, a tie
    weights = [torch.ones(1), torch.ones(3)] if metric is whdr else [None, None]
    values = [
        metric(*filter(lambda x: x is not None, (nearness, pairs[:n], closer[:n], weight))).item()
        for n, weight in zip((1, 3), weights, strict=True)
    ]
    assert shipped(name).metrics == [metric.__name__]
    assert aggregate(shipped(name), metric.__name__, values, [1, 3]) == pytest.approx(expected)


@pytest.mark.parametrize("name", CASES)
def test_validation_on_a_gpu_waits_for_no_number(name: str):
    """A tensor on the device `meta` has no values: whatever would read one back to the host fails."""
    maps = [torch.empty(2, 40, 60, device="meta", dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bool)]
    values = score(*maps, shipped(name), CASES[name][0].kind)
    assert all(value.shape == (2,) for value in values.values())
    assert rank_correlation(*maps).shape == (2,)


def test_every_protocol_has_a_case():
    assert sorted([*CASES, "da2k", "whdr"]) == SHIPPED


def test_only_zoedepth_averages_over_the_mirror_image():
    assert {name for name in SHIPPED if shipped(name).flip} == {n for n in SHIPPED if n.startswith("zoedepth")}


@pytest.mark.parametrize("name", SHIPPED)
def test_each_carries_the_name_of_its_file_and_data_sets_that_there_are(name: str):
    assert shipped(name).name == name
    assert set(shipped(name).datasets or []) <= set(known_datasets())


def test_all_are_different():
    """MiDaS's are those of affine_disparity with a cap and data sets of their own, and rightly have the same hash."""
    protocols = [(shipped(name), protocol_id(shipped(name)).split("@")[1]) for name in SHIPPED]
    assert len({(digest, str(protocol.datasets)) for protocol, digest in protocols}) == len(SHIPPED) > 3
