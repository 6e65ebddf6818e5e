"""What only samples can tell, asked of the first ones of a data set before step 1."""

import numpy as np

from depthkit.data.cameras import image_facts, image_intrinsics
from depthkit.data.clips import ClipReader
from depthkit.data.quarantine import SampleError
from depthkit.data.reader import DatasetReader
from depthkit.errors import ConfigError

NUM_LOOKED_AT = 3
"""Samples of a data set: one may be broken, and is no more than that."""


def check_poses(reader: ClipReader) -> None:
    """ConfigError where the first clips cannot be judged, each for its reason: most often poses are not known."""
    errors = []
    for shard, index in first_places(reader):
        try:
            reader.read_whole(shard, index, short_side=32, multiple=1)
            return
        except SampleError as error:
            errors.append(error)
    if errors:
        raise ConfigError(f"data.val_clips.{reader.middle.name}: {errors[0]}")


def check_cameras(readers: list[DatasetReader]) -> None:
    """ConfigError where no data set says what camera took its first images, without which labels have no normals."""
    if not any(knows_camera(reader) for reader in readers):
        names = ", ".join(reader.name for reader in readers)
        raise ConfigError(
            f"stage.normals=True: the first images of data.labeled ({names}) lack intrinsics_px, [fx, fy, cx, cy] of a "
            "pinhole camera; state K in the index that is packed, or set stage.normals=false"
        )


def knows_camera(reader: DatasetReader) -> bool:
    for shard, index in first_places(reader):
        try:
            facts = image_facts(reader.images.read(shard, index).members)
            return bool(np.isfinite(image_intrinsics(facts, (1, 1))).all())
        except SampleError:
            continue
    return True  # broken, which is for the quarantine to say


def first_places(reader: DatasetReader | ClipReader) -> list[tuple[int, int]]:
    """(shard, sample) of the first samples of the first shard that has any."""
    sizes = reader.shard_sizes
    shard = next((number for number, size in enumerate(sizes) if size), 0)
    return [(shard, index) for index in range(min(NUM_LOOKED_AT, sizes[shard] if sizes else 0))]
