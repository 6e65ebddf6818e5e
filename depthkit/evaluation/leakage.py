"""Was a model trained on the images that it is evaluated on?

Two looks: a bundle names the data sets that it, its teachers and its initial encoder were trained on, with the digests
of their manifests; and where such a manifest can be read from here, its images are compared by perceptual hash, which
finds copies under other names, sizes and qualities.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from depthkit.data.decode import decode_image, image_size
from depthkit.data.inspection.duplicates import BITS, Match, Pictures, find_duplicates, perceptual_hash
from depthkit.data.inspection.look import HASH_SIDE
from depthkit.data.shards import image_member
from depthkit.evaluation.ground_truth import EvaluationSet
from depthkit.evaluation.models import Model, provenance_of
from depthkit.licences import sources_of

RECORDED = re.compile(r"(?:labels of )?(.+/.+) \(([0-9a-f]{8})\)")
"""How `licences.name_of` writes a data set: NAME/SPLIT and the start of its manifest's digest."""

MAX_HASHED = 20_000
"""Images of a training set that are compared unasked; those of the sets that `training` names are all compared."""

NUM_EXAMPLES = 3


class Trained(NamedTuple):
    """A data set that a model was made from, by its name and the start of its digest, and the part that it had."""

    name: str
    digest: str
    part: str


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """In sentences: what was found, and what else a reader should know, above all what could not be checked."""

    found: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_leakage(
    models: Mapping[str, Model], datasets: Sequence[EvaluationSet], training: Sequence[str], num_workers: int
) -> Leakage:
    """Compare the data sets of an evaluation with what its models were trained on.

    `training` are manifests of images that the models were trained on, beside those that the folders of their runs name
    (`manifests_of_run`).
    """
    leakage = Leakage()
    given = {path: EvaluationSet(path) for path in training}
    readable = {data.manifest.digest()[:8]: data for data in given.values()}
    for model in models.values():
        for path in manifests_of_run(Path(model.name)):
            with suppress(ValueError):  # nobody asked for it, and what is recorded but not read is noted below
                data = EvaluationSet(path)
                readable.setdefault(data.manifest.digest()[:8], data)
    too_large = {name for name, data in readable.items() if data.manifest.num_samples > MAX_HASHED}
    too_large -= {data.manifest.digest()[:8] for data in given.values()}
    trained = {name: list(dict.fromkeys(trained_on(model))) for name, model in models.items()}
    for name, model in models.items():
        leakage.found.extend(same_data(name, trained[name], datasets))
        unknown = [source.name for source in sources_of(provenance_of(model)) if not RECORDED.fullmatch(source.name)]
        seen = (readable.keys() - too_large) | {data.manifest.digest()[:8] for data in datasets}
        unread = {row.name for row in trained[name] if row.digest not in seen}
        if unknown:
            leakage.notes.append(f"{name}: leakage could not be checked for {', '.join(unknown)}")
        leakage.notes.extend(validated_on(name, provenance_of(model), datasets))
        if unread:
            leakage.notes.append(
                f"{name}: leakage was checked by name and digest alone, not by image, for {', '.join(sorted(unread))}; "
                "training=MANIFEST,... has their images compared as well"
            )
    recorded = {row.digest for rows in trained.values() for row in rows}
    used = recorded | {data.manifest.digest()[:8] for data in given.values()}
    compared = [data for digest, data in readable.items() if digest in used - too_large]
    with ThreadPoolExecutor(num_workers) as pool:
        training_pictures = [hash_pictures(data, pool, "train") for data in compared]
        pictures = [hash_pictures(data, pool, "test") for data in datasets if compared]
    for data, hashed in zip(compared, training_pictures, strict=True):
        if missing := data.manifest.num_samples - len(hashed.hashes):
            leakage.notes.append(
                f"leakage could not be checked for {missing} of the {data.manifest.num_samples} images of {data.name}, "
                "which is training data: they cannot be read, or have no contrast"
            )
    leakage.found.extend(same_pictures([*compared, *datasets], [*training_pictures, *pictures], known=recorded))
    return leakage


# --- by manifest -----------------------------------------------------------------------------------------------------


def trained_on(model: Model) -> Iterator[Trained]:
    """The data sets that the provenance of a model records: its own, its teachers' and its initial encoder's."""
    for source in sources_of(provenance_of(model)):
        if recorded := RECORDED.fullmatch(source.name):
            yield Trained(recorded[1], recorded[2], source.part)


