"""The folder of a label set under faults: dead and slow processes, damaged shards, full disks."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import unlabeled_sample, write_dataset

from depthkit.config import ConfigError, DatasetConfig
from depthkit.data import label_store
from depthkit.data.claims import Claims
from depthkit.data.index import load_index
from depthkit.data.label_images import ImageChunk
from depthkit.data.labeling import LabelShards
from depthkit.data.manifest import LabelsOf, load_manifest, save_manifest
from depthkit.data.quarantine import QuarantineBudgetExceeded, SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.shards import ShardReader, verify_shard
from depthkit.label import label

Label = Callable[..., Path]


def write_images(folder: Path, num_shards: int, samples_per_shard: int = 4) -> Path:
    samples = {f"image_{i:04d}": unlabeled_sample(i) for i in range(num_shards * samples_per_shard)}
    return write_dataset(folder, samples, None, samples_per_shard=samples_per_shard)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three shards of four."""
    return write_images(tmp_path / "images", 3)


@pytest.fixture
def run_label(compose: Any, tiny_teacher: Path) -> Label:
    def run(images: Path, out: Path, *overrides: str) -> Path:
        settings = [f"stage.bundle={tiny_teacher}", f"stage.images={images}", f"stage.out={out}", "stage.batch_size=2"]
        settings += ["stage.num_workers=0", "stage.num_writers=2", "trainer.enable_progress_bar=false"]
        return label(compose("stage=pseudo_label", *settings, *overrides))

    return run


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def assert_complete(images: Path, out: Path) -> None:
    """One label for each image, in its place, and the files are what the manifest says; nothing half is left."""
    image_set, label_set = load_manifest(images), load_manifest(out / "manifest.json")
    assert [shard.path for shard in label_set.shards] == [shard.path for shard in image_set.shards]
    assert sorted(tars(out)) == sorted(shard.path for shard in image_set.shards)
    of_images, of_labels = ShardReader(image_set, images.parent), ShardReader(label_set, out)
    for index, shard in enumerate(label_set.shards):
        verify_shard(out, shard)
        assert of_labels.keys(index) == of_images.keys(index)
        assert of_labels.read(index, 0).members["disparity.png"]
    assert not list((out / ".claims").iterdir())


# One folder, several writers


def store(images: Path, out: Path, *, max_rejected: float = 0.01) -> LabelShards:
    manifest = load_manifest(images)
    origin = LabelsOf(
        images=manifest.name,
        images_digest=manifest.digest(),
        teacher_sha256="ab" * 32,
        code_version="1",
    )
    claims = Claims(out / ".claims", timeout=60)
    return LabelShards(out, ShardReader(manifest, images.parent), origin, claims, max_rejected=max_rejected)


def write_shard(shards: LabelShards, shard: int, value: float = 1.0, *, order: list[int] | None = None) -> None:
    keys = shards.images.keys(shard)
    assert shards.accept(ImageChunk(shard, 0, keys, True, [], {}))
    for index in order or range(len(keys)):
        shards.write(shard, index, np.linspace(0, value, 12, dtype=np.float32).reshape(3, 4))


def test_the_order_of_arrival_does_not_show(images: Path, tmp_path: Path):
    written = []
    for number, order in enumerate([[0, 1, 2, 3], [3, 1, 0, 2]]):
        shards = store(images, tmp_path / str(number))
        assert shards.take() == 0
        write_shard(shards, 0, order=order)
        written.append(tars(tmp_path / str(number)))
    assert written[0] == written[1]
    assert list(written[0]) == ["train-000000.tar"]


def test_of_two_writers_of_one_shard_the_first_stays(images: Path, tmp_path: Path):
    """The second was paused until it was taken for dead; its labels are other ones, as those of another GPU may be."""
    out = tmp_path / "labels"
    paused, heir = store(images, out), store(images, out)
    assert paused.take() == 0
    keys = paused.images.keys(0)
    assert paused.accept(ImageChunk(0, 0, keys, True, [], {}))
    (claim,) = (out / ".claims").iterdir()
    claim.unlink()
    assert heir.take() == 0
    write_shard(heir, 0, 1.0)
    before = {path.name: path.read_bytes() for path in out.glob("train*")}
    for index in range(4):
        paused.write(0, index, np.ones((3, 4), np.float32))
    assert {path.name: path.read_bytes() for path in out.glob("train*")} == before
    assert not [path for path in out.iterdir() if path.name.startswith(".train")]
    assert heir.pending() == [1, 2]


