"""Images for the teacher: chunks of shards, batches of one size."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from handmade import grey_levels
from test_labeling import SIZE, every_chunk, write_images

from depthkit.data.label_images import MAX_BATCHES_LATE, ImageChunk, ImageGroup, full_batches


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_chunks_group_images_by_size_and_know_the_last_of_a_shard(images: Path):
    chunks = every_chunk(images, [1, 2], 3)
    assert [(chunk.shard, chunk.first, len(chunk.keys), chunk.is_last) for chunk in chunks] == [
        (1, 0, 3, False),
        (1, 3, 3, False),
        (1, 6, 2, True),
        (2, 0, 3, False),
        (2, 3, 3, True),
    ]
    first = chunks[0]  # images 8, 9 and 10, of which 9 is upright
    assert {tuple(group.images.shape[1:]): group.indices for group in first.groups} == {
        (3, 32, 48): [0, 2],
        (3, 48, 32): [1],
    }
    assert first.keys == ["image_08", "image_09", "image_10"]
    expected = cv2.resize(grey_levels(8, SIZE), (48, 32), interpolation=cv2.INTER_LINEAR)
    (wide,) = [group for group in first.groups if group.indices == [0, 2]]
    assert np.abs(wide.images[0, 0].numpy().astype(int) - expected).max() <= 8


@pytest.mark.parametrize("size", [2, 3, 8])
def test_batches_are_full_but_for_the_rest_of_a_shard(images: Path, size: int):
    batches = list(full_batches(every_chunk(images, [0, 1], size), size, accept=lambda chunk: True))
    for shard, uprights in ((0, [4]), (1, [1, 6])):  # of image_04, image_09 and image_14
        groups = [batch.group for batch in batches if batch.shard == shard]
        by_shape: dict[tuple[int, ...], list[list[int]]] = {}
        for group in groups:
            by_shape.setdefault(tuple(group.images.shape[2:]), []).append(group.indices)
        wide = [index for index in range(8) if index not in uprights]
        full = {(32, 48): wide, (48, 32): uprights}
        found = {shape: sorted(index for indices in parts for index in indices) for shape, parts in by_shape.items()}
        assert found == full
        for shape, parts in by_shape.items():
            assert sum(len(indices) == size for indices in parts) == len(full[shape]) // size
        for group in groups:
            assert group.images.shape[0] == len(group.indices)


def test_a_batch_depends_on_its_shard_alone(images: Path):
    alone = list(full_batches(every_chunk(images, [1], 3), 3, accept=lambda chunk: True))
    among = [b for b in full_batches(every_chunk(images, [0, 1, 2], 3), 3, accept=lambda chunk: True) if b.shard == 1]
    assert [b.group.indices for b in alone] == [b.group.indices for b in among]
    assert all(torch.equal(a.group.images, b.group.images) for a, b in zip(alone, among, strict=True))


def test_an_image_of_a_rare_size_does_not_wait_for_ever():
    """One upright image, then wide ones: it may not hold up the labels of all that come after it."""
    chunks = [
        ImageChunk(0, i, [f"k{i}"], i == 99, [ImageGroup([i], torch.zeros(1, 3, 8, 16 if i else 32), None)], {})
        for i in range(100)
    ]
    taken = 0

    def accept(chunk: ImageChunk) -> bool:
        nonlocal taken
        taken += 1
        return True

    late = next(taken for batch in full_batches(chunks, 2, accept=accept) if batch.group.indices == [0])
    assert late <= 2 * MAX_BATCHES_LATE + 1