def same_data(model: str, trained: Sequence[Trained], datasets: Sequence[EvaluationSet]) -> Iterator[str]:
    """A sentence for each data set that a model was trained on: the same manifest, or one of the same name."""
    for dataset in datasets:
        digest = dataset.manifest.digest()
        for row in trained:
            if digest.startswith(row.digest):
                yield f"{model} was trained on {dataset.name} itself ({row.part}, manifest {row.digest})"
            elif row.name == dataset.name:
                yield f"{model} was trained on another packing of {dataset.name} ({row.part}, manifest {row.digest})"


def validated_on(model: str, provenance: Mapping[str, Any], datasets: Sequence[EvaluationSet]) -> Iterator[str]:
    """A sentence for each data set by which the checkpoint of a model may have been chosen."""
    digests = {row["digest"] for row in (provenance.get("validation") or {}).values()}
    for dataset in datasets:
        if dataset.manifest.digest() in digests:
            yield f"{dataset.name} is validation data of {model}: its checkpoint or settings may be chosen by it"


# --- by image --------------------------------------------------------------------------------------------------------


def manifests_of_run(model: Path) -> Iterator[str]:
    """Training manifests that the run of a bundle names and that are files here; those of its initial encoder too."""
    settings = model.parent / "config.yaml"
    if model.name != "bundle" or not settings.is_file():
        return
    config = OmegaConf.load(settings)
    for stream in ("labeled", "unlabeled"):
        for dataset in (OmegaConf.select(config, f"data.{stream}") or {}).values():
            if Path(dataset.manifest).is_file():
                yield dataset.manifest
    encoder = OmegaConf.select(config, "stage.encoder_weights")
    if encoder and Path(encoder).resolve() != model.resolve():
        yield from manifests_of_run(Path(encoder))


def same_pictures(sets: Sequence[EvaluationSet], pictures: Sequence[Pictures], known: Container[str]) -> Iterator[str]:
    """A sentence for each pair of a training and an evaluated data set that share pictures, or nearly the same ones.

    Not for a data set and itself if its digest is among `known`, those for which `same_data` says so.
    """
    pairs: dict[tuple[int, int], list[Match]] = {}
    for match in find_duplicates(pictures).leaks:
        pairs.setdefault((match.first[0], match.second[0]), []).append(match)
    digests = [data.manifest.digest()[:8] for data in sets]
    for (ours, theirs), matches in pairs.items():
        if digests[ours] == digests[theirs] and digests[ours] in known:
            continue
        examples = [
            f"{key_of(sets[theirs], pictures[theirs], match.second[1])} looks like "
            f"{key_of(sets[ours], pictures[ours], match.first[1])} ({match.distance} of {BITS} bits differ)"
            for match in matches[:NUM_EXAMPLES]
        ]
        yield (
            f"{len(matches)} of {sets[theirs].manifest.num_samples} images of {sets[theirs].name} look like images of "
            f"{sets[ours].name}, which is training data: {', '.join(examples)}"
        )


def hash_pictures(data: EvaluationSet, pool: ThreadPoolExecutor, split: str) -> Pictures:
    """The perceptual hashes of all images that can be read and have contrast; `split` as in `Pictures`."""
    shards = enumerate(data.manifest.shards)
    places = [(shard, index) for shard, facts in shards for index in range(facts.num_samples)]
    hashes = list(pool.map(lambda place: _hash(data, *place), places))
    hashed = [(value, place) for value, place in zip(hashes, places, strict=True) if value is not None]
    return Pictures(
        split=split,
        hashes=np.array([value for value, _ in hashed], np.uint64),
        places=np.array([place for _, place in hashed], np.int64).reshape(-1, 2),
    )


def _hash(data: EvaluationSet, shard: int, index: int) -> int | None:
    try:
        content = image_member(data.members(shard, index))
        short_side = min(image_size(content))
        reduce = next(n for n in (8, 4, 2, 1) if short_side >= n * HASH_SIDE or n == 1)
        return perceptual_hash(decode_image(content, reduce=reduce))
    except (ValueError, OSError):  # a broken sample; a tar or a server that is gone
        return None


def key_of(data: EvaluationSet, pictures: Pictures, number: int) -> str:
    shard, index = pictures.places[number].tolist()
    return data.keys(shard)[index]
