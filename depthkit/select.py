"""`depthkit select labels=MANIFEST out=FILE fraction=0.3`: images chosen by how much their labels disagree."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from depthkit.config import ConfigError
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import Manifest, Shard, load_manifest
from depthkit.data.procedural.pack import images_progress
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import root_of
from depthkit.data.selection import Selection, save_selection
from depthkit.data.shards import OpenShard, open_shard
from depthkit.disagreement import check_same_images, scores_between

DESCRIPTION = """\
Choose images by the disagreement of their labels: the variance between the variants of an image that the teacher
labeled (`depthkit label ... stage.flip=true`), relative to the variance of the label. Of several label sets of the same
images, labels=A,B,..., it is the variance between the labels, each brought to scale and shift of those of A; the
selection is then one of A.

  fraction=0.3            the 30% of the labeled images with the largest disagreement: the most informative ones
  max_disagreement=0.05   the images with at most this disagreement: without those that are labeled badly

OUT is a file that training takes as data.unlabeled.NAME.selection=OUT. Images without a label are never chosen."""

SCORE = "disagreement"
NUM_READERS = 8
"""Shards whose scores are read at a time."""
NUM_BINS = 12
BAR_WIDTH = 40  # characters


class Rule(NamedTuple):
    """Which of some scores are kept: `kept(scores)` gives their positions. `text` is what the user asked for."""

    text: str
    kept: Callable[[np.ndarray], np.ndarray]


def main(argv: list[str]) -> int:
    try:
        labels, out, rule = parse_arguments(argv)
        select(labels, out, rule)
    except (OSError, ValueError) as error:
        print(f"depthkit select: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: list[str]) -> tuple[list[str], Path, Rule]:
    """Labels, output and rule of the command line; ConfigError names what is missing, unknown or out of range."""
    parser = argparse.ArgumentParser(
        prog="depthkit select", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "settings", nargs="+", metavar="KEY=VALUE", help="labels, out, and fraction or max_disagreement"
    )
    settings = dict(item.partition("=")[::2] for item in parser.parse_args(argv).settings)
    rules = {"fraction": largest, "max_disagreement": at_most}
    given = [name for name in rules if name in settings]
    if len(given) != 1 or settings.keys() != {"labels", "out", *given}:
        raise ConfigError(f"{' '.join(argv)}: give labels=, out= and one of fraction= and max_disagreement=")
    (name,) = given
    try:
        value = float(settings[name])
    except ValueError:
        raise ConfigError(f"{name}={settings[name]}: must be a number") from None
    return settings["labels"].split(","), Path(settings["out"]), Rule(f"{name}={settings[name]}", rules[name](value))


def largest(fraction: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keep the `fraction` of all scores that is largest, rounded, at least one; of equal ones the first."""
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction={fraction}: must be a share of the images, > 0 and <= 1")
    return lambda scores: np.argsort(-scores, kind="stable")[: max(1, round(fraction * len(scores)))]


def at_most(limit: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keep the scores up to `limit`."""
    if not (0 <= limit < math.inf):
        raise ConfigError(f"max_disagreement={limit}: must be a variance ratio, >= 0")
    return lambda scores: np.flatnonzero(scores <= limit)


def select(labels: list[str], out: Path, rule: Rule) -> Selection:
    """Choose images by the scores of their labels, of one set or between several, write the selection to `out` and
    print what was chosen.

    ConfigError when a manifest is not that of pseudo-labels or of other images than the first, when the labels have no
    scores, and when none is kept.
    """
    manifests = [load_manifest(path) for path in labels]
    check_same_images(labels, manifests)
    manifest = manifests[0]
    assert manifest.labels_of is not None
    by_shard = read_scores(manifests, [root_of(path) for path in labels])
    scores = np.concatenate(by_shard)
    labeled = np.flatnonzero(~np.isnan(scores))
    chosen = np.sort(labeled[rule.kept(scores[labeled])])
    if not len(chosen):
        smallest = f"; the smallest disagreement is {scores[labeled].min():.4g}" if len(labeled) else ""
        raise ConfigError(f"{rule.text} keeps none of {len(labeled)} labeled images{smallest}")
    ends = np.cumsum([len(each) for each in by_shard])
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    samples = {
        shard.path: (part - end + shard.num_samples).tolist()
        for shard, part, end in zip(manifest.shards, parts, ends, strict=True)
    }
    selection = Selection(
        images_digest=manifest.labels_of.images_digest,
        labels_digest=manifest.digest(),
        rule=rule.text,
        samples={path: kept for path, kept in samples.items() if kept},
    )
    save_selection(selection, out)
    Console().print(histogram(scores[labeled], scores[chosen]))
    without = f", {len(scores) - len(labeled)} images have no label" if len(labeled) < len(scores) else ""
    print(f"{out}: {len(chosen)} of {len(labeled)} labeled images in {len(selection.samples)} shards{without}")
    return selection


def read_scores(manifests: list[Manifest], roots: list[Path | str]) -> list[np.ndarray]:
    """The disagreement of every sample of every shard, NaN where an image has no label."""
    cache, found = ShardCache(), []
    manifest = manifests[0]

    def read(shards: Sequence[Shard]) -> np.ndarray:
        opened = [open_shard(root, shard, cache) for root, shard in zip(roots, shards, strict=True)]
        return scores_of_shard(opened[0], manifest) if len(opened) == 1 else scores_between(opened, manifests)

    with ExitStack() as stack:
        advance = stack.enter_context(images_progress("reading", manifest.num_samples, shown=sys.stderr.isatty()))
        pool = ThreadPoolExecutor(NUM_READERS)
        stack.callback(pool.shutdown, cancel_futures=True)
        for scores in pool.map(read, zip(*(each.shards for each in manifests), strict=True)):
            found.append(scores)
            advance(len(scores))
    return found


def scores_of_shard(shard: OpenShard, manifest: Manifest) -> np.ndarray:
    """(samples,) float64. Reads `KEY.json` alone."""
    assert manifest.target is not None
    scores = np.full(len(shard.keys), np.nan)
    with shard.file as file:
        for index, places in enumerate(shard.places):
            if manifest.target.extension in places:
                offset, size = places.get("json", (0, 0))
                scores[index] = score_in(os.pread(file.fileno(), size, offset), f"{shard.name}: {shard.keys[index]}")
    return scores


def score_in(data: bytes, name: str) -> float:
    try:
        facts = json.loads(data)
        score = facts.get(SCORE)
    except (ValueError, AttributeError) as error:
        raise SampleError(f"{name}: its json member is damaged ({error}); label with stage.verify=true") from error
    if not isinstance(score, int | float):
        raise ConfigError(
            f"{name}: the label has no {SCORE!r}; label into another folder with stage.flip=true or "
            "stage.scales=[1.0,1.25], or both"
        )
    return float(score)


def histogram(scores: np.ndarray, chosen: np.ndarray) -> Table:
    """How many images have which disagreement, and how many of those were kept."""
    table = Table("disagreement", "images", "kept", "")
    low, high = np.maximum(np.quantile(scores, [0.01, 1.0]), 1e-9)
    edges = np.unique([0.0, *np.geomspace(low, high, NUM_BINS)[1:-1], np.inf])
    counts, kept = (np.histogram(values, edges)[0] for values in (scores, chosen))
    for number, count in enumerate(counts):
        bar = "█" * math.ceil(BAR_WIDTH * count / counts.max())
        table.add_row(f"{edges[number]:.3g} to {min(edges[number + 1], high):.3g}", str(count), str(kept[number]), bar)
    return table
