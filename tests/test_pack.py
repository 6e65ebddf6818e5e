import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from depthkit.data.decode import decode_image, decode_target
from depthkit.data.index import load_index
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.pack import main
from depthkit.data.shards import RawSample, ShardReader, image_member

ROW = {"source": "room", "target": "depth", "codec": "png16", "scale": 1000.0, "K": [40.0, 41.0, 16.0, 12.0]}


def encoded(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array)[1].tobytes()


def write_pairs(folder: Path, num_pairs: int, **fields: object) -> list[dict]:
    """Random 24x32 pairs and their index rows."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(num_pairs):
        (folder / f"{i}.jpg").write_bytes(encoded(rng.integers(0, 256, (24, 32, 3), np.uint8), ".jpg"))
        (folder / f"{i}.png").write_bytes(encoded(rng.integers(1, 5000, (24, 32), np.uint16), ".png"))
        rows.append(ROW | {"id": f"room/{i:04d}", "rgb": f"{i}.jpg", "label": f"{i}.png"} | fields)
    return rows


def write_index(folder: Path, rows: list[dict]) -> Path:
    path = folder / "index.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pack(*inputs: Path, out: Path, samples_per_shard: int = 1000, options: tuple[str, ...] = ()) -> int:
    arguments = [*map(str, inputs), "--out", str(out), "--samples-per-shard", str(samples_per_shard), "--workers", "2"]
    return main([*arguments, *options])


def read_all(manifest_path: Path) -> tuple[Manifest, dict[str, RawSample]]:
    """Samples by the id they have in the index."""
    manifest = load_manifest(manifest_path)
    reader = ShardReader(manifest, manifest_path.parent)
    samples = [reader.read(i, j) for i in range(len(manifest.shards)) for j in range(len(reader.keys(i)))]
    return manifest, {json.loads(sample.members["json"])["source_id"]: sample for sample in samples}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the real samples ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_samples(samples_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    assert pack(samples_dir / "index.jsonl", out=out, options=("--test-sources", "tum_open3d,kitti_metric3d")) == 0
    return out


@pytest.fixture(scope="module")
def sample_rows(samples_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (samples_dir / "index.jsonl").read_text().splitlines()]


def stored_numbers(path: Path, codec: str) -> np.ndarray:
    """Label files read without our codecs, as float64."""
    data = path.read_bytes()
    if codec == "npy":
        return np.load(path).astype(np.float64)[..., 0]
    if codec == "pfm":
        kind, size, _, values = data.split(b"\n", 3)
        assert kind == b"Pf"
        width, height = map(int, size.split())
        return np.flipud(np.frombuffer(values, "<f4").reshape(height, width)).astype(np.float64)
    stored = np.asarray(Image.open(path)).astype(np.int64)
    if codec == "png16_sunrgbd":
        stored = stored // 8 + (stored % 8) * 8192
    if codec == "pgm16_nyu_raw":
        stored = np.frombuffer(data[-stored.size * 2 :], "<u2").reshape(stored.shape)
        metres = 351.3 / (1092.5 - stored)
        return np.where(metres <= 10, metres, 0.0)
    return stored.astype(np.float64) if codec != "tiff32f" else np.asarray(Image.open(path)).astype(np.float64)


def expected_target(row: dict, folder: Path) -> np.ndarray:
    """Depth in metres where the row is metric, else inverse depth or pixels of disparity; NaN = no measurement."""
    stored = stored_numbers(folder / row["label"], row["codec"])
    stored[~np.isfinite(stored) | (stored <= 0) | np.isin(stored, row.get("invalid_also", []))] = np.nan
    values = stored / (row["scale"] or 1.0)
    if row["target"] == "disparity" and row["metric"]:
        values = row["baseline_m"] * row["K"][0] / (values + row["doffs"])
    return values if row["metric"] or row["target"] == "disparity" else 1 / values


def test_samples_one_manifest_per_source(packed_samples: Path, sample_rows: list[dict]) -> None:
    manifests = {path.parent.name: load_manifest(path) for path in packed_samples.glob("*/manifest.json")}
    assert manifests.keys() == {row["source"] for row in sample_rows} | {"unlabeled"}
    assert sum(m.num_samples for m in manifests.values() if m.target) == len(sample_rows) == 122
    assert manifests["unlabeled"].num_samples == 209
    assert manifests["unlabeled"].target is None
    assert {name for name, m in manifests.items() if m.split == "test"} == {"tum_open3d", "kitti_metric3d"}
    assert [name for name, m in manifests.items() if m.target and not m.target.aligned] == ["nyu_open3d_raw"]
    assert "CC BY-NC-SA" in manifests["kitti_metric3d"].licence


def test_samples_read_back_equal_the_originals(
    packed_samples: Path, samples_dir: Path, sample_rows: list[dict]
) -> None:
    packed = {
        name: read_all(packed_samples / name / "manifest.json") for name in {row["source"] for row in sample_rows}
    }
    for row in sample_rows:
        manifest, samples = packed[row["source"]]
        members = samples[row["id"]].members
        assert manifest.target is not None
        if not row["rgb"].endswith("ppm"):
            assert image_member(members) == (samples_dir / row["rgb"]).read_bytes()
        assert members[manifest.target.extension] == (samples_dir / row["label"]).read_bytes()
        facts = json.loads(members["json"])
        assert facts.get("intrinsics_px") == row["K"]
        kind = "depth" if row["metric"] else "disparity"
        target, valid_mask = decode_target(members[manifest.target.extension], manifest.target, facts, kind)
        expected = expected_target(row, samples_dir)
        np.testing.assert_array_equal(valid_mask, np.isfinite(expected), err_msg=row["id"])
        np.testing.assert_allclose(target[valid_mask], expected[valid_mask], rtol=1e-5, err_msg=row["id"])


def test_samples_keep_poses_and_ppm_pixels(packed_samples: Path, samples_dir: Path, sample_rows: list[dict]) -> None:
    _, frames = read_all(packed_samples / "rgbd_7scenes_redkitchen" / "manifest.json")
    row = next(row for row in sample_rows if row.get("frame") == 30)
    facts = json.loads(frames[row["id"]].members["json"])
    np.testing.assert_array_equal(facts["pose"], np.loadtxt(samples_dir / row["pose"]))
    assert (facts["sequence"], facts["frame"]) == ("rgbd_7scenes_redkitchen", 30)

    _, raw = read_all(packed_samples / "nyu_open3d_raw" / "manifest.json")
    (sample,) = raw.values()
    original = np.asarray(Image.open(samples_dir / "labeled/nyu_open3d_raw/rgb/NYU_color.ppm"))
    np.testing.assert_array_equal(decode_image(sample.members["png"]), original)


# --- what is packed --------------------------------------------------------------------------------------------------


def test_pgm16_and_image_folder(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "data", 1, codec="pgm16", label="0.pgm")
    depth = np.arange(1, 24 * 32 + 1).reshape(24, 32)
    (tmp_path / "data/0.pgm").write_bytes(b"P5\n32 24\n65535\n" + depth.astype(">u2").tobytes())
    photos = tmp_path / "my photos"
    (photos / "deep").mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    for name in ("a.b.png", "a_b.png", "deep/c.bmp", ".hidden.png"):
        (photos / name).write_bytes(encoded(image, name[-4:]))
    (photos / "notes.txt").write_text("not an image")
    assert pack(write_index(tmp_path / "data", rows), photos, out=tmp_path / "out") == 0

    manifest, samples = read_all(tmp_path / "out/room/manifest.json")
    assert manifest.target is not None
    target, _ = decode_target(samples["room/0000"].members["depth.pgm"], manifest.target, {}, "depth")
    np.testing.assert_allclose(target, depth / 1000, rtol=1e-6)
    manifest, samples = read_all(tmp_path / "out/my_photos/manifest.json")
    assert samples.keys() == {"a.b.png", "a_b.png", "deep/c.bmp"}
    for sample in samples.values():
        np.testing.assert_array_equal(decode_image(sample.members["png"]), image[..., ::-1])


def test_keys_are_safe_unique_and_independent_of_line_order(tmp_path: Path) -> None:
    ids = ["a/b.1", "a.b/1", "a_b_1", "c" * 200, "ä"]
    rows = [row | {"id": id_} for row, id_ in zip(write_pairs(tmp_path, len(ids)), ids, strict=True)]
    assert pack(write_index(tmp_path, rows), out=tmp_path / "one") == 0
    assert pack(write_index(tmp_path, rows[::-1]), out=tmp_path / "two") == 0
    _, samples = read_all(tmp_path / "one/room/manifest.json")
    keys = [sample.key for sample in samples.values()]
    assert samples.keys() == set(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)
    assert keys == sorted(keys)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("stated", [None, [16, 12]])
def test_label_smaller_than_the_image(tmp_path: Path, stated: list[int] | None) -> None:
    rows = write_pairs(tmp_path, 1, label_size=stated)
    (tmp_path / "0.png").write_bytes(encoded(np.full((12, 16), 1000, np.uint16), ".png"))
    assert pack(write_index(tmp_path, rows), out=tmp_path / "out") == 0
    _, samples = read_all(tmp_path / "out/room/manifest.json")
    facts = json.loads(samples["room/0000"].members["json"])
    assert facts["label_size"] == [12, 16]
    assert facts["intrinsics_px"] == [20.0, 20.5, 8.0, 6.0]


def test_rejected_pairs_are_named_and_the_rest_is_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_pairs(tmp_path, 10)
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "0.jpg").unlink()
    (tmp_path / "1.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").unlink()
    (tmp_path / "3.png").write_bytes(encoded(np.ones((24, 32), np.uint8), ".png"))
    (tmp_path / "4.png").write_bytes(encoded(np.zeros((24, 32), np.uint16), ".png"))
    (tmp_path / "5.png").write_bytes(encoded(np.ones((24, 16), np.uint16), ".png"))
    (tmp_path / "6.png").write_bytes(encoded(np.ones((48, 64), np.uint16), ".png"))
    rows[7]["label_size"] = [16, 12]
    (tmp_path / "pose.txt").write_text("1 0 0 0\n0 1 0 0\n")
    rows[8]["pose"] = "pose.txt"
    index = write_index(tmp_path, rows)
    assert pack(index, out=tmp_path / "out", samples_per_shard=4) == 1
    assert "9 pairs were rejected" in capsys.readouterr().err

    manifest, samples = read_all(tmp_path / "out/room/manifest.json")
    assert samples.keys() == {"room/0009"}
    assert [shard.path for shard in manifest.shards] == ["room-000002.tar"]
    rejected = [json.loads(line) for line in (tmp_path / "out/room/rejected.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rejected] == [f"room/{i:04d}" for i in range(9)]
    reasons = ("0.jpg", "cut off", "2.png", "8-bit", "no valid pixel", "16x24", "64x48", "says 16x12", "4x4")
    for row, i, reason in zip(rejected, range(9), reasons, strict=True):
        assert row["path"] == str(tmp_path / f"{i}.jpg")
        assert reason in row["reason"]

    repaired = write_pairs(tmp_path, 10)
    assert pack(write_index(tmp_path, repaired), out=tmp_path / "out", samples_per_shard=4) == 0
    assert pack(write_index(tmp_path, repaired), out=tmp_path / "fresh", samples_per_shard=4) == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


BAD_INDEXES = {
    "not JSON": ([{}], '{"id": ', "line 2: not a JSON object"),
    "unknown field": ([{"invalid_alos": [1]}], "", "line 1: unknown field 'invalid_alos'"),
    "wrong type": ([{"scale": "1000"}], "", "line 1: scale is '1000'"),
    "missing field": ([{"codec": None}], "", "line 1: field 'codec' is missing"),
    "unknown codec": ([{"codec": "png12"}], "", "line 1: codec is 'png12'"),
    "scale of 0": ([{"scale": 0.0}], "", "line 1: target.scale"),
    "three numbers": ([{"K": [1, 2, 3]}], "", "line 1: K is [1, 2, 3]"),
    "no calibration": ([{"target": "disparity"}], "", "needs K and baseline_m"),
    "same id": ([{}, {"id": "room/0000"}], "", "line 2: id 'room/0000' is already that of"),
    "two scales": ([{}, {"scale": 256.0}], "", "line 2: source 'room'"),
    "two codecs": ([{}, {"codec": "png8"}], "", "line 2: source 'room'"),
    "empty": ([], "", "the index is empty"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    changes, tail, message = BAD_INDEXES[case]
    rows = [row | change for row, change in zip(write_pairs(tmp_path, len(changes)), changes, strict=True)]
    index = write_index(tmp_path, rows)
    index.write_text(index.read_text() + tail)
    assert pack(index, out=tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "index.jsonl" in error
    assert not (tmp_path / "out").exists()


def test_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"source": name} for row, name in zip(write_pairs(tmp_path, 3), "abc", strict=True)]
    index, out = write_index(tmp_path, rows), tmp_path / "out"
    assert pack(index, out=out, options=("--val-sources", "b", "--test-sources", "c")) == 0
    assert [load_manifest(out / name / "manifest.json").split for name in "abc"] == ["train", "val", "test"]
    for options, message in {
        ("--test-sources", "d"): "'d' is unknown",
        ("--val-sources", "b", "--test-sources", "b"): "already in val",
    }.items():
        assert pack(index, out=tmp_path / "other", options=options) == 2
        assert message in capsys.readouterr().err
    assert pack(index, index, out=tmp_path / "other") == 2
    assert "two inputs hold a data set 'a'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_hold_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last pairs of every train source, at least one and never the only one; what has a split stays whole."""
    sources = ["many"] * 5 + ["two"] * 2 + ["one", "test", "test"]
    rows = [row | {"source": name} for row, name in zip(write_pairs(tmp_path, len(sources)), sources, strict=True)]
    index, out = write_index(tmp_path, rows), tmp_path / "out"
    assert pack(index, out=out, options=("--hold-out", "0.4", "--test-sources", "test")) == 0
    found = {path.parent.name: load_manifest(path) for path in out.glob("*/manifest.json")}
    assert {name: (manifest.split, manifest.num_samples) for name, manifest in found.items()} == {
        "many": ("train", 3),
        "many_val": ("val", 2),
        "two": ("train", 1),
        "two_val": ("val", 1),
        "one": ("train", 1),
        "test": ("test", 2),
    }
    keys = {name: [key for shard in manifest.shards for key in load_index(out / name / shard.path).samples]
            for name, manifest in found.items()}  # fmt: skip
    assert keys["many"] + keys["many_val"] == sorted(keys["many"] + keys["many_val"])
    for wrong in ("0", "1", "-0.1"):
        with pytest.raises(SystemExit):
            pack(index, out=tmp_path / "other", options=("--hold-out", wrong))
        assert "must be > 0 and < 1" in capsys.readouterr().err
    clash = write_index(
        tmp_path, [row | {"source": name} for row, name in zip(rows, ["a", "a", "a_val"], strict=False)]
    )
    assert pack(clash, out=tmp_path / "other", options=("--hold-out", "0.5")) == 2
    assert "'a_val'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


