"""Thousands of damaged data sets: each is read, or refused with the name of the file, and no other exception leaves."""

from pathlib import Path

import pytest
from faults import DAMAGED_FILES, IMAGES, fuzz, labels

NUM_CASES = 400


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DAMAGED_FILES, *IMAGES, *labels()])
def test_damage_is_read_around_or_refused_by_name(tmp_path: Path, kind: str) -> None:
    """The index is only a short cut: most of its damage is seen and mended by a scan of the tar."""
    num_refused = fuzz(tmp_path, 1000, 1000 + NUM_CASES, [kind], timeout=300)
    assert num_refused > (0 if kind == "index" else NUM_CASES // 5)