def test_a_paused_writer_whose_attempt_was_tidied_away_goes_on(images: Path, tmp_path: Path):
    out = tmp_path / "labels"
    paused, heir = store(images, out), store(images, out)
    paused.take()
    keys = paused.images.keys(0)
    paused.accept(ImageChunk(0, 0, keys, True, [], {}))
    label_store.remove_leftovers(out / "train-000000.tar", paused.claims.token)
    (out / ".claims" / "train-000000.tar.0").unlink()
    assert heir.take() == 0
    write_shard(heir, 0)
    for index in range(4):
        paused.write(0, index, np.ones((3, 4), np.float32))
    assert paused.take() == 1


def test_processes_that_start_together_take_different_shards(images: Path, tmp_path: Path):
    several = [store(images, tmp_path / "labels") for _ in range(4)]
    taken = [shards.take() for shards in several]
    assert sorted(taken[:3]) == [0, 1, 2]
    assert taken[3] is None


def test_who_looked_earlier_does_not_label_again_what_others_finished(images: Path, tmp_path: Path):
    first, second = store(images, tmp_path / "labels"), store(images, tmp_path / "labels")
    assert first.take() == 0  # and knows 1 and 2 as free
    for shard in (1, 2):
        assert second.take() == shard
        write_shard(second, shard)
    assert first.take() is None
    assert not first.finish(), "its own shard is missing"
    write_shard(first, 0)
    assert [shards.finish() for shards in (first, second)] == [True, True]
    assert_complete(images, tmp_path / "labels")


def test_a_manifest_does_not_outlive_a_shard_that_is_written_again(images: Path, tmp_path: Path):
    shards = store(images, tmp_path / "labels")
    for shard in range(3):
        assert shards.take() == shard
        write_shard(shards, shard)
    assert shards.finish()
    (tmp_path / "labels" / "train-000001.tar").unlink()
    assert shards.take() == 1
    write_shard(shards, 1, 2.0)
    assert shards.finish()
    assert_complete(images, tmp_path / "labels")


def test_file_systems_without_hard_links_will_do(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(label_store.os, "link", no_links)
    shards = store(images, tmp_path / "labels")
    for shard in range(3):
        assert shards.take() == shard
        write_shard(shards, shard)
    assert shards.finish()
    assert_complete(images, tmp_path / "labels")


# Damaged image shards


def cut_off(images: Path, shard: int) -> bytes:
    """Damage an image shard; returns what it was."""
    tar = images.parent / load_manifest(images).shards[shard].path
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    return whole


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_image_shard_is_named_and_the_others_are_labeled(
    run_label: Label, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    images, out = write_images(tmp_path / "images", 3), tmp_path / "labels"
    whole = cut_off(images, 1)
    if damage == "missing":
        (images.parent / "train-000001.tar").unlink()
    manifest = load_manifest(run_label(images, out))
    assert "train-000001.tar cannot be read, the other shards go on" in capsys.readouterr().out
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 4]
    assert "4 images have no label" in manifest.description
    assert "Unreadable image shards: train-000001.tar" in manifest.description
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["shard"] for row in rows} == {f"{images.parent}/train-000001.tar"}
    assert len(rows) == 4
    assert "train-000001.tar" in rows[0]["reason"]

    student = DatasetReader("x", DatasetConfig(manifest=str(images), labels=str(out / "manifest.json")), "disparity")
    assert student.read_whole(2, 0, short_side=32, multiple=8).key == "image_0008"

    (images.parent / "train-000001.tar").write_bytes(whole)
    with pytest.raises(SampleError):
        student.read_whole(1, 0, short_side=32, multiple=8)
    run_label(images, out, "stage.verify=true")
    assert_complete(images, out)
    assert load_manifest(out / "manifest.json").description == ""
    assert not (out / "rejected.jsonl").exists()


