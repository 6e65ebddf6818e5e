"""Ground truth that is pairs of points, one of them closer to the camera, as DA-2K and DIW annotate them."""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from depthkit.data.decode import decode_image, read_facts
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import image_member
from depthkit.evaluation.protocols import INTERPOLATION
from depthkit.evaluation.settings import Aggregation, ProtocolConfig
from depthkit.metrics_pairs import pair_accuracy, whdr
from depthkit.types import Prediction


class PairCase(NamedTuple):
    """One image, (H, W, 3) uint8 RGB, and pairs of its points.

    `pairs` is (N, 4) int64, row and column of the first and of the second point; `closer` is (N,) int64, 0 or 1, the
    point that is closer; `weights` is (N,) float32, the confidence of the annotators.
    """

    image: np.ndarray
    pairs: np.ndarray
    closer: np.ndarray
    weights: np.ndarray


def read_pairs(members: dict[str, bytes]) -> PairCase:
    """The image of a sample and its fact `pairs`: a list of [row 1, column 1, row 2, column 2, closer] or the same with
    a weight as sixth number; `closer` is 1 or 2. SampleError when there are none, or one is not like that."""
    image = decode_image(image_member(members))
    stored = read_facts(members).get("pairs")
    if not stored:
        raise SampleError("its facts hold no pairs: KEY.json needs `pairs`")
    try:
        numbers = np.array([row if len(row) == 6 else [*row, 1.0] for row in stored], np.float64)
    except (TypeError, ValueError):
        numbers = np.empty(0)
    is_table = numbers.ndim == 2 and numbers.shape[1] == 6 and np.isfinite(numbers).all()
    if not is_table or not np.isin(numbers[:, 4], (1, 2)).all() or (numbers[:, 5] < 0).any():
        wanted = "[row 1, column 1, row 2, column 2, closer], with closer 1 or 2, and perhaps a weight >= 0"
        raise SampleError(f"the sample's fact 'pairs' is {str(stored)[:80]}, not a list of {wanted}")
    pairs = numbers[:, :4].astype(np.int64)
    height, width = image.shape[:2]
    is_outside = (pairs < 0) | (pairs >= (height, width, height, width))
    if is_outside.any():
        raise SampleError(f"pair {pairs[is_outside.any(1)][0].tolist()} lies outside its image of {height}x{width}")
    return PairCase(image, pairs, numbers[:, 4].astype(np.int64) - 1, numbers[:, 5].astype(np.float32))


def count_pairs(case: PairCase, protocol: ProtocolConfig) -> int:
    """How many pairs the image has; ValueError where their weights cannot enter a number over all pairs."""
    is_pooled = protocol.aggregation is Aggregation.pixels and "whdr" in protocol.metrics
    if is_pooled and (case.weights != 1).any():
        raise ValueError(
            f"{protocol.name} counts the pairs of all images alike, and these pairs have weights: "
            "protocol.aggregation=images takes them into account"
        )
    return len(case.pairs)


def score_pairs(case: PairCase, prediction: Prediction, protocol: ProtocolConfig) -> tuple[dict[str, float], float]:
    """The protocol's metrics of one image, and Kendall's rank correlation over its pairs: the share that is ordered
    rightly minus the share that is ordered wrongly; a tie is neither.

    A prediction of another size than the image is resized to it.
    """
    values = torch.from_numpy(np.ascontiguousarray(prediction.values)).float()
    if values.shape != case.image.shape[:2]:
        values = interpolate(values[None, None], case.image.shape[:2], **INTERPOLATION[protocol.resize])[0, 0]
    nearness = values if prediction.kind == "disparity" else -values
    pairs, closer, weights = map(torch.from_numpy, case[1:])
    accuracy = pair_accuracy(nearness, pairs, closer).item()
    scores = {"pair_accuracy": accuracy, "whdr": whdr(nearness, pairs, closer, weights).item()}
    return {name: scores[name] for name in protocol.metrics}, accuracy - pair_accuracy(-nearness, pairs, closer).item()
