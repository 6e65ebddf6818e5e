"""Manifests: what is written is read back, and whatever is wrong is named with file, key and value."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from depthkit.data.codecs import CODECS, SIZES
from depthkit.data.manifest import (
    Codec,
    LabelSettings,
    LabelsOf,
    Manifest,
    Shard,
    TargetSpec,
    load_manifest,
    save_manifest,
)
from depthkit.files import atomic_write

MANIFEST = Manifest(
    name="rooms",
    split="train",
    target=TargetSpec(
        quantity="depth",
        codec="png16",
        extension="depth.png",
        scale=1000,
        invalid_values=(65535,),
        depth_range=(0.1, 10),
    ),
    shards=(Shard(path="rooms-000000.tar", num_samples=3, num_bytes=10240, sha256="0" * 64),),
    licence="CC BY 4.0",
    source="rendered für Tests",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rooms.json"
    save_manifest(MANIFEST, path)
    return path


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of the file; `target__scale` means the key `scale` inside `target`."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(content))


def test_read_back(path: Path) -> None:
    assert load_manifest(path) == MANIFEST
    assert load_manifest(path).num_samples == 3


def test_optional_parts_may_be_null_or_absent(path: Path) -> None:
    rewrite(path, target=None)
    content = json.loads(path.read_text())
    del content["description"], content["labels_of"]
    path.write_text(json.dumps(content))
    loaded = load_manifest(path)
    assert loaded.target is None
    assert loaded.labels_of is None
    assert loaded.description == ""


def test_digest_depends_on_content_alone(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert load_manifest(path).digest() == MANIFEST.digest()
    labels_of = LabelsOf(
        images="rooms",
        images_digest="a",
        teacher_sha256="b",
        settings=LabelSettings(short_side=518, precision="32-true"),
        code_version="0.1.0",
    )
    others = [replace(MANIFEST, split="val"), replace(MANIFEST, labels_of=labels_of), replace(MANIFEST, target=None)]
    assert len({manifest.digest() for manifest in [MANIFEST, *others]}) == 4


def test_runs_are_read_back_and_change_neither_digest_nor_the_file_of_a_set_without_video(path: Path) -> None:
    assert "runs" not in path.read_text()
    video = replace(MANIFEST, shards=(replace(MANIFEST.shards[0], runs=(2, 1)),))
    assert video.digest() == MANIFEST.digest()
    save_manifest(video, path)
    assert load_manifest(path) == video
    with pytest.raises(ValueError, match=r"runs: \(2, 2\) are not the 3 samples"):
        replace(MANIFEST.shards[0], runs=(2, 2))


def test_label_sets_of_before_the_settings_keep_their_digest(path: Path) -> None:
    origin = {"images": "rooms", "images_digest": "a", "teacher_sha256": "b", "code_version": "0.1.0"}
    origin |= {"resolution": "short side 518", "views": "mean over scales 1, 1.25"}
    rewrite(path, labels_of=origin)
    assert load_manifest(path).digest() == "615648ee8ad2136c4cb7e0d29f1a2a19cad5b35ccc21f8489b510ff4cc19c579"


def test_settings_of_labels_are_read_back_and_belong_to_the_digest(path: Path) -> None:
    origin = {"images": "rooms", "images_digest": "a", "teacher_sha256": "b", "code_version": "0.1.0"}
    rewrite(path, labels_of=origin | {"settings": {"short_side": 518, "precision": "bf16-mixed"}})
    plain = load_manifest(path)
    assert plain.labels_of is not None
    assert plain.labels_of.settings == LabelSettings(short_side=518, precision="bf16-mixed")
    assert str(plain.labels_of.settings) == "shorter side 518 px, precision bf16-mixed, scale 1"
    save_manifest(plain, path)
    assert load_manifest(path) == plain
    rewrite(path, labels_of__settings__scales=[1, 1.25])
    assert load_manifest(path).digest() != plain.digest()


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"licence": 3}, "licence", "3"),
        ({"target__scale": "1000"}, "target.scale", "'1000'"),
        ({"target__scale": True}, "target.scale", "True"),
        ({"target__scale": 0}, "target.scale", "0.0"),
        ({"target__metric": 1}, "target.metric", "1"),
        ({"target__codec": "png12"}, "target.codec", "'png12'"),
        ({"target__quantity": "disparity"}, "target.metric", "disparity"),
        ({"target__depth_range": [1.0]}, "target.depth_range", "[1.0]"),
        ({"target__invalid_values": ["x"]}, "target.invalid_values[0]", "'x'"),
        ({"target__invalid_values": 7}, "target.invalid_values", "7"),
        ({"target__unit": "m"}, "target.unit", "'m'"),
        ({"weight": 0.5}, "weight", "0.5"),
        ({"shards": [{"path": "a.tar"}]}, "shards[0].num_bytes", "missing"),
        ({"shards": {}}, "shards", "{}"),
        ({"labels_of": []}, "labels_of", "[]"),
    ],
)
def test_error_names_file_key_and_value(path: Path, changes: dict[str, Any], key: str, value: str) -> None:
    rewrite(path, **changes)
    with pytest.raises(ValueError) as error:
        load_manifest(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert key in message
    assert value in message


def test_an_unknown_choice_lists_the_known_ones(path: Path) -> None:
    rewrite(path, target__codec="png12")
    with pytest.raises(ValueError, match=r"png16, png8, .*tiff32f"):
        load_manifest(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "a: b"])
def test_not_a_manifest(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rooms\.json"):
        load_manifest(path)


def test_missing_key_and_repeated_shard(path: Path) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "shards": content["shards"] * 2}))
    with pytest.raises(ValueError, match=r"rooms-000000.tar.*more than once"):
        load_manifest(path)
    del content["name"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="name: missing"):
        load_manifest(path)


def test_what_cannot_be_read_back_is_not_written(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="licence"):
        save_manifest(replace(MANIFEST, licence=None), path)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_every_codec_has_its_readers() -> None:
    assert set(CODECS) == set(SIZES) == set(get_args(Codec))


def test_atomic_write_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_keeps_the_old_file_when_the_process_dies(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    script = (
        "import os, pathlib, sys; from depthkit.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 9
    assert path.read_text() == "old"


def test_atomic_write_gives_ordinary_permissions(tmp_path: Path) -> None:
    """Data folders are shared on a cluster; a private mode would lock the others out."""
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "file"):
        pass
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
