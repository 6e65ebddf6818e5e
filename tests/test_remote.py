"""Remote shards: fetched whole, once, over connections that break; what is read is what a local copy gives."""

import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import Answer, FileServer, serve
from handmade import unlabeled_sample, write_dataset

from depthkit.config import ConfigError, PathsConfig
from depthkit.data import remote
from depthkit.data.cache import ShardCache
from depthkit.data.index import index_path
from depthkit.data.manifest import Manifest, load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.remote import locate, root_of
from depthkit.data.shards import ShardReader, verify_shard

NUM_SHARDS = 6
NAMES = [f"train-{k:06d}.tar" for k in range(NUM_SHARDS)]
GARBLED = [Answer(flip=True)]


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


def open_remote(server: FileServer, cache: ShardCache) -> ShardReader:
    url = f"{server.url}/manifest.json"
    return ShardReader(load_manifest(url), root_of(url), cache)


def assert_same(reader: ShardReader, folder: Path) -> None:
    local = ShardReader(load_manifest(folder / "manifest.json"), folder)
    for shard, facts in enumerate(local.manifest.shards):
        for sample in range(facts.num_samples):
            assert reader.read(shard, sample) == local.read(shard, sample)


def cached(cache: ShardCache, suffix: str = ".tar") -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix == suffix}


def fail(server: FileServer, name: str, *answers: Answer) -> None:
    server.next_answers[name] = list(answers)


# Where shards lie


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        (Path("/data/rooms"), "a.tar", Path("/data/rooms/a.tar")),
        ("http://host/rooms/manifest.json", "a.tar", "http://host/rooms/a.tar"),
        ("https://host/m.json?key=k", "sub/a b#1.tar", "https://host/sub/a%20b%231.tar?key=k"),
        ("s3://bucket/rooms/manifest.json", "sub/a b.tar", "s3://bucket/rooms/sub/a b.tar"),
        ("pipe:ssh host cat /d/manifest.json", "a.tar", "pipe:ssh host cat /d/a.tar"),
        ("pipe:curl -s 'http://h/x.json' -o -", "sub/a.tar", "pipe:curl -s 'http://h/sub/a.tar' -o -"),
        ("http://host/rooms/manifest.json", "https://other/a.tar", "https://other/a.tar"),
        (Path("/data/rooms"), "pipe:cat a.tar", "pipe:cat a.tar"),
    ],
)
def test_shards_lie_beside_their_manifest_or_at_their_own_url(
    root: Path | str, path: str, expected: Path | str
) -> None:
    assert locate(root, path) == expected


