"""Stages read manifests by URL."""

import time
from pathlib import Path

from conftest import Compose
from file_server import serve

from depthkit.config import PathsConfig
from depthkit.data.cache import ShardCache
from depthkit.data.claims import Claims
from depthkit.data.labeling import LabelShards
from depthkit.data.manifest import LabelsOf, load_manifest
from depthkit.data.read_ahead import Prefetcher
from depthkit.data.shards import ShardReader
from depthkit.label import claimed_chunks


def test_a_teacher_trains_and_labels_from_a_server(
    tiny_world: Path, tiny_config: Compose, tiny_teacher: Path, compose: Compose, tmp_path: Path
) -> None:
    from depthkit.label import label
    from depthkit.train import run

    with serve(tiny_world) as server:
        cache = [f"paths.cache={tmp_path / 'cache'}"]
        urls = [
            f"data.{n}.manifest={server.url}/{f}/manifest.json"
            for n, f in (("labeled.source", "source_train"), ("val.source", "source_val"))
        ]
        config = tiny_config("teacher", tmp_path / "remote", *urls, *cache)

        assert run(config) == run(tiny_config("teacher", tmp_path / "local"))
        out = tmp_path / "labels"
        settings = [f"stage.bundle={tiny_teacher}", f"stage.images={server.url}/target_train/manifest.json"]
        settings += [f"stage.out={out}", "stage.num_workers=0", "trainer.enable_progress_bar=false"]
        labels = load_manifest(label(compose("stage=pseudo_label", *settings, *cache)))
        assert labels.num_samples == 24
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 3 + 1 + 3


def test_the_shard_to_label_next_is_fetched_while_the_present_one_is_labelled(tiny_world: Path, tmp_path: Path) -> None:
    with serve(tiny_world / "target_train") as server:
        url = f"{server.url}/manifest.json"
        images = ShardReader(load_manifest(url), url, ShardCache(PathsConfig(cache=str(tmp_path / "cache"))))
        claims = Claims(tmp_path / ".claims", timeout=60)
        origin = LabelsOf(images="", images_digest="", teacher_sha256="", code_version="")
        shards = LabelShards(tmp_path / "labels", images, origin, claims, max_rejected=0.0)
        facts = images.manifest.shards

        chunks = claimed_chunks(shards, 4, Prefetcher())
        assert next(chunks) == (0, 0, 4)
        wait_for(images.cache.path(facts[1]))
        assert claims.taken() == {facts[0].path}  # the one ahead is free for others
        assert [next(chunks), next(chunks)] == [(0, 4, 8), (1, 0, 4)]
        wait_for(images.cache.path(facts[2]))
        assert [shard for shard, *_ in chunks] == [1, 2, 2]
        for shard in (1, 2):
            images.read(shard, 0)
        assert server.count() == {"manifest.json": 1, facts[1].path: 1, facts[2].path: 1}  # each once, 0 not at all


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)
