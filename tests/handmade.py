"""Small data sets whose images show their own labels: the grey level of a pixel is ten times its depth in metres."""

import json
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

from depthkit.data.decode import encode_disparity
from depthkit.data.manifest import LabelSettings, LabelsOf, Manifest, TargetSpec, load_manifest, save_manifest
from depthkit.data.writer import ShardWriter

DEPTH = TargetSpec(quantity="depth", codec="png16", extension="depth.png", scale=1000)
"""Millimetres."""

DISPARITY = TargetSpec(quantity="disparity", codec="png16", extension="disparity.png", metric=False)

Samples = Mapping[str, dict[str, bytes]]


def png(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".png", pixels)
    assert done
    return data.tobytes()


def jpeg(pixels: np.ndarray, quality: int = 95) -> bytes:
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return data.tobytes()


def grey_levels(seed: int, size: tuple[int, int]) -> np.ndarray:
    """A smooth picture (H, W) uint8 from 20 to 220, another one for each seed."""
    coarse = np.random.default_rng(seed).uniform(20, 220, (3, 4)).astype(np.float32)
    return np.clip(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_LINEAR), 20, 220).astype(np.uint8)


def labeled_sample(
    seed: int, size: tuple[int, int] = (32, 40), *, label_size: tuple[int, int] | None = None
) -> dict[str, bytes]:
    grey = grey_levels(seed, size)
    label = grey if label_size is None else cv2.resize(grey, label_size[::-1], interpolation=cv2.INTER_NEAREST)
    return {"jpg": jpeg(grey), "depth.png": png(label.astype(np.uint16) * 100)}


def unlabeled_sample(seed: int, size: tuple[int, int] = (32, 40)) -> dict[str, bytes]:
    return {"jpg": jpeg(grey_levels(seed, size)), "json": json.dumps({"seed": seed}).encode()}


def write_dataset(
    folder: Path,
    samples: Samples,
    target: TargetSpec | None = DEPTH,
    *,
    samples_per_shard: int = 8,
    name: str = "rooms",
    labels_of: LabelsOf | None = None,
) -> Path:
    """Pack `samples` (key -> members) in their order and return the path of the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    items = list(samples.items())
    shards = []
    for start in range(0, len(items), samples_per_shard):
        with ShardWriter(folder / f"train-{start // samples_per_shard:06d}.tar") as writer:
            for key, members in items[start : start + samples_per_shard]:
                writer.add(key, members)
        shards.append(writer.close())
    manifest = Manifest(
        name=name,
        split="train",
        target=target,
        shards=tuple(shards),
        licence="none",
        source="tests",
        labels_of=labels_of,
    )
    save_manifest(manifest, folder / "manifest.json")
    return folder / "manifest.json"


def pseudo_labels(folder: Path, images: Path, keys: list[str], *, size: tuple[int, int] = (32, 40)) -> Path:
    """A label set for `keys`: disparity falls from 3 at the top to 1 at the bottom."""
    disparity = np.linspace(3, 1, size[0], dtype=np.float32)[:, None].repeat(size[1], axis=1)
    code, facts = encode_disparity(disparity)
    members = {"disparity.png": code, "json": json.dumps(facts).encode()}
    origin = LabelsOf(
        images="rooms",
        images_digest=load_manifest(images).digest(),
        teacher_sha256="ab" * 32,
        settings=LabelSettings(short_side=size[0], precision="32-true", flip=True),
        code_version="1",
    )
    return write_dataset(folder, dict.fromkeys(keys, members), DISPARITY, labels_of=origin)