@pytest.mark.parametrize(
    ("root", "path", "reason"),
    [
        ("pipe:cat shards", "a.tar", "NAME.json, once"),
        ("pipe:cat /d/manifest.json", "a.tar; reboot", "may go into a command"),
        ("http://host/manifest.json", "pipe:reboot", "may not name commands"),
    ],
)
def test_no_foreign_text_becomes_a_command(root: str, path: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        locate(root, path)


# Reading


def test_remote_samples_are_the_local_ones_and_each_shard_is_fetched_once(
    server: FileServer, cache: ShardCache, folder: Path
) -> None:
    reader = open_remote(server, cache)
    assert server.count() == {"manifest.json": 1}  # nothing else before the first read
    assert_same(reader, folder)
    assert_same(open_remote(server, pickle.loads(pickle.dumps(cache))), folder)
    assert server.count() == dict.fromkeys(NAMES, 1) | {"manifest.json": 2}
    assert cached(cache) == {f"{shard.sha256}.tar" for shard in reader.manifest.shards}
    assert cached(cache, ".part") == set()
    assert all(index_path(cache.path(shard)).is_file() for shard in reader.manifest.shards)


def test_two_manifests_share_the_copy_of_a_shard(server: FileServer, cache: ShardCache, folder: Path) -> None:
    assert_same(open_remote(server, cache), folder)
    manifest = load_manifest(folder / "manifest.json")
    elsewhere = tuple(replace(shard, path=f"http://gone.invalid/{shard.path}") for shard in manifest.shards)
    assert_same(ShardReader(replace(manifest, name="again", shards=elsewhere), folder, cache), folder)


def test_a_command_is_read_too(cache: ShardCache, folder: Path) -> None:
    url = f"pipe:cat {folder}/manifest.json"
    assert_same(ShardReader(load_manifest(url), root_of(url), cache), folder)


def test_a_command_that_fails_names_itself(cache: ShardCache, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipe:cat .*/gone\.json: .*exit 1"):
        load_manifest(f"pipe:cat {folder}/gone.json")
    manifest = load_manifest(folder / "manifest.json")
    shard = replace(manifest.shards[0], path=f"pipe:head -c 1000 {folder / NAMES[0]}")
    with pytest.raises(SampleError, match=r"pipe:head -c 1000 .*1000 of \d+ bytes"):
        ShardReader(replace(manifest, shards=(shard,)), folder, cache).read(0, 0)


def test_s3(cache: ShardCache, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    s3_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3_server.start()
    try:
        host, port = s3_server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.session.Session().client("s3")
        client.create_bucket(Bucket="rooms")
        for path in folder.iterdir():
            # The first kilobyte of this one is already here, and wrong there: only a range gives the right whole.
            content = path.read_bytes()
            body = bytes(1000) + content[1000:] if path.name == NAMES[3] else content
            client.put_object(Bucket="rooms", Key=f"v1/{path.name}", Body=body)
        url = "s3://rooms/v1/manifest.json"
        reader = ShardReader(load_manifest(url), root_of(url), cache)
        begin_download(cache, reader.manifest, 3, (folder / NAMES[3]).read_bytes()[:1000])
        assert_same(reader, folder)
        with pytest.raises(ConfigError, match=r"s3://rooms/gone\.json: HTTP status 404 NoSuchKey"):
            load_manifest("s3://rooms/gone.json")
    finally:
        s3_server.stop()


def test_s3_without_boto3_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"s3://bucket/m\.json: .*depthkit\[s3\]"):
        load_manifest("s3://bucket/m.json")


def begin_download(cache: ShardCache, manifest: Manifest, shard: int, content: bytes) -> Path:
    facts = manifest.shards[shard]
    cache.folder.mkdir(parents=True, exist_ok=True)
    part = cache.folder / f"{facts.sha256}.{facts.num_bytes}.part"
    part.write_bytes(content)
    return part


# Servers and connections that fail


def test_a_cut_download_goes_on_where_it_stopped(server: FileServer, cache: ShardCache, folder: Path) -> None:
    fail(server, NAMES[0], Answer(cut=1000), Answer(cut=500), Answer(status=503))
    assert_same(open_remote(server, cache), folder)
    assert [(request.offset, request.status) for request in server.of(NAMES[0])] == [
        (None, 200),
        (1000, 206),
        (1500, 503),
        (1500, 206),
    ]


def test_a_server_without_ranges_sends_it_again(server: FileServer, cache: ShardCache, folder: Path) -> None:
    server.answer = Answer(ranges=False)
    fail(server, NAMES[0], Answer(cut=1000))
    assert_same(open_remote(server, cache), folder)
    assert [request.status for request in server.of(NAMES[0])] == [200, 200]


def test_wrong_bytes_are_fetched_again(server: FileServer, cache: ShardCache, folder: Path) -> None:
    fail(server, NAMES[0], Answer(flip=True))
    fail(server, NAMES[1], Answer(flip=True, cut=1000))  # a wrong beginning, continued rightly
    assert_same(open_remote(server, cache), folder)
    assert [request.offset for request in server.of(NAMES[0])] == [None, None]
    assert [request.offset for request in server.of(NAMES[1])] == [None, 1000, None]


def test_bytes_that_stay_wrong_are_named_and_not_kept(server: FileServer, cache: ShardCache, folder: Path) -> None:
    fail(server, NAMES[0], *2 * GARBLED)
    reader = open_remote(server, cache)
    expected = reader.manifest.shards[0].sha256
    with pytest.raises(SampleError, match=rf"{server.url}/{NAMES[0]}: sha256 is [0-9a-f]{{64}}, .* says {expected}"):
        reader.read(0, 0)
    assert cached(cache) == set()
    assert reader.read(1, 0)


@pytest.mark.parametrize(("content", "reason"), [(lambda tar: tar[:-512], "fewer"), (lambda tar: tar * 2, "more")])
def test_another_size_is_named(
    tmp_path: Path, cache: ShardCache, folder: Path, content: Callable[[bytes], bytes], reason: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    tar = tmp_path / "copy" / NAMES[0]
    tar.write_bytes(content(tar.read_bytes()))
    with serve(tmp_path / "copy") as server, pytest.raises(SampleError, match=rf"{NAMES[0]}: {reason} than the"):
        open_remote(server, cache).read(0, 0)
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) == 0


def test_a_server_that_stays_broken_is_given_up(server: FileServer, cache: ShardCache) -> None:
    reader = open_remote(server, cache)
    server.answer = Answer(status=500)
    with pytest.raises(SampleError, match=rf"{server.url}/{NAMES[0]}: HTTP status 500.* {remote.MAX_FAILURES} times"):
        reader.read(0, 0)
    assert len(server.of(NAMES[0])) == remote.MAX_FAILURES
    with pytest.raises(SampleError, match="HTTP status 500"):
        reader.read(0, 1)
    assert len(server.of(NAMES[0])) == remote.MAX_FAILURES  # the other samples of the shard do not ask again


def test_a_missing_shard_is_not_asked_for_twice(server: FileServer, cache: ShardCache) -> None:
    reader = open_remote(server, cache)
    fail(server, NAMES[0], Answer(status=404), Answer(status=404))
    with pytest.raises(SampleError, match=rf"{server.url}/{NAMES[0]}: HTTP status 404"):
        reader.read(0, 0)
    assert len(server.of(NAMES[0])) == 1


def test_a_missing_manifest_or_server_is_named_without_the_query(server: FileServer) -> None:
    with pytest.raises(ConfigError, match=rf"{server.url}/gone\.json: HTTP status 404") as error:
        load_manifest(f"{server.url}/gone.json?key=secret")
    assert "secret" not in str(error.value)
    server.answer = Answer(status=500)
    with pytest.raises(ConfigError, match=rf"{server.url}/manifest\.json: HTTP status 500"):
        load_manifest(f"{server.url}/manifest.json")
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:1/m\.json: .*refused"):
        load_manifest("http://127.0.0.1:1/m.json")


def test_a_cut_manifest_is_read_again(server: FileServer, folder: Path) -> None:
    fail(server, "manifest.json", Answer(cut=100))
    assert load_manifest(f"{server.url}/manifest.json") == load_manifest(folder / "manifest.json")


def test_verify_reads_the_cached_copy(server: FileServer, cache: ShardCache) -> None:
    reader = open_remote(server, cache)
    shard = reader.manifest.shards[0]
    verify_shard(reader.root, shard, cache)
    data = bytearray(cache.path(shard).read_bytes())
    data[600] ^= 1
    cache.path(shard).write_bytes(data)
    with pytest.raises(SampleError, match=f"sha256 is .* says {shard.sha256}"):
        verify_shard(reader.root, shard, cache)
