"""Pseudo-labels: one shard for one shard, the same keys, resumable, never half, and always of a named origin."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import grey_levels, jpeg, png, unlabeled_sample, write_dataset

import depthkit
from depthkit.bundle import load_model, read_facts
from depthkit.config import ConfigError, DatasetConfig
from depthkit.data.claims import Claims
from depthkit.data.decode import decode_image, decode_target
from depthkit.data.label_images import ImageChunks
from depthkit.data.labeling import LabelShards
from depthkit.data.manifest import LabelSettings, Manifest, load_manifest
from depthkit.data.quarantine import QuarantineBudgetExceeded, SampleError
from depthkit.data.reader import DatasetReader
from depthkit.data.shards import ShardReader, image_member, verify_shard
from depthkit.data.windows import crop_image, full_window, normalize
from depthkit.label import label
from depthkit.stages.pseudo_label import PseudoLabelModule

NUM_IMAGES = 22
SIZE = (40, 56)


def write_images(folder: Path, changed: dict[str, dict[str, bytes]] | None = None) -> Path:
    """Three shards of 8, 8 and 6 images; every fifth is upright."""
    sizes = [SIZE[::-1] if i % 5 == 4 else SIZE for i in range(NUM_IMAGES)]
    samples = {f"image_{i:02d}": unlabeled_sample(i, size) for i, size in enumerate(sizes)}
    return write_dataset(folder, samples | (changed or {}), None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


Label = Callable[..., Path]


@pytest.fixture(scope="session")
def run_label(compose: Any, tiny_teacher: Path) -> Label:
    """`run_label(images, out, *overrides)`: what `depthkit label` runs; 3 images at a time."""

    def run(images: Path, out: Path, *overrides: str) -> Path:
        settings = [f"stage.bundle={tiny_teacher}", f"stage.images={images}", f"stage.out={out}"]
        settings += ["stage.batch_size=3", "stage.num_workers=0", "trainer.enable_progress_bar=false"]
        return label(compose("stage=pseudo_label", *settings, *overrides))

    return run


@pytest.fixture(scope="module")
def labels(run_label: Label, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of an undisturbed run."""
    return run_label(images, tmp_path_factory.mktemp("labels") / "set")


@pytest.fixture
def store(labels: Path, tmp_path: Path) -> Callable[..., LabelShards]:
    """`store(images)`: the folder of a label set as one process sees it, which has not written anything yet."""

    def open_store(images: Path, manifest: Manifest | None = None) -> LabelShards:
        origin = load_manifest(labels).labels_of
        assert origin is not None
        reader = ShardReader(manifest or load_manifest(images), images.parent)
        claims = Claims(tmp_path / "labels" / ".claims", timeout=60)
        return LabelShards(tmp_path / "labels", reader, origin, claims, max_rejected=0.01)

    return open_store


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


# The label set


def test_every_image_shard_has_a_label_shard_with_its_keys(images: Path, labels: Path):
    image_set, label_set = load_manifest(images), load_manifest(labels)
    of_images, of_labels = ShardReader(image_set, images.parent), ShardReader(label_set, labels.parent)
    assert [shard.path for shard in label_set.shards] == [shard.path for shard in image_set.shards]
    assert [shard.num_samples for shard in label_set.shards] == [8, 8, 6]
    for index, shard in enumerate(label_set.shards):
        assert of_labels.keys(index) == of_images.keys(index)
        verify_shard(labels.parent, shard)


def test_a_label_set_names_its_teacher_and_its_images(images: Path, labels: Path, tiny_teacher: Path):
    manifest = load_manifest(labels)
    assert manifest.labels_of is not None
    assert manifest.labels_of.teacher_sha256 == read_facts(tiny_teacher).sha256
    assert len(manifest.labels_of.teacher_sha256) == 64
    assert manifest.labels_of.images_digest == load_manifest(images).digest()
    assert manifest.labels_of.code_version == depthkit.__version__
    assert manifest.labels_of.settings == LabelSettings(short_side=32, precision="32-true")
    assert manifest.target is not None
    assert (manifest.target.quantity, manifest.target.metric) == ("disparity", False)


@pytest.mark.parametrize("index", [0, 4, 21])
def test_a_label_is_the_teachers_prediction_within_half_a_code(
    images: Path, labels: Path, tiny_teacher: Path, index: int
):
    """The reference: the image at shorter side 32, sides multiples of 8, through the model alone."""
    place = divmod(index, 8)
    pixels = decode_image(image_member(ShardReader(load_manifest(images), images.parent).read(*place).members))
    size = (48, 32) if index % 5 == 4 else (32, 48)  # 56 / 40 * 32 = 44.8, to a multiple of 8
    resized = crop_image(pixels, full_window(pixels.shape[:2], size), pixels.shape[:2])
    with torch.inference_mode():
        batch = normalize(torch.from_numpy(resized).permute(2, 0, 1)[None])
        expected = load_model(tiny_teacher)[0](batch).values[0].numpy()

    manifest = load_manifest(labels)
    assert manifest.target is not None
    members = ShardReader(manifest, labels.parent).read(*place).members
    facts = json.loads(members["json"])
    found, valid_mask = decode_target(members["disparity.png"], manifest.target, facts, "disparity")
    assert valid_mask.all()
    assert found.shape == size
    half_a_code = np.ptp(expected) / 65535 / 2
    assert facts["scale"] == pytest.approx(np.ptp(expected), rel=1e-4)
    # Batches of other sizes round differently in the last bits of float32.
    assert np.abs(found - expected).max() <= half_a_code + 1e-5 * expected.max()


