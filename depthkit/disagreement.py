"""How much the labels that several teachers gave one image differ: an ensemble of networks, for choosing images."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from depthkit.config import ConfigError
from depthkit.data.decode import decode_target, read_facts, target_size
from depthkit.data.manifest import Manifest, TargetSpec
from depthkit.data.quarantine import SampleError
from depthkit.data.shards import OpenShard

LONGEST_SIDE = 256
"""Pixels of the grid on which labels are compared, which are smooth but for their edges."""


def check_same_images(paths: Sequence[str], manifests: Sequence[Manifest]) -> None:
    """ConfigError unless all are label sets, and of the same images."""
    for path, manifest in zip(paths, manifests, strict=True):
        first, own = manifests[0].labels_of, manifest.labels_of
        if first is None or own is None:
            named = path if own is None else paths[0]
            raise ConfigError(f"labels={named} is not a pseudo-label set; `depthkit label` writes one")
        if own.images_digest != first.images_digest:
            raise ConfigError(
                f"{path} labels {own.images!r} with digest {own.images_digest[:12]}, {paths[0]} {first.images!r} with "
                f"digest {first.images_digest[:12]}: teachers can only disagree on the same images"
            )
        if [(s.path, s.num_samples) for s in manifest.shards] != [(s.path, s.num_samples) for s in manifests[0].shards]:
            raise ConfigError(f"{path} and {paths[0]} do not match shard for shard; label with stage.verify=true")


def scores_between(shards: Sequence[OpenShard], manifests: Sequence[Manifest]) -> np.ndarray:
    """The disagreement of every sample of one shard of each label set, NaN where a set has no label; (samples,)."""
    targets = [manifest.target for manifest in manifests if manifest.target is not None]
    for shard in shards[1:]:
        if shard.keys != shards[0].keys:
            raise SampleError(f"{shard.name} has other keys than {shards[0].name}; label with stage.verify=true")
    scores = np.full(len(shards[0].keys), np.nan)
    with ExitStack() as files:
        for shard in shards:
            files.enter_context(shard.file)
        for index in range(len(scores)):
            found = [members(shard, index) for shard in shards]
            if all(target.extension in each for target, each in zip(targets, found, strict=True)):
                scores[index] = disagreement(found, targets)
    return scores


def members(shard: OpenShard, index: int) -> dict[str, bytes]:
    descriptor = shard.file.fileno()
    return {name: os.pread(descriptor, size, offset) for name, (offset, size) in shard.places[index].items()}


def disagreement(labels: Sequence[dict[str, bytes]], targets: Sequence[TargetSpec]) -> float:
    """`Ensemble.disagreement` of one image's labels, given by their members, on a grid that none of them exceeds."""
    import torch  # one label set has its scores in JSON, and needs no second to load it

    from depthkit.ensembling import combine

    stored = [label[target.extension] for label, target in zip(labels, targets, strict=True)]
    sizes = [target_size(data, target.codec) for data, target in zip(stored, targets, strict=True)]
    height, width = min(sizes)
    shrink = min(1.0, LONGEST_SIDE / max(height, width))
    grid = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    maps, masks = [], []
    for label, data, target, size in zip(labels, stored, targets, sizes, strict=True):
        rows, cols = (((np.arange(n) + 0.5) * side / n).astype(np.int64) for n, side in zip(grid, size, strict=True))
        values, mask = decode_target(data, target, read_facts(label), "disparity", rows=rows, cols=cols)
        maps.append(torch.from_numpy(values)[None])
        masks.append(torch.from_numpy(mask)[None])
    return combine(maps, torch.stack(masks).all(0)).disagreement.item()
