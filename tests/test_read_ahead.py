"""Training from a server: the batches of the local data, and the shards of the next steps fetched in time."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Answer, FileServer, serve
from handmade import labeled_sample, pseudo_labels, unlabeled_sample, write_dataset
from test_datamodule import Batches, assert_same

from depthkit.config import AugmentConfig, DataConfig, DatasetConfig, PathsConfig
from depthkit.data import remote
from depthkit.data.cache import ShardCache
from depthkit.data.datamodule import DepthDataModule, build_streams
from depthkit.data.manifest import load_manifest
from depthkit.data.quarantine import SampleError
from depthkit.data.read_ahead import Prefetcher, ReadAhead
from depthkit.data.remote import root_of
from depthkit.data.shards import ShardReader
from depthkit.data.streams import StepSampler, StreamDataset

NUM_STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 labeled images in shards of 4; 40 unlabeled ones with pseudo-labels, in shards of 8."""
    root = tmp_path_factory.mktemp("served")
    keys = [f"u{i:02d}" for i in range(40)]
    images = write_dataset(root / "images", {key: unlabeled_sample(i) for i, key in enumerate(keys)}, None)
    pseudo_labels(root / "labels", images, keys)
    write_dataset(root / "rooms", {f"r{i:02d}": labeled_sample(i) for i in range(24)}, samples_per_shard=4)
    return root


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    with serve(folder) as server:
        yield server


def make_config(root: Path | str, num_workers: int = 0) -> DataConfig:
    return DataConfig(
        labeled={"rooms": DatasetConfig(manifest=f"{root}/rooms/manifest.json")},
        unlabeled={
            "images": DatasetConfig(manifest=f"{root}/images/manifest.json", labels=f"{root}/labels/manifest.json")
        },
        crop_size=[32, 32],
        batch_size=6,
        shuffle_block=4,
        num_workers=num_workers,
        augment=AugmentConfig(color_jitter=0.8, cutmix=0.5),
    )


def make_cache(tmp_path: Path, **settings: float) -> ShardCache:
    return ShardCache(PathsConfig(cache=str(tmp_path / "cache"), **settings))


def load(config: DataConfig, cache: ShardCache | None = None, start_step: int = 0) -> Batches:
    module = DepthDataModule(config, seed=0, num_steps=NUM_STEPS, multiple=8, cache=cache)
    return list(module.train_loader(start_step=start_step))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_those_of_the_local_data(
    server: FileServer, folder: Path, tmp_path: Path, num_workers: int
) -> None:
    for names in ("images", "rooms", "labels"):
        for number, fault in enumerate((Answer(cut=700), Answer(status=500), Answer(flip=True))):
            server.next_answers[f"{names}/train-{number:06d}.tar"] = [fault]
    cache = make_cache(tmp_path)
    found = load(make_config(server.url, num_workers), cache)
    assert_same(found, load(make_config(folder)))
    later = load(make_config(server.url, num_workers), cache, start_step=7)
    assert_same(later, found[7:])
    refused = {request.status for request in server.requests} - {200, 206}
    assert refused == {500}


def test_a_run_resumed_on_a_cold_cache_gives_the_same_batches(server: FileServer, folder: Path, tmp_path: Path) -> None:
    assert_same(load(make_config(server.url), make_cache(tmp_path), start_step=7), load(make_config(folder))[7:])


def test_a_shard_that_cannot_be_had_is_a_named_rejection(server: FileServer, tmp_path: Path) -> None:
    server.next_answers["rooms/train-000002.tar"] = [Answer(status=404)] * 99
    batches = load(make_config(server.url), make_cache(tmp_path))
    rejections = [rejection for batch in batches for rejection in batch["labeled"]["rejections"]]
    assert rejections
    assert {rejection.shard for rejection in rejections} == {f"{server.url}/rooms/train-000002.tar"}
    assert all("HTTP status 404" in rejection.reason for rejection in rejections)
    assert not {f"r{i:02d}" for i in range(8, 12)} & {key for batch in batches for key in batch["labeled"]["key"]}


class Recorder(Prefetcher):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int, int]] = []

    def request(self, reader: ShardReader, shard: int, needed_at: int) -> None:
        self.asked.append((str(reader.location(shard)), shard, needed_at))


