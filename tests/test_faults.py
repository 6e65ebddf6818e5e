"""Faults to survive: damaged files, killed processes, a full disk, shards that vanish or change."""

from pathlib import Path

import pytest
from faults import DAMAGED_FILES, IMAGES, fuzz, labels, read_all, write_samples

from depthkit.data.inspect import inspect
from depthkit.data.manifest import load_manifest
from depthkit.data.shards import ShardReader

# --- damaged files (test_fuzz.py has thousands) ----------------------------------------------------------------------


@pytest.mark.parametrize("form", labels())
def test_what_is_damaged_below_can_be_read_undamaged(tmp_path: Path, form: str) -> None:
    for image in IMAGES:
        assert read_all(write_samples(tmp_path / image, form, image, {})) == []


def test_damaged_files_are_read_around_or_refused_by_name(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 0, 5, [*DAMAGED_FILES, *IMAGES, *labels()], timeout=120) > 30


def test_inspect_finds_a_flipped_bit_that_still_decodes(tmp_path: Path) -> None:
    manifest = write_samples(tmp_path, "png16", "jpg", {})
    tar = tmp_path / "train-000000.tar"
    (found,) = inspect([manifest], num_samples=3).findings
    assert not any("sha256" in problem for problem in found.problems)
    data = bytearray(tar.read_bytes())
    whole = ShardReader(load_manifest(manifest), tmp_path).read(0, 1).members["jpg"]
    data[data.index(whole) + len(whole) // 2] ^= 1
    tar.write_bytes(data)
    assert read_all(manifest) == []
    (found,) = inspect([manifest], num_samples=3).findings
    assert any(str(tar) in problem and "sha256" in problem for problem in found.problems)
