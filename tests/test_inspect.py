import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from depthkit.data.inspect import inspect, main
from depthkit.data.inspection.findings import Findings
from depthkit.data.keys import key_hashes, repeated_keys
from depthkit.data.manifest import Manifest, Shard, TargetSpec, load_manifest, save_manifest
from depthkit.data.writer import ShardWriter

TARGET = TargetSpec(
    quantity="depth", codec="png16", extension="depth.png", scale=1000.0, depth_range=(0.5, 5.0), invalid_values=(9.0,)
)
NUM_SHARDS, PER_SHARD = 3, 2


def png(array: np.ndarray) -> bytes:
    return cv2.imencode(".png", array)[1].tobytes()


def depth_map() -> np.ndarray:
    """Stored numbers 1001 to 4000 below, the upper quarter without measurement."""
    stored = np.repeat(1 / np.linspace(1 / 1001, 1 / 4000, 40)[:, None], 60, axis=1).astype(np.uint16)
    stored[:5], stored[5:10] = 0, 9
    return stored


def write_set(folder: Path, stored: np.ndarray | None = None, **fields: Any) -> Path:
    stored = depth_map() if stored is None else stored
    sky = np.zeros(stored.shape, np.uint8)
    sky[:2] = 255
    members = {
        "jpg": cv2.imencode(".jpg", np.zeros((40, 60, 3), np.uint8))[1].tobytes(),
        "depth.png": png(stored),
        "sky.png": png(sky),
        "json": json.dumps({"intrinsics_px": [50, 50, 30, 20]}).encode(),
    }
    shards = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_SHARDS):
        with ShardWriter(folder / f"{i}.tar") as writer:
            for j in range(PER_SHARD):
                writer.add(f"{i}-{j}", members)
        shards.append(writer.close())
    manifest = Manifest(name="room", split="train", target=TARGET, shards=tuple(shards), licence="", source="")
    save_manifest(replace(manifest, **fields), folder / "manifest.json")
    return folder / "manifest.json"


def change(path: Path, **fields: Any) -> None:
    save_manifest(replace(load_manifest(path), **fields), path)


def look(path: Path, num_samples: int = 6) -> Findings:
    (found,) = inspect([path], num_samples=num_samples).findings
    return found


def only_problem(path: Path) -> str:
    (problem,) = look(path, 1).problems
    return problem


def test_a_whole_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_set(tmp_path)
    found = look(path, 100)
    assert found.problems == []
    assert found.sizes == [(40, 60)] * NUM_SHARDS * PER_SHARD
    assert np.mean(found.valid_shares) == pytest.approx(0.75)
    assert np.mean(found.sky_shares) == pytest.approx(2 / 40)
    measured = depth_map()[10:].astype(np.float64) / 1000
    np.testing.assert_allclose(found.percentiles(), np.percentile(measured, (1, 50, 99)), rtol=1e-5)
    assert main([str(path)]) == 0
    printed = capsys.readouterr()
    assert "75.0%" in printed.out
    assert "60x40" in printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("num_samples", "expected"), [(1, 1), (4, 4), (6, 6), (7, 6)])
def test_number_of_decoded_samples(tmp_path: Path, num_samples: int, expected: int) -> None:
    assert len(look(write_set(tmp_path), num_samples).sizes) == expected


def test_images_alone(tmp_path: Path) -> None:
    found = look(write_set(tmp_path, target=None))
    assert (found.problems, found.percentiles(), len(found.sizes)) == ([], None, 6)


def test_labels_without_unit_are_not_held_against_a_range_in_metres(tmp_path: Path) -> None:
    path = write_set(tmp_path, target=replace(TARGET, metric=False, scale=1.0))
    assert look(path).problems == []


def test_every_problem_of_every_set_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, missing = write_set(tmp_path / "good"), write_set(tmp_path / "bad"), tmp_path / "none.json"
    (tmp_path / "bad/0.tar").unlink()
    (tmp_path / "bad/2.tar").write_bytes(b"")
    assert main([str(good), str(bad), str(missing)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [str(name) in line for name, line in zip(("0.tar", "2.tar", missing), lines, strict=True)] == [True] * 3


def test_changed_byte(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    data = bytearray((tmp_path / "1.tar").read_bytes())
    data[700] ^= 1
    (tmp_path / "1.tar").write_bytes(data)
    problem = only_problem(path)
    assert "1.tar" in problem
    assert "sha256" in problem


def test_wrong_count(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    shards = load_manifest(path).shards
    change(path, shards=(*shards[:-1], replace(shards[-1], num_samples=PER_SHARD + 1)))
    problem = only_problem(path)
    assert "2.tar" in problem
    assert "2 samples, the manifest says 3" in problem


def test_label_without_measurement(tmp_path: Path) -> None:
    problem = only_problem(write_set(tmp_path, np.zeros((40, 60), np.uint16)))
    assert "0.tar, 0-0" in problem
    assert "no valid pixel" in problem


@pytest.mark.parametrize("scale", [256.0, 5000.0])
def test_scale_against_the_stated_range(tmp_path: Path, scale: float) -> None:
    problem = only_problem(write_set(tmp_path, target=replace(TARGET, scale=scale)))
    assert "0.5 to 5 m" in problem
    assert f"target.scale = {scale:g}" in problem


def test_label_member_missing_and_wrong_codec(tmp_path: Path) -> None:
    assert "depth.npy" in only_problem(write_set(tmp_path / "a", target=replace(TARGET, extension="depth.npy")))
    assert "8-bit" in only_problem(write_set(tmp_path / "b", np.ones((40, 60), np.uint8)))


def test_malformed_manifest(tmp_path: Path) -> None:
    path = write_set(tmp_path)
    path.write_text(path.read_text().replace('"scale"', '"sclae"'))
    assert "sclae" in only_problem(path)


def test_keys_in_several_shards_are_named(tmp_path: Path) -> None:
    """All of shard 0 again in shard 2, one of them in shard 1 too."""
    path = write_set(tmp_path)
    shards = list(load_manifest(path).shards)
    members = {"jpg": cv2.imencode(".jpg", np.zeros((40, 60, 3), np.uint8))[1].tobytes()}
    for number, keys in ((1, ("0-1", "1-1")), (2, ("0-1", "0-0"))):
        with ShardWriter(tmp_path / f"{number}.tar") as writer:
            for key in keys:
                writer.add(key, members)
        shards[number] = writer.close()
    change(path, shards=tuple(shards), target=None)
    problem = only_problem(path)
    assert "'0-0' in 0.tar and 2.tar; '0-1' in 0.tar and 1.tar and 2.tar. " in problem
    (tmp_path / "2.tar").unlink()
    problems = look(path).problems
    assert [("2.tar" in problem, "'0-1' in 0.tar and 1.tar. " in problem) for problem in problems] == [
        (True, False),
        (False, True),
    ]


def test_of_many_repeated_keys_some_are_named() -> None:
    shards = [Shard(path=f"{n}.tar", num_samples=9, num_bytes=1, sha256="0" * 64) for n in range(3)]
    keys = [[f"a{n}" for n in range(9)], [], [f"a{n}" for n in range(8, -1, -1)]]

    def key_of(shard: int, sample: int) -> str:
        return keys[shard][sample]

    text = repeated_keys(shards, [key_hashes(each) for each in keys], key_of)
    assert "'a0' in 0.tar and 2.tar; 'a1' in 0.tar and 2.tar; 'a2' in 0.tar and 2.tar and 6 more" in text
    assert repeated_keys(shards, [key_hashes(each) for each in keys[:2]], key_of) == ""
    assert repeated_keys([], [], key_of) == ""