# --- again -----------------------------------------------------------------------------------------------------------


def test_rerun_keeps_what_is_current_and_drops_what_is_not_planned(tmp_path: Path) -> None:
    index, out = write_index(tmp_path, write_pairs(tmp_path, 6)), tmp_path / "out"
    assert pack(index, out=out, samples_per_shard=2) == 0

    def times() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted((out / "room").glob("*.tar"))]

    first = times()
    assert pack(index, out=out, samples_per_shard=2) == 0
    assert times() == first
    (tmp_path / "2.png").write_bytes(encoded(np.full((24, 32), 7, np.uint16), ".png"))
    assert pack(index, out=out, samples_per_shard=2) == 0
    assert [old == new for old, new in zip(first, times(), strict=True)] == [True, False, True]
    manifest, samples = read_all(out / "room/manifest.json")
    assert manifest.target is not None
    target, _ = decode_target(samples["room/0002"].members["depth.png"], manifest.target, {}, "depth")
    np.testing.assert_allclose(target, 0.007, rtol=1e-6)

    tar = out / "room/room-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert pack(index, out=out, samples_per_shard=3) == 0
    assert pack(index, out=tmp_path / "fresh", samples_per_shard=3) == 0
    assert tree(out) == tree(tmp_path / "fresh")


def process_group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_run_is_finished_by_the_next_one(tmp_path: Path) -> None:
    index, out = write_index(tmp_path, write_pairs(tmp_path, 300)), tmp_path / "out"
    code = "import sys; from depthkit.data.pack import main; main(sys.argv[1:])"
    arguments = [str(index), "--out", str(out), "--samples-per-shard", "2", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(out.glob("room/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(np.random.default_rng().uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "room/manifest.json").exists()
    assert 0 < len(list(out.glob("room/*.tar"))) < 150
    while process_group_exists(process.pid):  # the workers end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)

    assert pack(index, out=out, samples_per_shard=2) == 0
    assert pack(index, out=tmp_path / "undisturbed", samples_per_shard=2) == 0
    assert tree(out) == tree(tmp_path / "undisturbed")