def test_sky_is_disparity_zero(run_label: Label, tmp_path: Path):
    sky = np.zeros(SIZE, np.uint8)
    sky[: SIZE[0] // 2] = 255
    with_sky = {"jpg": jpeg(grey_levels(0, SIZE)), "sky.png": png(sky)}
    images = write_dataset(tmp_path / "images", {"a": with_sky, "b": unlabeled_sample(0, SIZE)}, None)
    labels = run_label(images, tmp_path / "labels")
    reader = DatasetReader("x", DatasetConfig(manifest=str(images), labels=str(labels)), "disparity")
    samples = [reader.read_whole(0, i, short_side=32, multiple=8) for i in range(2)]
    assert not samples[0].target[:16].any()
    assert samples[0].valid_mask.all()
    assert samples[0].target[16:].min() > 0
    assert samples[1].target[:16].max() > 0


def test_a_student_reads_its_labels_beside_the_images(images: Path, labels: Path):
    reader = DatasetReader("x", DatasetConfig(manifest=str(images), labels=str(labels)), "disparity")
    keys = [reader.read_whole(*divmod(i, 8), short_side=32, multiple=8).key for i in range(NUM_IMAGES)]
    assert keys == [f"image_{i:02d}" for i in range(NUM_IMAGES)]


# Again, and after a death


def test_a_second_run_writes_nothing(run_label: Label, images: Path, labels: Path):
    before = {path: path.stat().st_mtime_ns for path in labels.parent.iterdir() if path.is_file()}
    assert len(before) == 3 * 3 + 2
    assert run_label(images, labels.parent) == labels
    assert {path: path.stat().st_mtime_ns for path in labels.parent.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("batches_done", [0, 1, 4, 5])
def test_a_run_that_dies_leaves_whole_shards_and_is_completed_by_the_next(
    run_label: Label, images: Path, labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches_done: int
):
    """The first shard is three batches of at most 3 wide images, and one of the two upright ones."""
    whole = PseudoLabelModule.predict_step

    def dying(module: PseudoLabelModule, batch: Any, batch_idx: int) -> Any:
        if batch_idx == batches_done:
            raise RuntimeError("the machine is gone")
        return whole(module, batch, batch_idx)

    out = tmp_path / "labels"
    with monkeypatch.context() as patched:
        patched.setattr(PseudoLabelModule, "predict_step", dying)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            run_label(images, out)
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left <= {"labels_of.json", *(f"train-000000.tar{end}" for end in ("", ".index.json", ".label.json"))}
    assert left >= {"labels_of.json"}
    again = run_label(images, out)
    assert tars(out) == tars(labels.parent)
    assert load_manifest(again).digest() == load_manifest(labels).digest()


def test_what_a_killed_process_left_behind_is_no_label(run_label: Label, images: Path, labels: Path, tmp_path: Path):
    """A kill that no handler sees leaves a temporary file, and perhaps a shard whose index was not written yet."""
    out = tmp_path / "labels"
    run_label(images, out)
    (out / "train-000001.tar").rename(out / ".train-000001.tar.abc.tmp")
    (out / "train-000002.tar.index.json").unlink()
    (out / "train-000002.tar.label.json").unlink()
    (out / "manifest.json").unlink()
    run_label(images, out)
    assert tars(out) == tars(labels.parent)
    assert load_manifest(out / "manifest.json").digest() == load_manifest(labels).digest()


def test_a_set_with_missing_shards_is_not_finished(store: Callable[..., LabelShards], images: Path):
    shards = store(images)
    assert shards.pending() == [0, 1, 2]
    assert not shards.finish()
    assert not shards.manifest_path.exists()


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("num_done", [0, 2])
def test_two_processes_write_what_one_writes(
    images: Path, labels: Path, tiny_teacher: Path, tmp_path: Path, num_done: int
):
    """With two of three shards done, the second process has nothing to do, and neither waits for the other."""
    out = tmp_path / "labels"
    out.mkdir()
    for name in ["labels_of.json", *sorted(tars(labels.parent))[:num_done]]:  # tars of a killed run: no records yet
        (out / name).write_bytes((labels.parent / name).read_bytes())
    command = [sys.executable, "-m", "depthkit", "label", f"bundle={tiny_teacher}", f"images={images}", f"out={out}"]
    command += ["stage.batch_size=3", "stage.num_workers=0", "trainer.enable_progress_bar=false"]
    command += ["trainer.devices=2"]
    # The last bits of a prediction depend on the number of threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert tars(out) == tars(labels.parent)


# Another origin


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("settings.short_side 32, now 40", ["stage.short_side=40"]),
        ("settings.precision '32-true', now 'bf16-mixed'", ["trainer.precision=bf16-mixed"]),
        ("teacher_sha256", []),
        ("images_digest", []),
    ],
)
def test_labels_of_another_origin_in_the_folder_are_refused(
    run_label: Label, images: Path, labels: Path, tmp_path: Path, field: str, overrides: list[str]
):
    out = tmp_path / "labels"
    out.mkdir()
    origin = json.loads((labels.parent / "labels_of.json").read_text())
    if not overrides:
        origin[field] = "0123456789" * 6
    (out / "labels_of.json").write_text(json.dumps(origin))
    with pytest.raises(ConfigError, match=rf"{out} holds labels of another origin \({field}.*\): choose another out"):
        run_label(images, out, *overrides)
    assert sorted(path.name for path in out.iterdir()) == ["labels_of.json"]


