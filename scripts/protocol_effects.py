"""How much each choice of a protocol moves a number: one model, the same images, one thing changed at a time.

    python scripts/protocol_effects.py BUNDLE MANIFEST [MANIFEST ...] [--out effects.md]

Prints a table for docs/why-your-number-differs.md. Every row compares the mean AbsRel of `affine_disparity` with that
of a changed protocol, or of a changed way to handle the same images, over the data sets that the row is about. The
model must predict disparity. An image enters a row only where both sides can score it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

import depthkit
from depthkit.data.quarantine import SampleError
from depthkit.evaluation.ground_truth import Case, EvaluationSet, check_enough_pixels, cut, score_case
from depthkit.evaluation.protocols import aggregate, protocol_id, rank_correlation
from depthkit.evaluation.settings import Aggregation, Alignment, Clip, Floor, ProtocolConfig, Resize
from depthkit.files import atomic_write
from depthkit.inference.predictor import Predictor
from depthkit.types import Prediction

BASE = ProtocolConfig(name="affine_disparity", max_depth=80, alignment=Alignment.disparity_least_squares)
GARG = [0.40810811, 0.99189189, 0.03594771, 0.96405229]
EIGEN_KITTI = [0.3324324, 0.91351351, 0.0359477, 0.96405229]
EIGEN_NYU = [45.0, 471.0, 41.0, 601.0]
SMALLEST = 1e-3
"""Of a disparity that is inverted, as a share of the largest of its image."""

Change = Callable[[Predictor, Case, Prediction], tuple[Case, Prediction]]


def unchanged(predictor: Predictor, case: Case, prediction: Prediction) -> tuple[Case, Prediction]:
    return case, prediction


def flipped(predictor: Predictor, case: Case, prediction: Prediction) -> tuple[Case, Prediction]:
    return case, predictor.predict(case.image, flip=True)


def with_small_truth(predictor: Predictor, case: Case, prediction: Prediction) -> tuple[Case, Prediction]:
    """The ground truth at the size at which the network sees the image."""
    scale = predictor.facts.short_side / min(case.image.shape[:2])
    width, height = (round(scale * side) for side in case.image.shape[1::-1])
    mask = cv2.resize(case.valid_mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
    depth = cv2.resize(case.depth, (width, height), interpolation=cv2.INTER_NEAREST)
    return case._replace(depth=depth, valid_mask=mask), prediction


def inverted(predictor: Predictor, case: Case, prediction: Prediction) -> tuple[Case, Prediction]:
    """Depth that is passed off as disparity."""
    values = 1 / np.maximum(prediction.values, SMALLEST * prediction.values.max())
    return case, replace(prediction, values=values)


@dataclass(frozen=True)
class Row:
    """What is changed, and on which data sets (by a part of the name; all if empty)."""

    title: str
    protocol: ProtocolConfig
    datasets: str = ""
    change: Change = unchanged


ROWS = (
    Row("no floor under aligned disparity, nothing clipped", replace(BASE, floor=Floor.none, clip=Clip.none)),
    Row("no floor, but depths clipped after alignment", replace(BASE, floor=Floor.none)),
    Row("disparity raised to 1 / largest ground truth instead of 1 / cap", replace(BASE, floor=Floor.image_maximum)),
    Row("robust fit instead of least squares", replace(BASE, alignment=Alignment.disparity_robust)),
    Row("cap 10 m instead of 80 m", replace(BASE, max_depth=10)),
    Row("Garg crop", replace(BASE, crop=GARG), "kitti"),
    Row("Eigen crop of KITTI", replace(BASE, crop=EIGEN_KITTI), "kitti"),
    Row("KITTI benchmark crop, image cut too", replace(BASE, window=[352, 1216]), "kitti_metric3d"),
    Row("Eigen crop of NYU", replace(BASE, crop=EIGEN_NYU), "nyu"),
    Row("pixels at jumps of depth over 10 % left out", replace(BASE, max_jump=0.1)),
    Row("prediction resized to nearest", replace(BASE, resize=Resize.nearest)),
    Row("prediction resized corner to corner", replace(BASE, resize=Resize.bilinear_corners)),
    Row("ground truth resized to the network's size", BASE, change=with_small_truth),
    Row("mean with the mirrored image", replace(BASE, flip=True), change=flipped),
    Row("depth passed as disparity", BASE, change=inverted),
)


@dataclass(frozen=True)
class Scored:
    """One image: AbsRel of the base and of each row (NaN where the row does not apply), and evaluated pixels."""

    dataset: str
    base: float
    rows: list[float]
    num_pixels: int
    order: tuple[float, float]  # rank correlation with the truth, of the prediction and of its inverse


def score_image(predictor: Predictor, name: str, whole: Case) -> Scored:
    prediction = predictor.predict(whole.image)

    def abs_rel(row: Row) -> float:
        if row.datasets not in name:
            return np.nan
        case = cut(whole, row.protocol)
        changed = prediction if row.protocol.window is None else predictor.predict(case.image)
        return score_case(*row.change(predictor, case, changed), row.protocol)["abs_rel"]

    depth, mask = (torch.from_numpy(values)[None] for values in (whole.depth, whole.valid_mask))
    order = [
        float(rank_correlation(torch.from_numpy(values)[None], depth, mask))
        for values in (prediction.values, inverted(predictor, whole, prediction)[1].values)
    ]
    return Scored(
        dataset=name,
        base=score_case(whole, prediction, BASE)["abs_rel"],
        rows=[abs_rel(row) for row in ROWS],
        num_pixels=check_enough_pixels(whole, BASE),
        order=(order[0], order[1]),
    )


def score_all(predictor: Predictor, manifests: Sequence[str]) -> list[Scored]:
    scored = []
    for manifest in manifests:
        dataset = EvaluationSet(manifest)
        if reason := dataset.refusal(BASE):
            print(f"{dataset.name}: left out, {reason}")
            continue
        for shard in range(len(dataset.manifest.shards)):
            for index, key in enumerate(dataset.keys(shard)):
                try:
                    case = dataset.read(shard, index)
                    check_enough_pixels(case, BASE)
                except SampleError as error:
                    print(f"{dataset.name} {key}: left out, {error}")
                    continue
                scored.append(score_image(predictor, dataset.name, case))
    return scored


def handling(scored: Sequence[Scored]) -> list[tuple[str, int, float, float]]:
    """Other ways to make one number of the same images: title, images, and the two means."""
    values = np.array([image.base for image in scored])
    pixels = [image.num_pixels for image in scored]
    pooled = aggregate(replace(BASE, aggregation=Aggregation.pixels), "abs_rel", values, pixels)
    found = [("pixels of all images pooled instead of a mean over images", len(values), values.mean(), float(pooled))]
    for size in (8, 64):
        padded = np.resize(values, -(-len(values) // size) * size)  # begins again at the end
        found.append((f"first images repeated up to a multiple of {size}", len(values), values.mean(), padded.mean()))
        whole = values[: len(values) // size * size]
        if len(whole):
            found.append((f"last batch of {size} dropped", len(values), values.mean(), whole.mean()))
    return found


def table(scored: Sequence[Scored]) -> str:
    lines = [
        f"Base: `{protocol_id(BASE)}`.",
        "",
        "| what is changed | id | images | AbsRel | changed | effect |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for number, row in enumerate(ROWS):
        both = np.array([[image.base, image.rows[number]] for image in scored])
        both = both[~np.isnan(both).any(1)]
        if len(both):
            name = f"`@{protocol_id(row.protocol).split('@')[1]}`"
            lines.append(_line(row.title, name, len(both), *both.mean(0)))
    lines += [_line(title, "", count, *means) for title, count, *means in handling(scored)]
    orders = np.median([image.order for image in scored], axis=0)
    lines += [
        "",
        f"Rank correlation with the ground truth, median over images: {orders[0]:.2f}; of its inverse {orders[1]:.2f}.",
    ]
    return "\n".join(lines) + "\n"


def _line(title: str, name: str, count: int, before: float, after: float) -> str:
    effect = f"{100 * (after / before - 1):+.1f} %" if after < 100 * before else f"x {after / before:.2g}"
    return f"| {title} | {name} | {count} | {before:.4f} | {after:.4g} | {effect} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="a model that predicts disparity")
    parser.add_argument("manifests", nargs="+", metavar="MANIFEST")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    scored = score_all(depthkit.load(args.bundle), args.manifests)
    text = table(scored)
    print(text)
    if args.out:
        with atomic_write(args.out) as file:
            file.write(text.encode())


if __name__ == "__main__":
    main()
