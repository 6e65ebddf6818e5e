"""Choosing images by the disagreement of their labels, and training on those alone."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import DISPARITY, unlabeled_sample, write_dataset

from depthkit.checks import num_images
from depthkit.config import AugmentConfig, ConfigError, DataConfig, DatasetConfig
from depthkit.data.datamodule import WholeImages, build_streams
from depthkit.data.decode import encode_disparity
from depthkit.data.manifest import LabelsOf, load_manifest, save_manifest
from depthkit.data.reader import DatasetReader
from depthkit.select import largest, main

SCORES = [0.02, 0.9, 0.05, 0.31, None, 0.01, 0.4, 0.03, 0.05, 0.07, 0.6, 0.04, 0.2]
"""Disagreement of every image, in shards of 4, 4, 4 and 1; None has no label."""
KEYS = [f"image_{index:02d}" for index in range(len(SCORES))]


def write_images(folder: Path) -> Path:
    samples = {key: unlabeled_sample(index) for index, key in enumerate(KEYS)}
    return write_dataset(folder, samples, None, samples_per_shard=4)


def label_members(score: float | None, **facts: Any) -> dict[str, bytes]:
    if score is None:
        return {"json": json.dumps({"rejected": "damaged"}).encode()}
    png, found = encode_disparity(np.linspace(3, 1, 80, dtype=np.float32).reshape(8, 10))
    return {"disparity.png": png, "json": json.dumps({**found, "disagreement": score, **facts}).encode()}


def write_labels(folder: Path, images: Path, members: dict[str, dict[str, bytes]]) -> Path:
    digest = load_manifest(images).digest()
    origin = LabelsOf(images="rooms", images_digest=digest, teacher_sha256="ab" * 32, code_version="1")
    return write_dataset(folder, members, DISPARITY, samples_per_shard=4, labels_of=origin)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def labels(images: Path, tmp_path: Path) -> Path:
    return write_labels(tmp_path / "labels", images, dict(zip(KEYS, map(label_members, SCORES), strict=True)))


def run(labels: Path, out: Path, *rule: str) -> list[str]:
    """Keys that the verb keeps."""
    assert main([f"labels={labels}", f"out={out}", *rule]) == 0
    samples = json.loads(out.read_text())["samples"]
    shards = {"train-000000.tar": 0, "train-000001.tar": 4, "train-000002.tar": 8, "train-000003.tar": 12}
    return [KEYS[shards[name] + index] for name, indices in samples.items() for index in indices]


# Choosing


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("fraction=0.25", [1, 6, 10]),
        ("fraction=0.5", [1, 3, 6, 9, 10, 12]),
        ("fraction=1", [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]),
        ("fraction=0.0001", [1]),
        ("max_disagreement=0.05", [0, 2, 5, 7, 8, 11]),
        ("max_disagreement=0.01", [5]),
    ],
)
def test_the_largest_share_or_the_smallest_scores_are_kept(labels: Path, tmp_path: Path, rule: str, kept: list[int]):
    assert run(labels, tmp_path / "chosen.json", rule) == [KEYS[index] for index in kept]


def test_of_equal_scores_the_first_are_kept():
    scores = np.tile([0.5, 0.7, 0.5], 1000)
    assert sorted(largest(0.5)(scores)) == sorted([*range(1, 3000, 3), *[i for i in range(3000) if i % 3 != 1][:500]])


def test_what_was_chosen_is_printed(labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(labels, tmp_path / "chosen.json", "fraction=0.25")
    said = capsys.readouterr().out
    assert "3 of 12 labeled images in 3 shards, 1 images have no label" in said
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    assert sum(int(row[2]) for row in rows) == 12
    assert sum(int(row[3]) for row in rows) == 3


def test_a_selection_names_its_labels_its_images_and_its_rule(images: Path, labels: Path, tmp_path: Path):
    run(labels, tmp_path / "new" / "chosen.json", "fraction=0.25")
    content = json.loads((tmp_path / "new" / "chosen.json").read_text())
    assert content["images_digest"] == load_manifest(images).digest()
    assert content["labels_digest"] == load_manifest(labels).digest()
    assert content["rule"] == "fraction=0.25"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["chosen.json"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (["fraction=0"], "fraction=0.0: must be a share"),
        (["fraction=1.5"], "fraction=1.5: must be a share"),
        (["fraction=many"], "fraction=many: must be a number"),
        (["max_disagreement=-1"], "max_disagreement=-1.0: must be"),
        (["max_disagreement=nan"], "max_disagreement=nan: must be"),
        (["max_disagreement=0.001"], "keeps none of 12 labeled images; the smallest disagreement is 0.01"),
        ([], "one of fraction= and max_disagreement="),
        (["fraction=0.3", "max_disagreement=1"], "one of fraction= and max_disagreement="),
        (["fraction=0.3", "share=1"], "one of fraction= and max_disagreement="),
    ],
)
def test_a_wrong_rule_is_one_message_and_no_file(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: list[str], message: str
):
    assert main([f"labels={labels}", f"out={tmp_path / 'chosen.json'}", *rule]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "chosen.json").exists()


def test_labels_without_scores_are_refused(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = {key: label_members(0.1) for key in KEYS} | {KEYS[7]: label_members(0.1, disagreement=None)}
    labels = write_labels(tmp_path / "labels", images, plain)
    assert main([f"labels={labels}", f"out={tmp_path / 'chosen.json'}", "fraction=0.3"]) == 1
    said = capsys.readouterr().err
    assert "image_07" in said
    assert "stage.flip=true" in said
    assert main([f"labels={images}", f"out={tmp_path / 'chosen.json'}", "fraction=0.3"]) == 1
    assert "not a pseudo-label set" in capsys.readouterr().err


# Training on what was chosen


def config(images: Path, **settings: Path) -> DatasetConfig:
    return DatasetConfig(manifest=str(images), **{name: str(path) for name, path in settings.items()})


@pytest.mark.parametrize("rule", ["fraction=0.25", "fraction=0.5", "max_disagreement=0.05", "max_disagreement=0.01"])
@pytest.mark.parametrize("num_lanes", [1, 2])
def test_a_stream_yields_what_was_chosen_once_a_sweep(
    images: Path, labels: Path, tmp_path: Path, rule: str, num_lanes: int
):
    chosen = run(labels, tmp_path / "chosen.json", rule)
    dataset = config(images, labels=labels, selection=tmp_path / "chosen.json")
    data = DataConfig(unlabeled={"x": dataset}, crop_size=[16, 16], batch_size=num_lanes, augment=AugmentConfig())
    stream = build_streams(data, "disparity", seed=3)["unlabeled"]
    for sweep in range(3):
        samples = [stream.load(sweep * len(chosen) + place)[0] for place in range(len(chosen))]
        assert sorted(sample.key for sample in samples) == chosen
        assert all(sample.valid_mask.all() and not sample.rejections for sample in samples)
    assert num_images(dataset) == len(chosen)


def test_validation_reads_what_was_chosen(images: Path, labels: Path, tmp_path: Path):
    chosen = run(labels, tmp_path / "chosen.json", "fraction=0.25")
    readers = [DatasetReader("x", config(images, selection=tmp_path / "chosen.json"), None)]
    whole = WholeImages(readers, short_side=16, multiple=8)
    assert [whole[index]["key"] for index in range(len(whole))] == [[key] for key in chosen]


def test_a_rejected_sample_of_a_selection_has_its_own_key(images: Path, labels: Path, tmp_path: Path):
    run(labels, tmp_path / "chosen.json", "fraction=0.25")
    reader = DatasetReader("x", config(images, selection=tmp_path / "chosen.json"), None)
    assert reader.shard_sizes == [1, 1, 1]
    found = [reader.rejection(shard, 0, ValueError("no")) for shard in range(3)]  # type: ignore[arg-type]
    assert [(row.key, Path(row.shard).name) for row in found] == [
        ("image_01", "train-000000.tar"),
        ("image_06", "train-000001.tar"),
        ("image_10", "train-000002.tar"),
    ]


def test_a_selection_of_other_images_or_labels_is_refused(images: Path, labels: Path, tmp_path: Path):
    run(labels, tmp_path / "chosen.json", "fraction=0.25")
    manifest = load_manifest(labels)
    save_manifest(replace(manifest, description="labeled again"), labels)
    with pytest.raises(ConfigError, match=rf"labels with digest {manifest.digest()[:12]}"):
        DatasetReader("x", config(images, labels=labels, selection=tmp_path / "chosen.json"), "disparity")
    save_manifest(replace(load_manifest(images), description="packed again"), images)
    with pytest.raises(ConfigError, match="images with digest"):
        DatasetReader("x", config(images, selection=tmp_path / "chosen.json"), None)
    with pytest.raises(ConfigError, match=r"missing\.json: no such file; `depthkit select` writes it"):
        DatasetReader("x", config(images, selection=tmp_path / "missing.json"), None)


@pytest.mark.parametrize("indices", [[0, 0], [1, 0], [-1], [4], [0.5], ["a"], [[0, 1], [1, 2]]])
def test_a_selection_that_cannot_be_is_refused(images: Path, labels: Path, tmp_path: Path, indices: list[Any]):
    path = tmp_path / "chosen.json"
    run(labels, path, "fraction=0.25")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"samples": {"train-000000.tar": indices}}))
    with pytest.raises(ConfigError, match=r"selection of train-000000\.tar: not ascending indices"):
        DatasetReader("x", config(images, selection=path), None)
    for broken in ("", "[]", json.dumps(content | {"samples": {}}), json.dumps(content | {"more": 1})):
        path.write_text(broken)
        with pytest.raises(ConfigError, match=r"chosen\.json"):
            DatasetReader("x", config(images, selection=path), None)


def test_a_wrong_selection_is_found_before_a_run(tiny_config: Any, images: Path, labels: Path, tmp_path: Path):
    from depthkit.checks import validate

    settings = [f"data.unlabeled.target.manifest={images}", f"data.unlabeled.target.labels={labels}"]
    settings += [f"data.unlabeled.target.selection={tmp_path / 'chosen.json'}"]
    run(labels, tmp_path / "chosen.json", "fraction=0.25")
    validate(tiny_config("student", tmp_path / "run", *settings))
    (tmp_path / "chosen.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        validate(tiny_config("student", tmp_path / "run", *settings))
