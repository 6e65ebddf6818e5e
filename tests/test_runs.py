"""Videos in shards: frames packed together and in order, and the runs of consecutive ones in the manifest."""

import json
from pathlib import Path
from typing import Any

import pytest
from miniatures import write, write_image

from depthkit.data.inspect import main as inspect
from depthkit.data.manifest import load_manifest
from depthkit.data.pack import main
from depthkit.data.pairs import Pair, in_order, run_lengths
from depthkit.data.shards import ShardReader
from depthkit.data.sources import file


def facts(sequence: str, *frames: int) -> list[dict[str, Any]]:
    return [{"sequence": sequence, "frame": frame} for frame in frames]


@pytest.mark.parametrize(
    ("samples", "runs"),
    [
        (facts("a", 0, 1, 2) + facts("b", 3, 4), (3, 2)),
        (facts("a", 0, 1, 4, 5, 6), (2, 3)),  # two frames are missing
        (facts("a", 15, 17, 19, 21), (4,)),  # every second frame was kept
        (facts("a", 15, 17, 19, 20, 22), (3, 2)),
        (facts("a", 1, 3, 4), (1, 2)),  # of two distances the smaller
        ([*facts("a", 0, 1), {}, *facts("a", 2)], (2, 1, 1)),
        (facts("a", 5, 4, 4), ()),
        (facts("a", 1) + facts("b", 2), ()),
        ([{"sequence": "a"}, {"sequence": "a"}], ()),
        ([{"frame": 1}, {"frame": 2}], ()),
        ([{}], ()),
    ],
    ids=str,
)
def test_a_run_is_as_long_as_frames_follow_each_other(samples: list[dict[str, Any]], runs: tuple[int, ...]) -> None:
    assert run_lengths(samples) == runs


def pair(key: str, **known: Any) -> Pair:
    return Pair(key=key, image=file(Path(f"{key}.png")), facts=known)


def test_frames_stay_together_and_are_ordered_by_number_not_by_name() -> None:
    pairs = [pair("b_100", sequence="b", frame=100), pair("b_9", sequence="b", frame=9), pair("c"), pair("a")]
    pairs += [pair("b_20", sequence="b", frame=20), pair("b_5", sequence="other", frame=1), pair("b_1", sequence="b")]
    assert [each.key for each in in_order(pairs)] == ["a", "b_1", "b_9", "b_20", "b_100", "b_5", "c"]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Frames 8 to 12 of one video, of which 11 is damaged; two images that belong to none."""
    rows = [{"id": f"v_{n}", "source": "video", "rgb": f"{n}.png", "seq": "walk", "frame": n} for n in range(8, 13)]
    rows += [{"id": f"w_{n}", "source": "video", "rgb": f"{n}.png"} for n in range(2)]
    for row in rows:
        write_image(tmp_path / row["rgb"], 0)
    write(tmp_path / "11.png", b"damaged")
    return write(tmp_path / "index.jsonl", "\n".join(map(json.dumps, rows)))


def pack(index: Path, out: Path, samples_per_shard: int = 10) -> list[tuple[list[str], tuple[int, ...]]]:
    assert main([str(index), "--out", str(out), "--workers", "1", "--samples-per-shard", str(samples_per_shard)]) == 1
    manifest = load_manifest(out / "video" / "manifest.json")
    reader = ShardReader(manifest, out / "video")
    return [(reader.keys(number), shard.runs) for number, shard in enumerate(manifest.shards)]


def test_pack_writes_runs_without_the_rejected_frame(index: Path, tmp_path: Path) -> None:
    keys = ["v_8", "v_9", "v_10", "v_12", "w_0", "w_1"]
    assert pack(index, tmp_path / "out") == [(keys, (3, 1, 1, 1))]
    assert pack(index, tmp_path / "two", 4) == [(keys[:3], (3,)), (keys[3:], ())]


def test_shards_of_before_there_were_runs_are_kept_and_get_theirs(index: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "11.png", 0)
    arguments = [str(index), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    folder = tmp_path / "out" / "video"
    record = folder / ".pack" / "video-000000.json"
    content = json.loads(record.read_text())
    assert content["shard"].pop("runs") == [5, 1, 1]
    record.write_text(json.dumps(content))
    written, digest = (folder / "video-000000.tar").stat().st_mtime_ns, load_manifest(folder / "manifest.json").digest()
    assert main(arguments) == 0
    assert (folder / "video-000000.tar").stat().st_mtime_ns == written
    manifest = load_manifest(folder / "manifest.json")
    assert manifest.shards[0].runs == (5, 1, 1)
    assert manifest.digest() == digest


def test_inspect_says_what_video_there_is(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(index, tmp_path / "out")
    capsys.readouterr()
    inspect([str(tmp_path / "out" / "video" / "manifest.json")])
    assert "3 frames in runs of 3" in " ".join(capsys.readouterr().out.split())
