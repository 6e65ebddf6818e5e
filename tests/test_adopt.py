"""Tars without a manifest, given by a brace pattern."""

from pathlib import Path

import pytest
from file_server import Answer, serve
from handmade import unlabeled_sample, write_dataset

from depthkit.config import PathsConfig
from depthkit.data import remote
from depthkit.data.adopt import are_tars, name_of_tars
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import load_manifest
from depthkit.data.pack import main as pack
from depthkit.data.remote import root_of
from depthkit.data.shards import ShardReader


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    write_dataset(tmp_path / "tars", {f"k{i}": unlabeled_sample(i) for i in range(5)}, None, samples_per_shard=2)
    return tmp_path / "tars"


@pytest.mark.parametrize("scheme", ["http", "pipe", "path"])
def test_a_brace_pattern_becomes_a_manifest(folder: Path, tmp_path: Path, scheme: str) -> None:
    packed = load_manifest(folder / "manifest.json")
    with serve(folder) as server:
        server.next_answers["train-000001.tar"] = [Answer(status=500), Answer(), Answer(cut=700)]
        prefix = {"http": server.url, "pipe": f"pipe:cat {folder}", "path": str(folder)}[scheme]
        assert (
            pack([f"{prefix}/train-{{000000..000002}}.tar", "--out", str(tmp_path / "data"), "--name", "photos"]) == 0
        )
        path = tmp_path / "data" / "photos" / "manifest.json"
        manifest = load_manifest(path)
        facts = [(s.num_samples, s.num_bytes, s.sha256) for s in manifest.shards]
        assert facts == [(s.num_samples, s.num_bytes, s.sha256) for s in packed.shards]
        reader = ShardReader(manifest, root_of(path), ShardCache(PathsConfig(cache=str(tmp_path / "cache"))))
        assert [reader.read(k // 2, k % 2).key for k in range(5)] == [f"k{k}" for k in range(5)]
    assert [left.name for left in (path.parent / ".pack").iterdir()] == ["tars.jsonl"]


@pytest.mark.parametrize(
    ("tars", "name"),
    [
        ("https://example.org/a/photos-{000..063}.tar", "photos"),
        ("s3://bucket/sa_1b.{000..063}.tar", "sa"),
        ("/data/train_{a,b}.tar", "train"),
        ("https://example.org/photos.tar", "photos"),
    ],
)
def test_the_data_set_has_the_name_that_the_tars_begin_with(tars: str, name: str) -> None:
    assert are_tars(tars)
    assert name_of_tars(tars) == name


def test_what_was_read_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(whole[:900])
    with serve(folder) as server:
        command = [f"{server.url}/train-{{000000..000002}}.tar", "--out", str(tmp_path), "--workers", "1"]
        assert pack(command) == 2
        record = tmp_path / "train" / ".pack" / "tars.jsonl"
        assert not (tmp_path / "train" / "manifest.json").exists()
        record.write_text(record.read_text() + '\n{"path": "htt')  # as a killed process leaves it
        server.requests.clear()
        (folder / "train-000001.tar").write_bytes(whole)
        assert pack(command) == 0
        again = set(server.count())
        assert "train-000001.tar" in again
        assert "train-000000.tar" not in again
        server.requests.clear()
        assert pack(command) == 0
        assert not server.requests
    assert load_manifest(tmp_path / "train" / "manifest.json").num_samples == 5


def test_a_local_tar_that_has_changed_is_read_again(folder: Path, tmp_path: Path) -> None:
    command = [f"{folder}/train-{{000000..000002}}.tar", "--out", str(tmp_path)]
    assert pack(command) == 0
    (folder / "train-000001.tar").write_bytes((folder / "train-000002.tar").read_bytes())
    assert pack(command) == 0
    shards = load_manifest(tmp_path / "train" / "manifest.json").shards
    assert shards[1].sha256 == shards[2].sha256


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        ("URL/train-{000002..000003}.tar", "URL/train-000003.tar: HTTP status 404"),
        ("URL/train-{000000..000001}.tar", "not a whole tar"),
        ("pipe:cat FOLDER/gone.tar", "exit 1"),
        ("URL/{000000..000001}.tar", "state --name"),
        ("URL/train-{000000..000001}.tar --scale 1000", "images alone; leave out scale"),
        ("URL/train-{000000..000001}.tar FOLDER", "pack FOLDER by itself"),
        ("URL/train-{000000..000001}.tar --val-sources photos", "the only data set here is train"),
    ],
)
def test_what_cannot_be_adopted_is_named_and_nothing_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tars: str, message: str
) -> None:
    (folder / "train-000001.tar").write_bytes((folder / "train-000001.tar").read_bytes()[:900])
    with serve(folder) as server:
        names = {"URL": server.url, "FOLDER": str(folder)}
        for name, value in names.items():
            tars, message = tars.replace(name, value), message.replace(name, value)
        words = [tars] if tars.startswith("pipe:") else tars.split()
        assert pack([*words, "--out", str(tmp_path / "data")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "data").rglob("manifest.json"))
    assert not list((tmp_path / "data").rglob("*.tmp"))


def test_a_name_for_what_brings_its_own_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack([str(folder), "--out", str(tmp_path / "data"), "--name", "photos"]) == 2
    assert "--name photos: only for tars" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