def test_the_shards_of_a_batch_and_of_the_block_after_it_are_asked_for(server: FileServer, tmp_path: Path) -> None:
    """Every shard of step s is known `shuffle_block` steps earlier, and none that no step of the run reads."""
    streams = build_streams(make_config(server.url), "disparity", 0, make_cache(tmp_path))
    dataset = ReadAhead(StreamDataset(streams), num_steps=NUM_STEPS)
    asked_by = []
    for slots in StepSampler({name: s.images_per_step for name, s in streams.items()}, num_steps=NUM_STEPS):
        dataset.prefetcher = recorder = Recorder()
        dataset.__getitems__(slots)
        asked_by.append(set(recorder.asked))
    expected = []
    for step in range(NUM_STEPS):
        needed = set()
        for later in (step, step + 4):
            for name, stream in streams.items():
                for position in range(later * stream.images_per_step, (later + 1) * stream.images_per_step):
                    _, shard, _ = stream.order.locate(position)
                    folders = ("images", "labels") if name == "unlabeled" else ("rooms",)
                    tar = f"train-{shard:06d}.tar"
                    needed |= {(f"{server.url}/{f}/{tar}", shard, later) for f in folders if later < NUM_STEPS}
        expected.append(needed)
    assert asked_by == expected


def open_remote(server: FileServer, cache: ShardCache) -> ShardReader:
    url = f"{server.url}/images/manifest.json"
    return ShardReader(load_manifest(url), root_of(url), cache)


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_was_fetched_ahead_is_not_fetched_again(server: FileServer, folder: Path, tmp_path: Path) -> None:
    reader = open_remote(server, make_cache(tmp_path))
    prefetcher = Prefetcher()
    for _ in range(3):
        for shard in range(4):
            prefetcher.request(reader, shard, shard)
    wait_until(lambda: all(reader.cache.path(reader.manifest.shards[shard]).exists() for shard in range(4)))
    for shard in range(4):
        reader.read(shard, 0)
    assert server.count() == {f"images/train-{k:06d}.tar": 1 for k in range(4)} | {"images/manifest.json": 1}


def test_a_prefetch_that_fails_is_no_error_until_the_shard_is_needed(server: FileServer, tmp_path: Path) -> None:
    reader = open_remote(server, make_cache(tmp_path))
    name = "images/train-000000.tar"
    server.next_answers[name] = [Answer(status=404), Answer(status=404)]
    prefetcher = Prefetcher()
    prefetcher.request(reader, 0, 0)
    wait_until(lambda: server.of(name))
    wait_until(lambda: prefetcher._not_before[id(reader), 0] < float("inf"))
    with pytest.raises(SampleError, match="404"):
        reader.read(0, 0)
    other = open_remote(server, make_cache(tmp_path))
    assert other.read(0, 0).key == "u00"


def test_what_is_fetched_ahead_never_drives_out_what_was_used_since(
    server: FileServer, folder: Path, tmp_path: Path
) -> None:
    size = max(path.stat().st_size for path in (folder / "images").glob("*.tar"))
    cache = make_cache(tmp_path, cache_gb=2 * size / 1e9)
    reader = open_remote(server, cache)
    shards = reader.manifest.shards
    asked = time.time()
    for k in (0, 1):
        cache.fetch(str(reader.location(k)), shards[k])
    cache.fetch(str(reader.location(2)), shards[2], unused_since=asked, wait=False)
    assert [cache.path(shard).exists() for shard in shards[:3]] == [True, True, False]
    cache.fetch(str(reader.location(2)), shards[2], unused_since=time.time(), wait=False)
    assert [cache.path(shard).exists() for shard in shards[:3]] == [False, True, True]


def test_a_download_in_the_background_does_not_keep_a_process_from_ending(server: FileServer, tmp_path: Path) -> None:
    server.next_answers["images/train-000000.tar"] = [Answer(cut=100, stall=True)]
    program = """
import sys, time
from pathlib import Path
from depthkit.config import PathsConfig
from depthkit.data.cache import ShardCache
from depthkit.data.manifest import load_manifest
from depthkit.data.read_ahead import Prefetcher
from depthkit.data.shards import ShardReader
reader = ShardReader(load_manifest(sys.argv[1]), sys.argv[1], ShardCache(PathsConfig(cache=sys.argv[2])))
Prefetcher().request(reader, 0, 0)
while not [part for part in Path(sys.argv[2]).glob("*.part") if part.stat().st_size]:
    time.sleep(0.01)
"""
    command = [sys.executable, "-c", program, f"{server.url}/images/manifest.json", str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=50, check=False).returncode == 0
    assert not server.released.is_set()


def test_local_data_ask_for_nothing(folder: Path, tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    load(make_config(folder), cache)
    assert not cache.folder.exists()
