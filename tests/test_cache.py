"""The cache of remote shards: its size, damaged copies, full disks, several processes."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path

import pytest
from file_server import Answer, FileServer, serve
from handmade import unlabeled_sample, write_dataset
from test_remote import NAMES, NUM_SHARDS, assert_same, begin_download, cached, fail, open_remote

from depthkit.config import ConfigError, PathsConfig
from depthkit.data import remote
from depthkit.data.cache import CacheFullError, ShardCache, _lock
from depthkit.data.manifest import load_manifest, save_manifest
from depthkit.data.remote import CacheError, root_of
from depthkit.data.shards import ShardReader

READ_ALL = """
import sys
from depthkit.config import PathsConfig
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import load_manifest
from depthkit.data.shards import ShardReader
reader = ShardReader(load_manifest(sys.argv[1]), sys.argv[1], ShardCache(PathsConfig(cache=sys.argv[2])))
for shard in range(len(reader.manifest.shards)):
    for sample in range(reader.manifest.shards[shard].num_samples):
        reader.read(shard, sample)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of two images each, at least 4 kB."""
    folder = tmp_path_factory.mktemp("served")
    samples = {f"k{i:02d}": unlabeled_sample(i, (64, 80)) for i in range(2 * NUM_SHARDS)}
    write_dataset(folder, samples, None, samples_per_shard=2)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[FileServer]:
    with serve(folder) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(PathsConfig(cache=str(tmp_path / "cache")))


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)


# The size of the cache


def limited(cache: ShardCache, folder: Path, num_shards: float) -> ShardCache:
    size = max(path.stat().st_size for path in folder.glob("*.tar"))
    return ShardCache(PathsConfig(cache=str(cache.folder), cache_gb=num_shards * size / 1e9))


def test_the_least_recently_used_shard_gives_way(server: FileServer, cache: ShardCache, folder: Path) -> None:
    cache = limited(cache, folder, 3)
    reader = open_remote(server, cache)
    shards = reader.manifest.shards
    for shard in (0, 1, 2, 0, 3):
        cache.open(str(reader.location(shard)), shards[shard]).close()
        time.sleep(0.01)
    assert cached(cache) == {f"{shards[k].sha256}.tar" for k in (0, 2, 3)}
    assert_same(reader, folder)
    assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes


def test_an_open_shard_is_not_evicted(server: FileServer, cache: ShardCache, folder: Path) -> None:
    cache = limited(cache, folder, 2)
    holder = open_remote(server, cache)
    first = holder.read(0, 0)
    assert_same(open_remote(server, cache), folder)
    assert server.count()[NAMES[0]] == 1
    assert holder.read(0, 0) == first
    holder.read(1, 0)
    with pytest.raises(CacheFullError, match=r"paths\.cache_gb=.* are open, \d+ bytes"):
        open_remote(server, cache).read(2, 0)


def test_a_copy_that_was_deleted_is_still_read_by_those_who_have_it_open(
    server: FileServer, cache: ShardCache, folder: Path
) -> None:
    reader = open_remote(server, cache)
    reader.read(0, 0)
    shutil.rmtree(cache.folder)
    assert_same(reader, folder)


def test_a_damaged_copy_is_fetched_again(server: FileServer, cache: ShardCache, folder: Path) -> None:
    reader = open_remote(server, cache)
    cache.fetch(str(reader.location(0)), reader.manifest.shards[0])
    os.truncate(cache.path(reader.manifest.shards[0]), 1000)
    assert_same(reader, folder)
    assert server.count()[NAMES[0]] == 2


def test_abandoned_downloads_give_way(server: FileServer, cache: ShardCache, folder: Path) -> None:
    cache = limited(cache, folder, 2)
    reader = open_remote(server, cache)
    for shard in (4, 5):
        begin_download(cache, reader.manifest, shard, bytes(1000))
    reader.read(0, 0)
    reader.read(1, 0)
    assert cached(cache, ".part") == set()


def test_a_shard_larger_than_the_cache_is_refused_at_once(server: FileServer, cache: ShardCache, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"paths\.cache_gb=.*: shard train-\d+\.tar alone has \d+ bytes"):
        open_remote(server, limited(cache, folder, 0.5))


def test_a_full_disk_is_named(server: FileServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    reader = open_remote(server, cache)
    num_bytes = reader.manifest.shards[0].num_bytes
    with pytest.raises(CacheError, match=rf"{cache.folder}/.* {num_bytes} bytes are needed, 1234 are free"):
        reader.read(0, 0)
    assert list(cache.folder.glob("*.*.part")) == []


def test_a_disk_that_fills_while_writing_is_named() -> None:
    with FileIO("/dev/full", "w") as file, pytest.raises(CacheError, match=r"/dev/full: .*7 bytes are needed") as error:
        remote._write(file, b"content", 7)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC


# Several processes


def start(server: FileServer, cache: ShardCache) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", READ_ALL, f"{server.url}/manifest.json", str(cache.folder)])


def test_four_processes_fetch_each_shard_once(server: FileServer, cache: ShardCache) -> None:
    server.answer = Answer(seconds=0.1)
    processes = [start(server, cache) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert server.count() == dict.fromkeys(NAMES, 1) | {"manifest.json": 4}


def test_a_lock_on_a_file_that_has_just_lost_its_name_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner finished, and renamed it, between our opening it and our locking it."""
    part = tmp_path / "a.part"
    lock = fcntl.flock

    def finish_first(file: FileIO, operation: int) -> None:
        part.rename(tmp_path / "a.tar")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    assert _lock(part, os.O_RDWR | os.O_CREAT) is None


@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_download_is_taken_over_and_verified(
    server: FileServer, cache: ShardCache, folder: Path, damaged: bool
) -> None:
    fail(server, NAMES[0], Answer(cut=1000, stall=True))
    process = start(server, cache)
    reader = open_remote(server, cache)
    shard = reader.manifest.shards[0]
    part = cache.folder / f"{shard.sha256}.{shard.num_bytes}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 1000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cached(cache) == set()
    if damaged:
        part.write_bytes(bytes(1000))
    assert_same(reader, folder)
    assert [request.offset for request in server.of(NAMES[0])] == [None, 1000, None][: 2 + damaged]
    assert cached(cache, ".part") == set()


def test_a_local_manifest_may_list_urls(server: FileServer, cache: ShardCache, folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(folder / "manifest.json")
    shards = tuple(replace(shard, path=f"{server.url}/{shard.path}") for shard in manifest.shards)
    save_manifest(replace(manifest, shards=shards), tmp_path / "manifest.json")
    path = str(tmp_path / "manifest.json")
    reader = ShardReader(load_manifest(path), root_of(path), cache)
    assert_same(reader, folder)
    assert re.fullmatch(rf"{server.url}/{NAMES[0]}", str(reader.location(0)))
