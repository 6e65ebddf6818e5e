"""What contradicts the manifest, from what was seen in the samples: each with its evidence and the likely cure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from depthkit.data.inspection.look import Look
from depthkit.data.manifest import Manifest, TargetSpec

PERCENTILES = (1, 50, 99)
RANGE_SLACK = 1.05  # sensors and roundings overstep a range a little; a wrong scale does by far
USUAL_SCALES = (1.0, 10.0, 100.0, 256.0, 1000.0, 4000.0, 5000.0, 10000.0)
REACHES = 0.8  # of the far end of the range: what a right scale gives
REACHES_LITTLE = 0.3
PLAUSIBLE_M = (0.02, 1000.0)
MIN_WINDOWS, MIN_LOOKS, MIN_LEAD = 10, 3, 5
END_SHARE = 0.005  # of the pixels: more than a few outliers
NUM_EXAMPLES = 3


def contradictions(manifest: Manifest, looks: Sequence[Look]) -> Iterator[str]:
    """Reasons not to train on this data set as its manifest describes it."""
    yield from grouped((look.problem, place(manifest, look)) for look in looks if look.problem)
    if manifest.target is not None:
        yield from _range(manifest.target, looks)
        yield from _other_quantity(manifest, looks)
        yield from _unlisted_code(manifest, looks)


def doubts(manifest: Manifest, looks: Sequence[Look]) -> Iterator[str]:
    """What a person should look at, though it may be as it should."""
    target = manifest.target
    rejected = [place(manifest, look) for look in looks if look.is_rejected]
    if rejected:
        yield f"{examples(rejected)}: no label, the image was rejected when it was labelled"
    valid_shares = [look.valid_share for look in looks if look.valid_share is not None]
    if target is None or not valid_shares:
        return
    if target.invalid_values and min(valid_shares) == 1:
        yield (
            f"every pixel of all {len(valid_shares)} labels is valid, though the manifest lists the invalid values "
            f"{target.invalid_values}: were the holes filled?"
        )
    span = percentiles(looks)
    if span is None or not target.metric:
        return
    if target.depth_range is None:
        if not PLAUSIBLE_M[0] <= span[1] <= PLAUSIBLE_M[1]:
            yield f"half of the labels are beyond {span[1]:.3g} m; is target.scale = {target.scale:g} right?"
    elif span[2] < REACHES_LITTLE * target.depth_range[1]:
        high = target.depth_range[1]
        fitting = [s for s in fitting_scales(target, span) if REACHES * high <= span[2] * factor(target, s)]
        if fitting:
            yield (
                f"99 % of the labels are nearer than {span[2]:.3g} m, the manifest states up to {high:g} m; "
                f"target.scale = {fitting[0]:g} in place of {target.scale:g} would fill the range"
            )


def percentiles(looks: Iterable[Look]) -> np.ndarray | None:
    values = [look.values for look in looks if look.values is not None]
    return np.percentile(np.concatenate(values), PERCENTILES) if values else None


def share_outside(target: TargetSpec | None, look: Look) -> float:
    """Share of a label's values beyond the stated range and its slack."""
    if target is None or target.depth_range is None or not target.metric or look.values is None:
        return 0.0
    low, high = target.depth_range
    return float(((look.values < low / RANGE_SLACK) | (look.values > high * RANGE_SLACK)).mean())


def place(manifest: Manifest, look: Look) -> str:
    return f"{manifest.shards[look.shard].path}, {look.key}"


def examples(places: Sequence[str]) -> str:
    more = len(places) - NUM_EXAMPLES
    return "; ".join(places[:NUM_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def grouped(problems: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One line for each reason with the first places it holds for: (reason, place) of each."""
    places = defaultdict(list)
    for reason, where in problems:
        places[reason].append(where)
    for reason, found in places.items():
        yield f"{examples(found)}: {reason}"


def factor(target: TargetSpec, scale: float) -> float:
    """What depths are multiplied by when `target.scale` becomes `scale`."""
    is_inverse = target.quantity in ("inverse_depth", "stereo_disparity_px", "disparity")
    return scale / target.scale if is_inverse else target.scale / scale


def fitting_scales(target: TargetSpec, span: np.ndarray) -> list[float]:
    """Usual scales under which the percentiles lie in the stated range, the one nearest to the present first."""
    assert target.depth_range is not None
    low, high = target.depth_range[0] / RANGE_SLACK, target.depth_range[1] * RANGE_SLACK
    others = [scale for scale in USUAL_SCALES if scale != target.scale]
    fitting = [s for s in others if span[0] * factor(target, s) >= low and span[-1] * factor(target, s) <= high]
    return sorted(fitting, key=lambda scale: abs(np.log(factor(target, scale))))


def _range(target: TargetSpec, looks: Sequence[Look]) -> Iterator[str]:
    """A wrong scale moves the percentiles out of the range that the authors state."""
    span = percentiles(looks)
    if span is None or target.depth_range is None or not target.metric:
        return
    low, high = target.depth_range
    if span[0] < low / RANGE_SLACK or span[-1] > high * RANGE_SLACK:
        scales = fitting_scales(target, span)
        cure = (
            f"depth times {factor(target, scales[0]):.4g} would fit: set target.scale = {scales[0]:g}"
            if scales
            else "no usual scale fits either: check the unit, invalid_values and the range itself"
        )
        worst = max(looks, key=lambda look: share_outside(target, look))
        yield (
            f"98 % of the labels lie in {span[0]:.3g} to {span[-1]:.3g} m, the manifest states {low:g} to {high:g} m; "
            f"is target.scale = {target.scale:g} right? {cure} (farthest off: {worst.key})"
        )


def _other_quantity(manifest: Manifest, looks: Sequence[Look]) -> Iterator[str]:
    """Flat surfaces that are flat only if the labels are another quantity."""
    assert manifest.target is not None
    for truth in {name for look in looks for name in look.votes}:
        votes = np.array([look.votes[truth] for look in looks if truth in look.votes])
        stated, other = votes.sum(axis=0)
        convinced = [look for look in looks if truth in look.votes and look.votes[truth][1] > look.votes[truth][0]]
        if other >= max(MIN_WINDOWS, MIN_LEAD * stated) and len(convinced) >= MIN_LOOKS:
            yield (
                f"{other} of {other + stated} flat surfaces in {len(convinced)} labels are flat only if the stored "
                f"numbers are {truth}, not {manifest.target.quantity} as stated; "
                f"set target.quantity ({examples([place(manifest, look) for look in convinced])})"
            )


def _unlisted_code(manifest: Manifest, looks: Sequence[Look]) -> Iterator[str]:
    """One and the same far value, apart from all others, in several labels: a code that is read as a measurement."""
    target = manifest.target
    assert target is not None
    found = defaultdict(list)
    for look in looks:
        if look.end is not None and look.end[0] >= END_SHARE:
            found[look.end[1]].append(look)
    for disparity, same in found.items():
        if len(same) >= min(MIN_LOOKS, len(looks)):
            value = disparity if target.quantity in ("inverse_depth", "disparity") else 1 / disparity
            share = np.mean([look.end[0] for look in same if look.end])
            yield (
                f"{share:.1%} of the pixels of {examples([place(manifest, look) for look in same])} hold the very same "
                f"value {value:.6g} (stored: {value * target.scale:.6g}), far from all others: a code for 'no "
                "measurement' or sky? List it in target.invalid_values or target.sky_values"
            )