def test_too_many_unreadable_images_leave_no_manifest_and_no_claim(run_label: Label, tmp_path: Path):
    images, out = write_images(tmp_path / "images", 3, samples_per_shard=50), tmp_path / "labels"
    whole = cut_off(images, 0)
    with pytest.raises(QuarantineBudgetExceeded, match=r"50 of 150 samples.*\n.*train-000000\.tar"):
        run_label(images, out)
    assert sorted(tars(out)) == ["train-000001.tar", "train-000002.tar"]
    assert not (out / "manifest.json").exists()
    assert len((out / "rejected.jsonl").read_text().splitlines()) == 50
    (images.parent / "train-000000.tar").write_bytes(whole)
    run_label(images, out)
    assert_complete(images, out)


# Checking


def flip_a_byte(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    offset, size = next(iter(load_index(tar).samples.values()))["json"]
    data[offset + size - 2] ^= 1  # a digit becomes another one, and the label still decodes
    tar.write_bytes(data)


def change_the_record(tar: Path) -> None:
    label_store.record_path(tar).write_text("{")


def exchange(tar: Path) -> None:
    """Another label shard with a record of its own: whole, but of other images."""
    other = tar.with_name("train-000000.tar")
    tar.write_bytes(other.read_bytes())
    record = label_store.load_record(other)
    label_store.save_record(replace(record, shard=replace(record.shard, path=tar.name)), tar, "token")


@pytest.mark.parametrize("harm", [flip_a_byte, change_the_record, exchange, Path.unlink])
def test_verify_finds_a_broken_label_shard_and_labels_it_again(
    run_label: Label, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
):
    out = tmp_path / "labels"
    run_label(images, out)
    before = tars(out)
    harm(out / "train-000001.tar")
    run_label(images, out, "stage.verify=true")
    assert tars(out) == before
    assert_complete(images, out)
    if harm is not Path.unlink:
        assert "train-000001.tar is labeled again" in capsys.readouterr().out


def test_verify_leaves_whole_shards_alone(run_label: Label, images: Path, tmp_path: Path):
    out = tmp_path / "labels"
    run_label(images, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    run_label(images, out, "stage.verify=true")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()} == before


def test_a_student_refuses_label_shards_that_do_not_match_the_image_shards(
    run_label: Label, images: Path, tmp_path: Path
):
    labels = run_label(images, tmp_path / "labels")
    manifest = load_manifest(labels)
    save_manifest(replace(manifest, shards=manifest.shards[::-1]), labels)
    with pytest.raises(ConfigError, match=r"train-000002\.tar.*train-000000\.tar"):
        DatasetReader("x", DatasetConfig(manifest=str(images), labels=str(labels)), "disparity")


# Disks


@pytest.mark.parametrize("place", ["write", "link", "record"])
def test_a_full_disk_is_named_and_loses_nothing(
    run_label: Label, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """The disk is full from the second shard on."""
    out = tmp_path / "labels"
    module, name = {
        "write": (label_store.ShardWriter, "add"),
        "link": (label_store, "keep_first"),
        "record": (label_store, "save_record"),
    }[place]
    whole = getattr(module, name)

    def full(*arguments: Any) -> Any:
        if (out / "train-000000.tar.label.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, name, full)
        with pytest.raises(OSError, match=r"No space left.*start the same command again.*train-00000[12]\.tar"):
            run_label(images, out)
    assert (out / "train-000000.tar.label.json").exists()
    assert not (out / "manifest.json").exists()
    assert not [path for path in out.iterdir() if path.name.startswith("..")], "no open temporary file is left"
    run_label(images, out)
    assert_complete(images, out)


def test_a_read_only_folder_is_named(run_label: Label, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    out = tmp_path / "labels"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "mkdir", read_only)
        with pytest.raises(OSError, match=r"Read-only file system.*labels"):
            run_label(images, out)
    run_label(images, out)
    assert_complete(images, out)