def test_the_folder_of_the_images_is_refused(run_label: Label, tmp_path: Path):
    """The label shards have the names of the image shards, and the set a manifest of its own."""
    images = write_images(tmp_path / "images")
    before = {path.name: path.read_bytes() for path in images.parent.iterdir()}
    with pytest.raises(ConfigError, match="choose another out=FOLDER"):
        run_label(images, images.parent)
    images.rename(tmp_path / "images" / "other.json")
    with pytest.raises(ConfigError, match="choose another out=FOLDER"):
        run_label(tmp_path / "images" / "other.json", images.parent)
    (tmp_path / "images" / "other.json").rename(images)
    assert {path.name: path.read_bytes() for path in images.parent.iterdir()} == before


def test_a_teacher_of_depth_is_refused(compose: Any, images: Path, tiny_teacher: Path, tmp_path: Path):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    facts = json.loads((tiny_teacher / "model.json").read_text()) | {"kind": "depth"}
    (bundle / "model.json").write_text(json.dumps(facts))
    (bundle / "model.safetensors").write_bytes((tiny_teacher / "model.safetensors").read_bytes())
    settings = [f"stage.bundle={bundle}", f"stage.images={images}", f"stage.out={tmp_path / 'labels'}"]
    with pytest.raises(ConfigError, match="predicts depth"):
        label(compose("stage=pseudo_label", *settings))
    assert not (tmp_path / "labels").exists()


# Broken images


def damaged(index: int) -> dict[str, bytes]:
    return {"jpg": unlabeled_sample(index, SIZE)["jpg"][:-40]}


def test_a_broken_image_keeps_its_place_and_is_named(run_label: Label, labels: Path, tmp_path: Path):
    images = write_images(tmp_path / "images", {"image_09": damaged(9)})
    found = run_label(images, tmp_path / "labels")
    manifest = load_manifest(found)
    reader = ShardReader(manifest, found.parent)
    assert [shard.num_samples for shard in manifest.shards] == [8, 8, 6]
    assert reader.keys(1)[1] == "image_09"
    assert tars(found.parent)["train-000002.tar"] == tars(labels.parent)["train-000002.tar"]

    (row,) = [json.loads(line) for line in (found.parent / "rejected.jsonl").read_text().splitlines()]
    assert row["key"] == "image_09"
    assert row["shard"] == str(images.parent / "train-000001.tar")
    assert "cut off" in row["reason"]

    student = DatasetReader("target", DatasetConfig(manifest=str(images), labels=str(found)), "disparity")
    with pytest.raises(SampleError, match="image_09"):
        student.read_whole(1, 1, short_side=32, multiple=8)
    assert student.read_whole(1, 2, short_side=32, multiple=8).key == "image_10"


def test_too_many_broken_images_end_the_run(run_label: Label, tmp_path: Path):
    images = write_dataset(
        tmp_path / "images", {f"k{i:03d}": damaged(i) for i in range(120)}, None, samples_per_shard=60
    )
    with pytest.raises(QuarantineBudgetExceeded, match="cut off"):
        run_label(images, tmp_path / "labels", "data.quarantine_budget=0.5")
    assert not (tmp_path / "labels" / "manifest.json").exists()


def every_chunk(images: Path, shards: list[int], size: int) -> list[Any]:
    reader = ShardReader(load_manifest(images), images.parent)
    chunks = ImageChunks(reader, short_side=32, multiple=8)
    return [
        chunks[shard, first, min(first + size, reader.manifest.shards[shard].num_samples)]
        for shard in shards
        for first in range(0, reader.manifest.shards[shard].num_samples, size)
    ]


# Batches


def test_shards_in_folders_of_their_own_keep_their_paths(store: Callable[..., LabelShards], images: Path):
    manifest = load_manifest(images)
    nested = replace(manifest, shards=tuple(replace(shard, path=f"a/b/{shard.path}") for shard in manifest.shards))
    shards = store(images, nested)
    taken = [shards.take() for _ in range(3)]
    (chunk,) = every_chunk(images, [2], 8)
    assert shards.accept(chunk)
    for index in range(6):
        shards.write(2, index, np.eye(8, dtype=np.float32))
    assert (shards.folder / "a" / "b" / "train-000002.tar").is_file()
    assert taken == [0, 1, 2]
    assert shards.pending() == [0, 1]
