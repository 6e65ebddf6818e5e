"""Stages read manifests by URL."""

from pathlib import Path

from conftest import Compose
from file_server import serve

from depthkit.data.manifest import load_manifest


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
