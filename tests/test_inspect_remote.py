"""`depthkit inspect` of manifests given by URL: it says what it says of the same files on this machine."""

import shutil
from pathlib import Path

import pytest
from file_server import Answer, serve

from depthkit.data import remote
from depthkit.data.inspect import main
from depthkit.data.manifest import load_manifest

NAMES = ("source_train", "target_train")


def test_a_manifest_on_a_server_is_inspected_like_the_same_files_here(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(str(tiny_world / name / "manifest.json") for name in NAMES), "--workers", "1"]) == 0
    local = capsys.readouterr().out
    cache = tmp_path / "cache"
    with serve(tiny_world) as server:
        urls = [f"{server.url}/{name}/manifest.json?key=secret" for name in NAMES]
        arguments = [*urls, urls[0], "--cache", str(cache), "--html", str(tmp_path / "page.html")]
        assert main([*arguments, "--workers", "2"]) == 0
        assert len(list(cache.glob("*.tar"))) == 6
        first = server.count()
        assert main([*arguments, "--workers", "1"]) == 0
        again = server.count() - first
    assert capsys.readouterr().out.replace("  ", "").replace(server.url, "") == 2 * local.replace("  ", "")
    assert {name for name in again if name.endswith(".tar")} == set()  # they lie in the cache
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/jpeg") >= 2 * 12
    assert "secret" not in page


def test_wrong_bytes_missing_shards_and_missing_manifests_are_problems(
    tiny_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.0)
    shutil.copytree(tiny_world, tmp_path / "served")
    wrong, missing = (load_manifest(tiny_world / name / "manifest.json").shards[1].path for name in NAMES)
    (tmp_path / "served" / NAMES[1] / missing).unlink()
    with serve(tmp_path / "served") as server:
        server.next_answers[f"{NAMES[0]}/{wrong}"] = [Answer(flip=True)] * 2
        urls = [f"{server.url}/{name}/manifest.json" for name in (*NAMES, "none")]
        assert main([*urls, "--cache", str(tmp_path / "cache"), "--workers", "1"]) == 1
    lines = capsys.readouterr().err.splitlines()
    reasons = (f"{wrong}: sha256 is", f"{missing}: HTTP status 404", "none/manifest.json: HTTP status 404")
    for url, reason, line in zip(urls, reasons, lines, strict=True):
        assert line.startswith(f"{url}: ")
        assert reason in line


def test_a_command_gives_manifest_and_shards(tiny_world: Path, tmp_path: Path) -> None:
    command = f"pipe:cat {tiny_world}/{NAMES[1]}/manifest.json"
    assert main([command, "--cache", str(tmp_path / "cache"), "--workers", "1"]) == 0
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 3
