"""Tars without a manifest, given by a brace pattern."""

from pathlib import Path

import pytest
from file_server import Answer, serve
from handmade import unlabeled_sample, write_dataset

from depthkit.config import ConfigError, PathsConfig
from depthkit.data import remote
from depthkit.data.adopt import manifest_of_tars
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import root_of
from depthkit.data.shards import ShardReader

FACTS = {"name": "photos", "split": "train", "target": None, "licence": "none", "source": "tests"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    write_dataset(tmp_path / "tars", {f"k{i}": unlabeled_sample(i) for i in range(5)}, None, samples_per_shard=2)
    return tmp_path / "tars"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(PathsConfig(cache=str(tmp_path / "cache")))


@pytest.mark.parametrize("scheme", ["http", "pipe", "path"])
def test_a_brace_pattern_becomes_a_manifest(folder: Path, tmp_path: Path, cache: ShardCache, scheme: str) -> None:
    packed = load_manifest(folder / "manifest.json")
    with serve(folder) as server:
        server.next_answers["train-000001.tar"] = [Answer(status=500), Answer(), Answer(cut=700)]
        prefix = {"http": server.url, "pipe": f"pipe:cat {folder}", "path": str(folder)}[scheme]
        manifest = manifest_of_tars(f"{prefix}/train-{{000000..000002}}.tar", cache, **FACTS)
        facts = [(s.num_samples, s.num_bytes, s.sha256) for s in manifest.shards]
        assert facts == [(s.num_samples, s.num_bytes, s.sha256) for s in packed.shards]
        path = tmp_path / "photos.json"
        save_manifest(manifest, path)
        reader = ShardReader(load_manifest(path), root_of(path), cache)
        assert [reader.read(k // 2, k % 2).key for k in range(5)] == [f"k{k}" for k in range(5)]
    assert not list(cache.folder.glob("*.tmp"))


def test_a_missing_or_damaged_tar_is_named_and_nothing_is_left(folder: Path, cache: ShardCache) -> None:
    (folder / "train-000001.tar").write_bytes((folder / "train-000001.tar").read_bytes()[:900])
    with serve(folder) as server:
        with pytest.raises(ConfigError, match=rf"{server.url}/train-000003\.tar: HTTP status 404"):
            manifest_of_tars(f"{server.url}/train-{{000002..000003}}.tar", cache, **FACTS)
        with pytest.raises(SampleError, match="not a whole tar"):
            manifest_of_tars(f"{server.url}/train-{{000000..000001}}.tar", cache, **FACTS)
    with pytest.raises(ConfigError, match=r"pipe:cat .*exit 1"):
        manifest_of_tars(f"pipe:cat {folder}/gone.tar", cache, **FACTS)
    assert list(cache.folder.iterdir()) == []
